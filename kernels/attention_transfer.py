"""Attention transfer of one stage (Zagoruyko & Komodakis 2017, arXiv:1612.03928).

    L = weight / (N HW) * sum (a_s - a_t)^2
    a = q / max(||q||_2, 1e-12) per sample over HW,   q = mean over channels of f^2
    dL/df_s = k f_s,   k = 4 weight / (Cs N HW) * (e - a_s <a_s, e>) / ||q_s||,   e = a_s - a_t;   [N, HW]

Shapes: student [N, Cs, H, W], teacher [N, Ct, H, W], any floating dtype. Computed in fp32 (in fp64 where an input is
fp64, by the closed form in torch operations), which holds up to values of about 1e9: their fourth powers are summed.
Only the student gets a gradient. Channels-last and NCHW maps are read as they lie, slices of the batch or of the
channels too; what has gaps between rows or columns is copied first.
Two launches forward: one reads both maps and leaves q, one reads that and leaves k; one launch backward reads f_s and
writes its gradient. Bytes per element of the map in bf16: 2 (teacher), 6 (student: two reads, one write).
A sample of zeros has a = 0 and gradient 0. Departure: the weight multiplies the mean; the paper's beta / 2 times a sum
of norms is another scale. The usual weight with this mean is 1000.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .check import check_tensors
from .gpu.attention_transfer import launch, launch_backward
from .op import accumulator, plain, savable


def attention_transfer_reference(student: Tensor, teacher: Tensor, weight: float = 1.0) -> Tensor:
    """The specification: autograd through normalize."""
    dtype = accumulator([student, teacher])
    a_s, a_t = (F.normalize(f.to(dtype).square().mean(1).flatten(1)) for f in (student, teacher.detach()))
    return weight * (a_s - a_t).square().sum() / max(a_s.numel(), 1)


def attention_transfer(student: Tensor, teacher: Tensor, weight: float = 1.0) -> Tensor:
    """The equation above as a scalar. ValueError on what does not fit.

    student [N, Cs, H, W], teacher [N, Ct, H, W]: the numbers of channels may differ. An empty batch gives 0.
    """
    _check(student, teacher)
    if not torch.is_grad_enabled() or not student.requires_grad:
        return _attention_transfer(student.detach(), teacher.detach(), float(weight))[0]
    return _FusedAttentionTransfer.apply(student, savable(teacher.detach()), float(weight))


def _check(student: Tensor, teacher: Tensor) -> None:
    check_tensors(student_map=student, teacher_map=teacher)
    s, t = list(student.shape), list(teacher.shape)
    if len(s) != 4 or len(t) != 4 or s[0] != t[0] or s[2:] != t[2:]:
        raise ValueError(f"maps must be [N, C, H, W], alike but for the channels; got student {s} and teacher {t}")
    if s[1] == 0 or t[1] == 0:
        raise ValueError(f"maps without channels have no mean: student {s}, teacher {t}")
    if student.device != teacher.device:
        raise ValueError(f"student and teacher must be on one device, got {student.device} and {teacher.device}")
    if not (student.is_floating_point() and teacher.is_floating_point()):
        raise ValueError(f"maps must be floating point, got student {student.dtype} and teacher {teacher.dtype}")


def _on_gpu(tensors: list[Tensor]) -> bool:
    return tensors[0].device.type == "cuda" and accumulator(tensors) == torch.float32


def _forward(student: Tensor, teacher: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """(loss, k [N, HW])"""
    loss, k = _results(student, teacher)
    if k.numel() == 0:
        return loss.zero_(), k
    if _on_gpu([student, teacher]):
        launch(student, teacher, weight, loss, k)
    else:
        _closed_form(student, teacher, weight, loss, k)
    return loss, k


_attention_transfer = torch.library.custom_op("fastkd::attention_transfer", _forward, mutates_args=())


def _results(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    N, _, H, W = student.shape
    dtype = accumulator([student, teacher])
    return student.new_empty((), dtype=dtype), student.new_empty((N, H * W), dtype=dtype)


@_attention_transfer.register_fake
def _(student, teacher, weight):
    return _results(student, teacher)


def _closed_form(student: Tensor, teacher: Tensor, weight: float, loss: Tensor, k: Tensor) -> None:
    """Where there is no GPU, and for fp64: one pass over each map, the rest is small."""
    (N, HW), C = k.shape, student.shape[1]
    q_s, q_t = (_mean_square(f, k.dtype) for f in (student, teacher))
    norm_s, norm_t = (torch.linalg.vector_norm(q, dim=1, keepdim=True) for q in (q_s, q_t))
    inverse = 1 / norm_s.clamp(min=1e-12)
    a = q_s * inverse
    e = a - q_t * (1 / norm_t.clamp(min=1e-12))  # rounded like a: equal maps differ by exactly 0
    loss.copy_(weight / (N * HW) * e.square().sum())
    # where the norm is clamped it is a constant and has no gradient of its own
    pull = torch.where(norm_s < 1e-12, 0, (a * e).sum(1, keepdim=True))
    k.copy_((4 * weight / (C * N * HW)) * inverse * (e - a * pull))


def _mean_square(f_NCHW: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.linalg.vector_norm(f_NCHW, dim=1, dtype=dtype).square_().div_(f_NCHW.shape[1]).flatten(1)


def _gradient(student: Tensor, k: Tensor, upstream: Tensor) -> Tensor:
    """upstream * k * student, in the student's layout and dtype"""
    gradient = torch.empty_like(student)
    if student.numel() == 0:
        return gradient
    if _on_gpu([student, k]):
        launch_backward(student, k, upstream, gradient)
    else:
        N, _, H, W = student.shape
        scale = (k * upstream).view(N, 1, H, W)
        gradient.copy_(student.to(k.dtype) * scale) if student.dtype != k.dtype else torch.mul(
            student, scale, out=gradient
        )
    return gradient


_attention_transfer_backward = torch.library.custom_op(
    "fastkd::attention_transfer_backward", _gradient, mutates_args=()
)


@_attention_transfer_backward.register_fake
def _(student, k, upstream):
    return torch.empty_like(student)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, loss_gradient, _=None):
    if torch.is_grad_enabled():
        raise RuntimeError(
            "attention_transfer has no second derivative; fastkd.kernels.attention_transfer_reference has one"
        )
    if loss_gradient is None:
        return None, None, None
    student, k = ctx.saved_tensors
    compute = _gradient if plain((student, k, loss_gradient)) else _attention_transfer_backward
    return compute(student, k, loss_gradient), None, None


_attention_transfer.register_autograd(_backward, setup_context=_setup)


class _FusedAttentionTransfer(torch.autograd.Function):
    """The same autograd with less time on the host."""

    @staticmethod
    def forward(ctx, student, teacher, weight):
        compute = _forward if plain((student, teacher)) else _attention_transfer
        loss, k = compute(student, teacher, weight)
        ctx.save_for_backward(student, k)
        ctx.set_materialize_grads(False)
        return loss

    @staticmethod
    def backward(ctx, loss_gradient):
        return _backward(ctx, loss_gradient)
