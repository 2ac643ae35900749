"""Optimizers whose learning rate is a device tensor and whose step can be skipped on the device.

torch's fused SGD and AdamW, or apex's FusedSGD, FusedLAMB and FusedAdam where apex is installed.
"""

import importlib

import torch
from torch.optim import Optimizer

from ..errors import UserError

APEX = {"fusedsgd": "FusedSGD", "fusedlamb": "FusedLAMB", "fusedadam": "FusedAdam"}


def create_optimizer(groups: list[dict], options, device: torch.device) -> Optimizer:
    """`groups`: from Method.param_groups. `options`: opt, momentum, weight_decay. `base_lr` stays in each group."""
    groups = [{**group, "base_lr": group["lr"]} for group in groups]
    if not options.decay_norms:
        groups = [part for group in groups for part in _without_decay_of_vectors(group)]
    if options.opt in APEX:
        return _apex_optimizer(groups, options)
    groups = [{**group, "lr": torch.tensor(float(group["lr"]), device=device)} for group in groups]
    if options.opt == "adamw":
        return torch.optim.AdamW(groups, lr=groups[0]["lr"], weight_decay=options.weight_decay, fused=True)
    nesterov = options.opt == "nesterov"
    settings = {"momentum": options.momentum, "weight_decay": options.weight_decay, "nesterov": nesterov}
    optimizer = torch.optim.SGD(groups, lr=groups[0]["lr"], **settings, fused=True)
    # torch would leave these uninitialised if the very first step is skipped
    for weight in (p for group in groups for p in group["params"] if options.momentum):
        optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
    return optimizer


def _without_decay_of_vectors(group: dict) -> list[dict]:
    """The group's matrices and kernels, and without weight decay its norms and biases."""
    vectors = [p for p in group["params"] if p.dim() <= 1]
    rest = [p for p in group["params"] if p.dim() > 1]
    parts = [{**group, "params": rest}, {**group, "params": vectors, "weight_decay": 0.0}]
    return [part for part in parts if part["params"]]


def apex_optimizers():
    """The module apex.optimizers; raises UserError where apex is not installed."""
    try:
        return importlib.import_module("apex.optimizers")
    except ImportError as error:
        raise UserError(
            f"--opt {', '.join(APEX)} need NVIDIA apex ({error}); build it from its source repository (the package "
            "called apex on PyPI is another project) or use --opt sgd, nesterov or adamw"
        ) from None


def _apex_optimizer(groups: list[dict], options) -> Optimizer:
    """apex reads a Python float as the rate and cannot skip a step on the device; its rates are written by the host."""
    settings = {"lr": options.lr, "weight_decay": options.weight_decay}
    if options.opt == "fusedsgd":
        settings["momentum"] = options.momentum
    return getattr(apex_optimizers(), APEX[options.opt])(groups, **settings)


def can_skip(optimizer: Optimizer) -> bool:
    """Whether the optimizer obeys `found_inf` on the device, as torch's fused ones do."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)
