"""Optimizers whose learning rate is a device tensor and whose step can be skipped on the device, and the schedule.

torch's fused SGD, Adam and AdamW, apex's FusedSGD, FusedLAMB and FusedAdam where apex is installed, or timm's by name
(timm_optim.py). The schedule writes the learning rate between steps. The optimizer reads a tensor, so a captured or
compiled step follows the schedule; a Python float would be frozen in it.
"""

import importlib
import math
from collections.abc import Iterable
from fnmatch import fnmatchcase
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import UserError
from .options import TrainOptions
from .timm_optim import create_timm_optimizer, is_timms

APEX = {"fusedsgd": "FusedSGD", "fusedlamb": "FusedLAMB", "fusedadam": "FusedAdam"}


def create_optimizer(
    groups: list[dict[str, Any]], options: TrainOptions, device: torch.device, networks: Iterable[nn.Module] = ()
) -> Optimizer:
    """The optimizer `options.opt` over `groups` of Method.param_groups; `base_lr` keeps each group's own rate.

    `networks`: those that are trained; they may name weights that --no-decay-norms spares.
    """
    groups = [{**group, "base_lr": group["lr"]} for group in groups]
    if not options.decay_norms:
        spared = _spared(networks)
        groups = [new for group in groups for new in _without_decay(group, spared)]
    if options.opt in APEX:  # they read the learning rate as a Python float, and cannot skip a step on the device
        momentum = {"momentum": options.momentum} if options.opt == "fusedsgd" else {}
        kind = getattr(apex_optimizers(), APEX[options.opt])
        return kind(groups, lr=options.lr, weight_decay=options.weight_decay, **momentum)
    if is_timms(options.opt):
        return create_timm_optimizer(groups, options)
    groups = [{**group, "lr": torch.tensor(float(group["lr"]), device=device)} for group in groups]
    if options.opt in ("adam", "adamw"):
        kind = torch.optim.Adam if options.opt == "adam" else torch.optim.AdamW
        return kind(groups, lr=groups[0]["lr"], weight_decay=options.weight_decay, fused=True)
    optimizer = torch.optim.SGD(
        groups,
        lr=groups[0]["lr"],
        momentum=options.momentum,
        weight_decay=options.weight_decay,
        nesterov=options.opt == "nesterov",
        fused=True,
    )
    # torch would leave these uninitialised if the very first step is skipped
    for weight in (p for group in groups for p in group["params"] if options.momentum):
        optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
    return optimizer


def _spared(networks: Iterable[nn.Module]) -> set[Tensor]:
    """The weights without decay by timm's rule, besides vectors: biases, and those of `no_weight_decay` of the network.

    These are the position embeddings, class tokens and tables of relative positions of transformers.
    """
    found: set[Tensor] = set()
    for net in networks:
        patterns = ["*.bias", *getattr(net, "no_weight_decay", tuple)()]
        found |= {p for name, p in net.named_parameters() if any(fnmatchcase(name, each) for each in patterns)}
    return found


def _without_decay(group: dict[str, Any], spared: set[Tensor]) -> list[dict[str, Any]]:
    """Two groups: matrices and kernels as they were; norms, biases and `spared` weights without weight decay."""
    without = [p for p in group["params"] if p.dim() <= 1 or p in spared]
    rest = [p for p in group["params"] if p.dim() > 1 and p not in spared]
    groups = [{**group, "params": rest}, {**group, "params": without, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def apex_optimizers() -> ModuleType:
    """The module apex.optimizers. Raises UserError if apex is not installed."""
    try:
        return importlib.import_module("apex.optimizers")
    except ImportError as error:
        raise UserError(
            f"--opt {', '.join(APEX)} need NVIDIA apex ({error}); build it from its source repository (the package "
            "called apex on PyPI is another project) or use --opt sgd, nesterov or adamw"
        ) from None


def can_skip(optimizer: Optimizer) -> bool:
    """True if the optimizer obeys `found_inf` on the device, as torch's fused ones do."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)


class Schedule:
    """`write(epoch)` sets the learning rate of every group to its own rate times `lr_factor`.

    With `reset_momentum`, a drop sets the momentum to zero: the next step is like the first one of a new
    torch.optim.SGD.
    """

    def __init__(self, options: TrainOptions, optimizer: Optimizer):
        self.options, self.optimizer = options, optimizer
        self.base = [group["base_lr"] for group in optimizer.param_groups]

    def write(self, epoch: float, previous: float | None = None) -> float:
        """Set every group's rate for this fractional epoch; gives that of the first group, for the log.

        `previous`: the epoch of the step before. With it, the momentum is reset if a drop lies between the two.
        """
        factor = lr_factor(self.options, epoch)
        if self.options.reset_momentum and previous is not None:
            if any(previous < drop <= epoch for drop in self.options.drops):
                torch._foreach_zero_([state["momentum_buffer"] for state in self.optimizer.state.values()])
        for group, base in zip(self.optimizer.param_groups, self.base, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(base * factor)
            else:  # of apex and timm
                group["lr"] = base * factor
        return self.options.lr * factor


def lr_factor(o: TrainOptions, epoch: float) -> float:
    """The factor on the learning rates at this fractional epoch: 1 after the warm-up, then falling.

    Linear warm-up from `warmup_lr` over the first epochs, then cosine to `min_lr`, or a drop by `decay_rate` every
    `decay_epochs` ("step") or at the `decay_milestones` ("multistep").
    """
    if epoch < o.warmup_epochs:
        start = o.warmup_lr / o.lr
        return start + (1 - start) * epoch / o.warmup_epochs
    if o.sched == "cosine":
        floor, done = o.min_lr / o.lr, min((epoch - o.warmup_epochs) / (o.epochs - o.warmup_epochs), 1.0)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))
    return o.decay_rate ** sum(epoch >= drop for drop in o.drops)
