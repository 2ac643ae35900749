"""The sizes of a network's stage outputs, to build what is attached to them and to compare two networks."""

import torch
from torch import nn

from .staged import staged


@torch.no_grad()
def stage_shapes(net: nn.Module, size: int = 64) -> list[tuple[int, ...]]:
    """[(C, H, W)] of every stage's output for an image [3, size, size]. Weights and statistics stay as they are."""
    modes = {module: module.training for module in net.modules()}
    first = next(net.parameters())
    net.eval()
    try:
        with torch.random.fork_rng(devices=[]):
            maps = staged(net).features(torch.zeros(1, 3, size, size, dtype=first.dtype, device=first.device))[1]
    finally:
        for module, mode in modes.items():
            module.training = mode
    return [tuple(x.shape[1:]) for x in maps]
