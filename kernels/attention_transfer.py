"""Attention transfer of one stage (Zagoruyko & Komodakis 2017, arXiv:1612.03928).

    L = weight / (N HW) * sum (a_s - a_t)^2
    a = q / max(||q||_2, 1e-12) per sample over HW,   q = mean over channels of f^2
    dL/df_s = k f_s,   k = 4 weight / (Cs N HW) * (e - a_s <a_s, e>) / ||q_s||,   e = a_s - a_t;   [N, HW]

Shapes: student [N, Cs, H, W], teacher [N, Ct, H, W], any floating dtype. fp32 holds up to values of about 1e9: their
fourth powers are summed. Only the student gets a gradient. Channels-last and NCHW maps are read as they lie, slices of
the batch or of the channels too; a map with gaps between rows or columns is copied first.
Two launches forward: one reads both maps and leaves q, one reads that and leaves k. Bytes per element of the map in
bf16: 2 (teacher), 6 (student: two reads, one write).
A sample of zeros has a = 0 and gradient 0. Departure: the weight multiplies the mean; the paper's beta / 2 times a sum
of norms is another scale. The usual weight with this mean is 1000.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .check import check_floating
from .op import FusedOp, acc_dtype, is_compiled_for_cpu


def attention_transfer_reference(student: Tensor, teacher: Tensor, weight: float = 1.0) -> Tensor:
    """The specification, with torch's autograd. torch.compile on the CPU gets it in place of the operator.

    Compiled it is 3 times as fast as F.normalize of means over channels, because maps are read as they lie in memory.
    """
    dtype = acc_dtype([student, teacher])
    a_s, a_t = (_attention(f.to(dtype)) for f in (student, teacher.detach()))
    return weight * (a_s - a_t).square().sum() / max(a_s.numel(), 1)


def _attention(f_NCHW: Tensor) -> Tensor:
    """a [N, HW]; a clamped norm is a constant."""
    N, C, H, W = f_NCHW.shape
    q = f_NCHW.permute(0, 2, 3, 1).reshape(N * H * W, C).square().sum(1).view(N, H * W) / C
    squares = q.square().sum(1, keepdim=True)
    clamped = squares < 1e-24
    return q / torch.where(clamped, 1e-12, torch.where(clamped, 1, squares).sqrt())


class Inputs(NamedTuple):
    student: Tensor
    teacher: Tensor | None
    """None in the backward pass, which does not need it."""
    weight: float


def attention_transfer(student: Tensor, teacher: Tensor, weight: float = 1.0) -> Tensor:
    """The equation above as a scalar. ValueError on what does not fit.

    student [N, Cs, H, W], teacher [N, Ct, H, W]: the numbers of channels may differ. An empty batch gives 0.
    """
    check_floating(student_map=student, teacher_map=teacher)
    s, t = list(student.shape), list(teacher.shape)
    if len(s) != 4 or len(t) != 4 or s[0] != t[0] or s[2:] != t[2:]:
        raise ValueError(f"maps must be [N, C, H, W], alike but for the channels; got student {s} and teacher {t}")
    if s[1] == 0 or t[1] == 0:
        raise ValueError(f"maps without channels have no mean: student {s}, teacher {t}")
    if is_compiled_for_cpu(student):
        return attention_transfer_reference(student, teacher, weight)
    return _attention_transfer(Inputs(student, teacher.detach(), float(weight)))[0]


_attention_transfer = FusedOp(
    "attention_transfer",
    Inputs,
    names=("loss", "k"),
    outputs=lambda inputs, new: (new(()), new((len(inputs.student), inputs.student.shape[2:].numel()))),  # k: [N, HW]
    keeps_constants=False,
    grads=lambda inputs, dtype: torch.empty_like(inputs.student),
    writes_grads=lambda inputs, on_gpu: False,
)
