"""BatchNorm over the images of all processes: `--sync-bn`.

    mean_c, var_c: over every image and pixel of all processes;  y = (x - mean) / sqrt(var + eps) * weight + bias

Ours instead of torch's SyncBatchNorm, which refuses the CPU and, outside of graphs, waits for the device in every layer
to leave out processes without images. This one runs on the CPU (gloo) and on CUDA (NCCL) by the same code, and never
waits. Each layer sends 2 C + 1 numbers in the forward pass and 2 C in the backward pass: two delays of the network.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from .. import distributed
from ..errors import UserError
from ..methods.base import Method
from ..methods.frozen import FrozenTeacher

OWN_FORWARD = (_BatchNorm.forward, nn.BatchNorm2d.forward)


def synchronise(method: Method) -> None:
    """Let the BatchNorm layers of `method` use all processes' images in training. With one process nothing changes.

    Those of a teacher count if they use the statistics of the batch (`--teacher-bn batch`). The layers stay the same
    objects, with the same names in a state dict. Raises UserError for a layer of another kind.
    """
    if distributed.world_size() == 1:
        return
    teachers = [each.net for each in method.modules() if isinstance(each, FrozenTeacher) and each.batch_statistics]
    for net in (method, *teachers):
        for name, norm in net.named_modules():
            if isinstance(norm, _BatchNorm) and not isinstance(norm, SyncedNorm):
                _check(name, norm)
                norm.__class__ = type(f"Synced{type(norm).__name__}", (SyncedNorm, type(norm)), {})


def _check(name: str, norm: _BatchNorm) -> None:
    has_act = type(norm).__name__ == "BatchNormAct2d"  # timm's: BatchNorm, dropout, activation
    if type(norm).forward not in OWN_FORWARD and not has_act:
        raise UserError(
            f"--sync-bn: {name} is a {type(norm).__name__}, whose forward pass is its own; fastkd can synchronise "
            "torch's BatchNorm and timm's BatchNormAct2d: drop --sync-bn"
        )


class SyncedNorm(_BatchNorm):
    """Put before the class of a BatchNorm layer, which keeps its parameters and buffers."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        self._check_input_dim(x)
        y, mean, var, count = _Normalise.apply(x, self.weight, self.bias, self.eps)
        if self.track_running_stats and self.running_mean is not None:
            self._track(mean, var * (count / (count - 1)))
        if hasattr(self, "act"):
            y = cast(Any, self).act(cast(Any, self).drop(y))
        return y

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor) -> None:
        """Move the running statistics: on all processes by the same values."""
        assert self.running_mean is not None and self.running_var is not None
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        if self.momentum is None:  # the mean of all batches; the share stays on the device
            share = 1 / cast(Tensor, self.num_batches_tracked).to(mean.dtype)
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), share.to(self.running_mean.dtype))
            self.running_var.lerp_(var.to(self.running_var.dtype), share.to(self.running_var.dtype))
            return
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(var.to(self.running_var.dtype), self.momentum)


class _Normalise(torch.autograd.Function):
    """x [N, C, ...] -> y, mean [C], var [C] (of all images, biased), count (a scalar). Statistics in fp32 at least."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, ...]:
        mean, var, count = _statistics(x)
        y = F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt(), count)
        ctx.mark_non_differentiable(mean, var, count)
        return y, mean, var, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale, count = ctx.saved_tensors
        shape, axes = _axes(x)
        grad_y = grad.to(mean.dtype)
        x_hat = (x.to(mean.dtype) - mean.view(shape)) * scale.view(shape)
        local = torch.stack([grad_y.sum(axes), (grad_y * x_hat).sum(axes)])  # of bias and weight: averaged as all are
        means = distributed.all_reduce_sum(local) / count
        factor = scale if weight is None else scale * weight
        grad_x = factor.view(shape) * (grad_y - means[0].view(shape) - x_hat * means[1].view(shape))
        of_weight, of_bias = (None, None) if weight is None else (local[1].to(weight), local[0].to(weight))
        return grad_x.to(x.dtype), of_weight, of_bias, None


def _axes(x: Tensor) -> tuple[list[int], list[int]]:
    """The shape in which [C] broadcasts to x, and all axes of x but that of the channels."""
    return [1, -1, *[1] * (x.dim() - 2)], [axis for axis in range(x.dim()) if axis != 1]


def _statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance [C] of all processes, and the number of values of a channel.

    Each process sends its own mean, sum of squared deviations and count (Chan et al. 1979): a difference of large sums
    would lose the digits of a small variance.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    values = x.to(dtype)
    var, mean = torch.var_mean(values, _axes(x)[1], correction=0)
    own = values.numel() // values.shape[1]
    rows = distributed.all_gather(torch.cat([mean, var * own, mean.new_full((1,), own)]))
    counts, (means, squares) = rows[:, -1:], rows[:, :-1].chunk(2, dim=1)
    count = counts.sum()
    mean = (means * counts).sum(0) / count
    return mean, (squares + counts * (means - mean).square()).sum(0) / count, count
