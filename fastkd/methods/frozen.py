"""The frozen teacher: a network that no training step can change."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import UserError


class FrozenTeacher(nn.Module):
    """`FrozenTeacher(net)(images [N, 3, H, W])` -> logits [N, C] of `net`, in eval mode and without gradients.

    `net` is outside of the module tree of the method that holds it. The method's `train()`, `parameters()`,
    `state_dict()` and DDP do not reach it; only `to()` does. So the BatchNorm statistics cannot move, the optimizer
    cannot see the weights, and no checkpoint of the student contains them.

    With `batch_statistics`, BatchNorm normalises with the statistics of the batch while the method is in train mode.
    The running statistics stay as they are in both cases.
    """

    net: nn.Module
    least_images = 0
    """Smaller batches are filled up for the forward pass, so that the logits of an image do not depend on the batch."""

    def __init__(self, net: nn.Module, batch_statistics: bool = False):
        super().__init__()
        self.batch_statistics = batch_statistics
        self.__dict__["net"] = net.eval().requires_grad_(False)  # not registered as a submodule

    def train(self, mode: bool = True) -> "FrozenTeacher":
        super().train(mode)
        self.net.eval()
        for norm in (module for module in self.net.modules() if isinstance(module, _BatchNorm)):
            norm.training = mode and self.batch_statistics
            norm.track_running_stats = not norm.training  # torch then passes no running statistics to be written
        return self

    def _apply(self, fn: Callable, recurse: bool = True) -> "FrozenTeacher":
        self.net._apply(fn, recurse)
        super()._apply(fn, recurse)
        return self

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return self.net(images)


class AbsentTeacher(nn.Module):
    """Stands for a teacher that is not loaded: its logits are given to each step. A forward pass is an error."""

    def forward(self, images: Tensor) -> Tensor:
        raise UserError("the teacher is not loaded, and this step needs it: its logits were not given with the batch")


def is_absent(teacher: nn.Module | None) -> bool:
    """True for the FrozenTeacher of an AbsentTeacher."""
    return isinstance(teacher, FrozenTeacher) and isinstance(teacher.net, AbsentTeacher)
