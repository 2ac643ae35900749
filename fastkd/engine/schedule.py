"""The learning rate as a function of time, written into device tensors between steps.

The optimizer reads a tensor, so a captured or compiled step follows the schedule; a Python float would be frozen in it.
"""

import math

from torch import Tensor
from torch.optim import Optimizer

from .options import TrainOptions


class Schedule:
    """`write(epoch)` sets the learning rate of every group to its own rate times `at(epoch)`.

    Linear warm-up from `warmup_lr` over the first epochs, then cosine to `min_lr`, or a drop by `decay_rate` every
    `decay_epochs` ("step") or at the `decay_milestones` ("multistep").
    """

    def __init__(self, options: TrainOptions, optimizer: Optimizer):
        self.options, self.optimizer = options, optimizer
        self.base = [group["base_lr"] for group in optimizer.param_groups]

    def write(self, epoch: float) -> float:
        """Set every group's rate for this fractional epoch; gives that of the first group, for the log."""
        factor = self.at(epoch)
        for group, base in zip(self.optimizer.param_groups, self.base, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(base * factor)
            else:  # apex
                group["lr"] = base * factor
        return self.base[0] * factor

    def at(self, epoch: float) -> float:
        """The factor on the learning rates at this fractional epoch: 1 after the warm-up, then falling."""
        o = self.options
        if epoch < o.warmup_epochs:
            start = o.warmup_lr / o.lr
            return start + (1 - start) * epoch / o.warmup_epochs
        if o.sched == "cosine":
            floor, done = o.min_lr / o.lr, min((epoch - o.warmup_epochs) / (o.epochs - o.warmup_epochs), 1.0)
            return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))
        return o.decay_rate ** sum(epoch >= drop for drop in o.drops)
