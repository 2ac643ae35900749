"""Exponential moving average of a network's weights, by foreach: two launches a step, no sync.

Ours instead of torch's AveragedModel, which reads its device counter on the host at every update.
"""

import copy

import torch
from torch import nn


class Ema:
    """`net` is the averaged copy: average += (1 - decay) * (weights - average); integer buffers are copied.

    `source`: networks by name, as `net` is then.
    """

    def __init__(self, source: nn.ModuleDict, decay: float):
        self.decay, self.net = decay, copy.deepcopy(source).eval().requires_grad_(False)
        pairs = list(zip(self.net.state_dict().values(), source.state_dict(keep_vars=True).values(), strict=True))
        self._floats = [pair for pair in pairs if pair[0].is_floating_point()]
        self._others = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the weights as they are now."""
        averages, weights = zip(*self._floats, strict=True)
        torch._foreach_lerp_(averages, weights, 1 - self.decay)
        if self._others:
            averages, weights = zip(*self._others, strict=True)
            torch._foreach_copy_(averages, weights)
