"""The sizes of a network's stage outputs, to build what is attached to them and to compare two networks."""

from collections.abc import Sequence

import torch
from torch import nn

from .staged import staged


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
