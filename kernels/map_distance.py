"""Two elementwise distances of feature maps: FitNets' hint and the partial L2 of OFD.

    hint      L = weight / (N C H W) sum (s - t)^2                            arXiv:1412.6550
    overhaul  L = weight / N sum m (s - t')^2,   t' = max(t, margin_c),   m = (s > t') or (t' > 0)    arXiv:1904.01866
    dL/ds = 2 weight / (N C H W) (s - t)   and   2 weight / N m (s - t')

OFD's maps are those before the ReLU. Where the teacher is silent (t' <= 0) a student below t' is silent too: no error.
The margin is what the teacher says on average where it is silent, E[x | x < 0], which `bn_margin` gives.

Shapes: student and teacher [N, C, H, W], any floating dtypes and strides; margin [C], negative. One launch forward
reads both maps once and leaves the value and the gradient. Bytes per element in bf16: 6 (read, read, write). A student
that is not dense, and a teacher in another memory format than the student's, are copied first.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .check import check_floating
from .op import FusedOp, acc_dtype, is_compiled_for_cpu


def hint_distance_reference(student: Tensor, teacher: Tensor, *, weight: float = 1.0) -> Tensor:
    """The specification, with torch's autograd. torch.compile on the CPU gets it in place of the operator."""
    dtype = acc_dtype([student, teacher])
    s, t = student.to(dtype), teacher.detach().to(dtype)
    return weight * (F.mse_loss(s, t) if s.numel() else s.sum())


def overhaul_distance_reference(student: Tensor, teacher: Tensor, margin: Tensor, *, weight: float = 1.0) -> Tensor:
    """The specification: a sum over the elements, a mean over the batch. torch.compile on the CPU gets it, too.

    The ReLU is for speed: with one `where` over both conditions Inductor writes a mask, which takes twice the time.
    """
    dtype = acc_dtype([student, teacher])
    s, t = (f.permute(0, 2, 3, 1).to(dtype) for f in (student, teacher.detach()))
    t = torch.maximum(t, margin.detach().to(dtype))
    residual = s - t
    return weight * torch.where(t > 0, residual, residual.relu()).square().sum() / max(s.shape[0], 1)


class Inputs(NamedTuple):
    student: Tensor
    teacher: Tensor
    margin: Tensor | None
    weight: float

    def dense(self) -> tuple[Tensor, Tensor, Tensor | None, float]:
        """Maps in the student's memory format, the margin, and the factor of the sum of squares."""
        student, teacher, margin, weight = self
        format = memory_format(student)
        student, teacher = (x.detach().contiguous(memory_format=format) for x in (student, teacher))
        return student, teacher, margin, weight / (student.numel() if margin is None else len(student))


def hint_distance(student: Tensor, teacher: Tensor, *, weight: float = 1.0) -> Tensor:
    """weight * mean of (student - teacher)^2 over all elements, a scalar (FitNets, arXiv:1412.6550).

    student, teacher: [N, C, H, W] of any floating dtypes. Gradient to the student only. An empty batch gives 0; NaN
    propagates. ValueError on shapes, devices or dtypes that do not fit.
    """
    _check(student, teacher, None)
    if is_compiled_for_cpu(student):
        return hint_distance_reference(student, teacher, weight=weight)
    return _map_distance(Inputs(student, teacher.detach(), None, float(weight)))[0]


def overhaul_distance(student: Tensor, teacher: Tensor, margin: Tensor, *, weight: float = 1.0) -> Tensor:
    """weight / N * sum of (student - t')^2 where student > t' or t' > 0, with t' = max(teacher, margin) (OFD).

    student, teacher: [N, C, H, W] before the ReLU, of any floating dtypes; margin: [C] as `bn_margin` gives it.
    Gradient to the student only. An empty batch gives 0; NaN propagates. ValueError on shapes, devices or dtypes that
    do not fit. Source: Heo et al. 2019, arXiv:1904.01866, section 3.
    """
    _check(student, teacher, margin)
    if is_compiled_for_cpu(student):
        return overhaul_distance_reference(student, teacher, margin, weight=weight)
    return _map_distance(Inputs(student, teacher.detach(), margin.detach(), float(weight)))[0]


def bn_margin(weight: Tensor, bias: Tensor) -> Tensor:
    """OFD's margin [C]: E[x | x < 0] of x ~ Normal(bias, |weight|), what the teacher's BatchNorm puts out.

    -3 |weight| where x is negative with a probability of 0.001 or less, as in the authors' code. Computed in fp64,
    returned in weight's dtype, fp32 at least. ValueError unless both are floating point of one shape [C].
    """
    if weight.dim() != 1 or weight.shape != bias.shape or not (weight.is_floating_point() and bias.is_floating_point()):
        given = f"{weight.dtype} {list(weight.shape)} and {bias.dtype} {list(bias.shape)}"
        raise ValueError(f"weight and bias must be floating point [C], got {given}")
    mean, std = bias.detach().double(), weight.detach().double().abs()
    ratio = mean / std
    chance = torch.special.ndtr(-ratio)
    density = torch.exp(-ratio.square() / 2) / math.sqrt(2 * math.pi)
    fallback = -3 * std + 0 * mean  # of a channel that is always 0 too; NaN of the mean stays
    margin = torch.where(chance > 0.001, mean - std * density / chance, fallback)
    return margin.to(torch.promote_types(weight.dtype, torch.float32))


def _check(student: Tensor, teacher: Tensor, margin: Tensor | None) -> None:
    check_floating(student_map=student, teacher_map=teacher, **({} if margin is None else {"margin": margin}))
    s, t = list(student.shape), list(teacher.shape)
    if len(s) != 4 or len(t) != 4:
        raise ValueError(f"maps must both be [N, C, H, W], got {s} and {t}")
    if s[0] != t[0]:
        raise ValueError(f"maps must be of one batch, got student {s} and teacher {t}; N differs")
    if s[2:] != t[2:]:
        hint = "compare stages of one resolution"
        raise ValueError(f"maps must be of one height and width, got student {s} and teacher {t}; {hint}")
    if s != t:
        hint = f"put a regressor (a connector) on the student: Conv2d({s[1]}, {t[1]}, 1)"
        raise ValueError(f"maps must have as many channels, got student {s} and teacher {t}; {hint}")
    if margin is not None and margin.shape != student.shape[1:2]:
        raise ValueError(f"margin must be [C] for maps {s}, got {list(margin.shape)}")


def memory_format(x: Tensor) -> torch.memory_format:
    if x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format if x.is_contiguous() or x.stride(1) != 1 else torch.channels_last


_map_distance = FusedOp(
    "map_distance",
    Inputs,
    grads=lambda inputs, dtype: torch.empty_like(inputs.student, memory_format=memory_format(inputs.student)),
    reference="hint_distance_reference",
)
