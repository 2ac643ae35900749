"""The sizes of a network's stage outputs, to build what is attached to them and to compare two networks."""

from collections.abc import Sequence

import torch
from torch import nn

from ...errors import UserError
from .staged import staged

SIZE = 64  # pixels; what is said of the stages is said for such images
Shapes = list[tuple[int, ...]]


def stage_shapes(net: nn.Module, size: int = 64) -> list[tuple[int, ...]]:
    """[(C, H, W)] of every stage's output for an image [3, size, size]. Weights and statistics stay as they are."""
    view = staged(net)
    return output_shapes(net, [view.stem, *view.stages], size)[1:]


@torch.no_grad()
def output_shapes(net: nn.Module, parts: Sequence[nn.Module], size: int = 64) -> list[tuple[int, ...]]:
    """The same of every part of `net`, one after the other."""
    modes = {module: module.training for module in net.modules()}
    first = next(net.parameters())
    x, shapes = torch.zeros(1, 3, size, size, dtype=first.dtype, device=first.device), []
    net.eval()
    try:
        with torch.random.fork_rng(devices=[]):
            for part in parts:
                x = part(x)
                shapes.append(tuple(x.shape[1:]))
    finally:
        for module, mode in modes.items():
            module.training = mode
    return shapes


def check_stage_shapes(
    student: nn.Module, teacher: nn.Module, method: str, stage: int | None = None
) -> tuple[Shapes, Shapes]:
    """(C, H, W) of the student's and the teacher's stages, in order.

    UserError unless they have equally many with equal H x W at each, or equal H x W at the one stage that has the index
    `stage` in both. `method` is who asks, for the message.
    """
    ours, theirs = stage_shapes(student, SIZE), stage_shapes(teacher, SIZE)
    if stage is None:
        alike, where = [shape[1:] for shape in ours] == [shape[1:] for shape in theirs], "every stage"
    else:
        alike, where = ours[stage][1:] == theirs[stage][1:], "the last stage" if stage == -1 else f"stage {stage + 1}"
    if not alike:
        raise UserError(
            f"{method} compares maps of equal height and width at {where}; for {SIZE} x {SIZE} images the stages "
            f"(C x H x W) of the student {type(student).__name__} are {_listed(ours)}, those of the teacher "
            f"{type(teacher).__name__} {_listed(theirs)}: take networks that halve the resolution alike, "
            f"{'' if stage in (None, -1) else 'another stage, '}or a method without maps (kd, dkd, dist, rkd, sp)"
        )
    return ours, theirs


def _listed(shapes: Shapes) -> str:
    return ", ".join("x".join(map(str, shape)) for shape in shapes)
