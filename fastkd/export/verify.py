"""Compares what was written with the network."""

from collections.abc import Callable
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor, nn

from ..errors import UserError

Forward = Callable[[Tensor], Tensor]  # images float32 [N, 3, H, W] -> logits [N, classes]
EXTRA = "'fastkd[export]'"  # for `pip install`: the packages of onnx and int8
BATCHES = (5, 1)  # images: a network that only takes the batch that it was exported with is found


class Reloaded(nn.Module):
    """What was read from a file, as a network that is always in eval mode; `evaluate` switches modes of others."""

    def __init__(self, forward: Forward):
        super().__init__()
        self.call = (forward,)  # in a tuple, so that it is no submodule

    def forward(self, images: Tensor) -> Tensor:
        return self.call[0](images)


@torch.inference_mode()
def difference(net: nn.Module, other: nn.Module, image_size: int) -> float:
    """The largest difference of the logits on random images, as a fraction of the largest logit; NaN if any is NaN.

    Raises UserError if the network's own logits are not finite.
    """
    random = torch.Generator().manual_seed(0)
    batches = [torch.randn(count, 3, image_size, image_size, generator=random) for count in BATCHES]
    ours, theirs = (torch.cat([each(images).float() for images in batches]) for each in (net, other))
    if not bool(ours.isfinite().all()):
        raise UserError("the network's logits are not finite: its weights are damaged, or its training diverged")
    gap, largest = (ours - theirs).abs().max().item(), ours.abs().max().item()
    return gap / largest if largest else gap


def need(module: str, purpose: str, package: str) -> ModuleType:
    """The module, imported. Raises UserError, with the pip command, if it cannot be imported."""
    try:
        return import_module(module)
    except ImportError as error:
        raise UserError(
            f"{purpose} needs {module}, which cannot be imported ({error}): pip install {package}"
        ) from None
