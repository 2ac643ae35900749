"""Exponential moving average of a network's weights, by foreach: a few launches a step, no sync.

Ours instead of torch's AveragedModel, which reads its device counter on the host at every update, and of timm's
ModelEmaV3, whose decay is a number on the host: a captured step would keep the one of its capture.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

# A constant decay leaves decay ** steps of the initial weights in the average, about exp(-steps * (1 - decay)). After
# five times 1 / (1 - decay) steps that is 0.7 %; fewer steps need the warm-up.
FEWEST = 5


class Ema:
    """`net` is the averaged copy: average += (1 - decay) * (weights - average); integer buffers are copied.

    `source`: networks by name, as `net` is then. With `warms_up`, the decay of a step is the one that `write` has set
    on the device before it, and a captured step follows it; it costs two launches more and the memory of one copy.
    """

    def __init__(self, source: nn.ModuleDict, decay: float, warms_up: bool = False):
        self.decay, self.net = decay, copy.deepcopy(source).eval().requires_grad_(False)
        pairs = list(zip(self.net.state_dict().values(), source.state_dict(keep_vars=True).values(), strict=True))
        self._floats = [pair for pair in pairs if pair[0].is_floating_point()]
        self._others = [pair for pair in pairs if not pair[0].is_floating_point()]
        self._share: Tensor | None = None  # 1 - decay of this step
        if warms_up:
            self._share = torch.ones((), device=pairs[0][0].device)

    def write(self, step: int) -> None:
        """Set the decay for the update after `step` steps. The host does not wait; without a warm-up nothing is done.

        It depends on the number of the step alone, so that a resumed run continues exactly.
        """
        if self._share is not None:
            self._share.fill_(1 - warm_decay(self.decay, step))

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the weights as they are now."""
        averages, weights = zip(*self._floats, strict=True)
        if self._share is None:
            torch._foreach_lerp_(averages, weights, 1 - self.decay)
        else:  # foreach has no lerp with one tensor as the weight
            changes = torch._foreach_sub(weights, averages)
            torch._foreach_mul_(changes, self._share)
            torch._foreach_add_(averages, changes)
        if self._others:
            averages, weights = zip(*self._others, strict=True)
            torch._foreach_copy_(averages, weights)


def needs_warm_up(decay: float, steps: int) -> bool:
    """True if a constant decay would leave more than 0.7 % of the initial weights in the average after `steps`."""
    return steps * (1 - decay) < FEWEST


def warm_decay(decay: float, step: int) -> float:
    """min(decay, 1 - (1 + step) ** (-2/3)), with `step` from 0: timm's ModelEmaV3 with use_warmup.

    The first update takes the weights as they are. 0.9 is reached after 31 steps, 0.999 after 31,600.
    """
    return min(decay, 1 - (1 + step) ** (-2 / 3))


def decay_at(decay: float, steps: int, step: int) -> float:
    """The decay after `step` of the `steps` of a run."""
    return warm_decay(decay, step) if needs_warm_up(decay, steps) else decay


def warms_up(decay: float, steps: int, log: Callable[[str], None]) -> bool:
    """`needs_warm_up`, and a line if so. `decay` 0: there is no average."""
    if not decay or not needs_warm_up(decay, steps):
        return False
    log(
        f"--ema-decay {decay:g}: {steps:,} steps would leave {100 * decay**steps:.2g} % of the initial weights in the "
        "average; so the decay rises from 0, as in timm's --model-ema-warmup"
    )
    return True
