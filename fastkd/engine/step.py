"""One training step, eagerly: forward, backward, update. The host asks the device nothing in it."""

from collections.abc import Hashable

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from .. import distributed
from ..methods.base import Method
from ..metrics import Meter
from .bn_snapshot import BatchNormSnapshot
from .ema import Ema
from .optim import can_skip, create_optimizer
from .options import TrainOptions
from .precision import Precision


class Step:
    """`step(images, target, plan)` changes the method's weights and adds its loss terms to `step.meter`.

    A step whose gradient is not finite is skipped on the device (apex's optimizers cannot): weights, momentum and
    BatchNorm statistics stay as they were, `step.nonfinite` counts it.
    """

    def __init__(self, method: Method, options: TrainOptions, device: torch.device):
        self.method, self.options = method, options
        self.statistics = BatchNormSnapshot(method)
        if options.compile:
            method.compile(dynamic=False)  # in place: names and weights stay
        self.module = distributed.parallel(method, device, method.find_unused_parameters)
        self.optimizer = create_optimizer(method.param_groups(options.lr), options, device)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.precision = Precision(options.amp_dtype, device)
        self.ema = Ema(nn.ModuleDict(method.networks()), options.ema_decay) if options.ema_decay else None
        self.meter = Meter()
        self.nonfinite = torch.zeros((), device=device)  # steps whose gradient was not finite

    def __call__(self, images: Tensor, target: Tensor, plan: Hashable = None) -> None:
        self.statistics.keep()
        count = max(1, min(self.options.grad_accum, len(images) // 2))  # BatchNorm cannot train on one image
        parts = list(zip(images.tensor_split(count), target.tensor_split(count), strict=True))
        for number, part in enumerate(parts, 1):
            self.module.require_backward_grad_sync = number == len(parts)  # DDP sends gradients with the last part
            self._backward(*part, plan, share=len(part[0]) / len(images))
        self._update()

    def close(self) -> str:
        """What there is to say at the end."""
        return ""

    def _backward(self, images: Tensor, target: Tensor, plan: Hashable, share: float) -> None:
        with self.precision.autocast():
            terms = self.module(images, target, plan)
        self.precision.scaler.scale(sum(terms.values()) * share).backward()
        self.meter.add(terms, weight=len(images))

    def _update(self) -> None:
        scaler = self.precision.scaler
        scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = get_total_norm(gradients)
        if self.options.clip_grad:
            clip_grads_with_norm_(self.parameters, self.options.clip_grad, norm)
        bad = ~norm.isfinite()
        self.nonfinite += bad
        self.statistics.put_back_if(bad)
        if can_skip(self.optimizer):
            self.optimizer.found_inf = bad.float()
        scaler.step(self.optimizer)
        scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema:
            self.ema.update()

    def state_dict(self) -> dict:
        """All that the next step depends on; the teacher is not part of it."""
        return {
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.precision.scaler.state_dict(),
            "ema": self.ema.net.state_dict() if self.ema else {},
        }

    def load_state_dict(self, state: dict) -> None:
        self.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:  # torch leaves a group's own tensors where the file had them
            if isinstance(group["lr"], Tensor):
                group["lr"] = group["lr"].to(self.precision.device)
        self.precision.scaler.load_state_dict(state["scaler"])
        if self.ema:
            self.ema.net.load_state_dict(state["ema"])
