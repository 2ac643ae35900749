"""BatchNorm folded into the frozen blocks that IAKD swaps into the student.

Such a block keeps BatchNorm in eval mode, whose backward pass on CUDA gives gradients in contiguous memory: all
convolutions before it then leave channels-last. Folded blocks have convolutions with a bias instead. Gradients flow
through them as before.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..methods.base import Method
from .fuse_conv_bn import fuse_conv_bn
from .precision import Precision

LARGEST_ERROR = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}  # of a probability


def foldable(method: Method) -> list[Method]:
    """The methods that swap blocks whose BatchNorm has fixed statistics: the method itself, or those of a sum."""
    swappers = [each for each in method.modules() if isinstance(each, Method) and each.swaps_blocks]
    return [each for each in swappers if not each.teacher.batch_statistics]


def fold_gates(
    method: Method, images: Tensor, asked: str, chosen: str, precision: Precision, log: Callable[[str], None]
) -> str:
    """Fold the swapped-in blocks, if that leaves the results as they are; log what was measured.

    Gives the name of the form: `chosen`, that of the whole teacher, or "folded" if it does not run as a whole. Blocks
    that differ too much on `images` [N, 3, H, W] stay plain; they are a UserError if the user `asked` for a form.
    """
    for swapper in foldable(method):
        reason = _fold(swapper, images, precision, log)
        if reason and asked != "auto":
            raise UserError(f"--teacher-form {asked}: swapped-in blocks: {reason}; use --teacher-form auto or plain")
        if reason:
            log(f"swapped-in blocks: plain, {reason}")
        elif chosen == "plain":
            chosen = "folded"
    return chosen


def unfold_gates(method: Method) -> None:
    """Give the gates the teacher's own blocks again."""
    for swapper in foldable(method):
        swapper.swap_in(swapper.teacher.net)


@torch.no_grad()
def _fold(swapper: Method, images: Tensor, precision: Precision, log: Callable[[str], None]) -> str:
    """Fold the blocks of one method; why that is not possible, or the empty string."""
    limit, net = LARGEST_ERROR[precision.dtype], swapper.teacher.net
    right = _probabilities(swapper, net, images.float())
    try:
        twin = _folded(net, images, precision.dtype)
        swapper.swap_in(twin)
        with precision.autocast():
            found = _probabilities(swapper, twin, images)
    except Exception as error:  # as for the forms of a whole teacher: any kind may come, and the reason is shown
        swapper.swap_in(net)
        return "not possible: " + " ".join(f"{type(error).__name__}: {error}".split())[:160]
    largest = max((a - b).abs().max().item() for a, b in zip(found, right, strict=True))
    if not largest <= limit:
        swapper.swap_in(net)
        return f"refused: folded they differ by {largest:.1e} in a probability, {limit:g} is allowed"
    log(f"swapped-in blocks: folded, error {largest:.1e}")
    return ""


def _folded(net: nn.Module, images: Tensor, dtype: torch.dtype) -> nn.Module:
    """A copy without BatchNorm, whose weights are cast once to the dtype to which autocast would cast in each step."""
    twin = fuse_conv_bn(net, images[:2].float()).eval().requires_grad_(False).to(memory_format=torch.channels_last)
    for layer in twin.modules():
        if type(layer) in (nn.Conv2d, nn.Linear):
            layer.to(dtype)
    return twin


def _probabilities(swapper: Method, net: nn.Module, images: Tensor) -> list[Tensor]:
    """Of the student with all blocks swapped in, and of the network that the blocks are from.

    The second one is needed because an untrained student gives about 1 / classes whatever the blocks compute.
    """
    gates = sum(len(group) > 1 for group in swapper.graph_groups())
    path = swapper.staged_views_for((False,) * gates)[swapper.student]
    with _eval(swapper):
        logits = path.features(images)[0], net(images)
    return [each.float().softmax(1) for each in logits]


@contextmanager
def _eval(module: nn.Module) -> Iterator[None]:
    """Within the block, all modules are in eval mode: no statistics are moved."""
    modes = {each: each.training for each in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for each, mode in modes.items():
            each.training = mode
