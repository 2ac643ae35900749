"""The protocol of a method: what a paper adds to plain training, and nothing of how it is run.

A step is: images -> `out`, the memo of this step's forward passes -> `method.losses(out, target, plan)` -> backward.
The engine calls the method eagerly, compiled or captured; the method does not know which.
"""

from collections.abc import Hashable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..models import staged


class Frozen(nn.Module):
    """The teacher: always in eval mode, without gradients, and outside of the module tree that holds it.

    The holder's `train()`, `parameters()`, `state_dict()` and DDP do not reach `net`; `to()` does. So its BatchNorm
    statistics cannot move, the optimizer cannot see it and no checkpoint of the student contains it.
    """

    def __init__(self, net: nn.Module):
        super().__init__()
        self.__dict__["net"] = net.eval().requires_grad_(False)

    def _apply(self, fn, recurse=True):
        self.net._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return self.net(images)


class Forwards:
    """This step's forward passes: `out(net)` is its logits [N, C], `out.features(net)` its stage outputs.

    A network runs once, however many terms ask. Features exist for the networks that the method has tapped.
    """

    def __init__(self, images: Tensor, views: dict[nn.Module, nn.Module]):
        self.images, self._views, self._memo = images, views, {}

    def __call__(self, net: nn.Module) -> Tensor:
        return self._run(net)[0]

    def features(self, net: nn.Module) -> list[Tensor]:
        if net not in self._views:
            raise ValueError(f"features of {type(net).__name__} were asked for, but the method has not tapped it")
        return self._run(net)[1]

    def _run(self, net: nn.Module) -> tuple[Tensor, list[Tensor]]:
        if net not in self._memo:
            with torch.no_grad() if isinstance(net, Frozen) else nullcontext():
                view = self._views.get(net)
                self._memo[net] = view.features(self.images) if view else (_logits(net, self.images), [])
        return self._memo[net]


def _logits(net: nn.Module, images: Tensor) -> Tensor:
    logits = net(images)
    if not isinstance(logits, Tensor):
        kind = type(logits).__name__
        raise UserError(
            f"{type(net).__name__} gives {kind} where logits [N, C] are needed; switch off its extra outputs"
        )
    return logits


@dataclass(frozen=True)
class NoOptions:
    """This method has no options."""


class Method(nn.Module):
    """Base of all methods: METHODS[name](student, teacher, options). A subclass writes `losses`."""

    Options = NoOptions  # a frozen dataclass, validated on construction
    paper = ""
    needs_teacher = True  # a trained network, given as `teacher`

    def __init__(self, student: nn.Module, teacher: nn.Module | None = None, options=None):
        super().__init__()
        if self.needs_teacher != (teacher is not None):
            raise ValueError(f"{type(self).__name__} {'needs a' if self.needs_teacher else 'takes no'} teacher")
        self.student = student
        self.teacher = Frozen(teacher) if teacher is not None else None
        self.options = options or self.Options()
        self.__dict__["views"] = {}  # outside of the module tree: a view shares its network's parameters

    def tap(self, net: nn.Module) -> None:
        """Ask for `out.features(net)`; `net` is one of the method's networks."""
        self.views[net] = staged(net.net if isinstance(net, Frozen) else net)

    def prepare(self, loader) -> None:
        """Work before epoch 0, such as training a teacher's auto-encoder."""

    def plan(self, step: int) -> Hashable:
        """What the host decides for this step, such as a random path; one captured graph per value."""
        return None

    def losses(self, out: Forwards, target: Tensor, plan: Hashable) -> dict[str, Tensor]:
        """Weighted terms, scalars on the device; their sum is the loss. target: [N] int64 or [N, C] floating."""
        raise NotImplementedError(f"{type(self).__name__} does not define losses()")

    def param_groups(self, lr: float) -> list[dict]:
        """Groups for the optimizer; a group may have a learning rate of its own."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "lr": lr}]

    def forward(self, images: Tensor, target: Tensor, plan: Hashable = None) -> dict[str, Tensor]:
        return self.losses(Forwards(images, self.views), target, plan)
