"""DIST (Huang et al. 2022, arXiv:2205.10536): the student's probabilities correlate with the teacher's.

    L = T^2 [ beta (1 - mean over rows of r(p_s row, p_t row)) + gamma (1 - mean over columns of r(p_s col, p_t col)) ]
    p = softmax(z / T);  r(x, y) = <x', y'> / (|x'| |y'| + 1e-8), x' = x - mean(x)
    dr/dx = y' / D - <x', y'> |y'| / (|x'| D^2) x',  D = |x'| |y'| + 1e-8;   dL/dz = p (G - <p, G>) / T,  G = dL/dp

Shapes: student and teacher [N, C], any floating dtype and row stride. Two launches forward, for the rows' statistics
and then for the columns', because the gradient needs sums over the whole batch.
Bytes per logit in bf16: 8 forward, 6 backward; above 8,192 classes 12 and 10.
T^2 is the official code's; at temperature 1, the paper's setting, it changes nothing. Departure: a constant row or
column of the student has correlation 0 and no gradient; the official code gives it one of 1e8 y'.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .check import check_logits
from .op import FusedOp, acc_dtype, is_compiled_for_cpu


def dist_loss_reference(
    student: Tensor, teacher: Tensor, *, beta: float = 1.0, gamma: float = 1.0, temperature: float = 1.0
) -> Tensor:
    """The specification: autograd through torch's softmax."""
    dtype = acc_dtype([student, teacher])
    p_s, p_t = ((z.to(dtype) / temperature).softmax(1) for z in (student, teacher.detach()))
    between_classes, between_samples = 1 - _pearson(p_s, p_t).mean(), 1 - _pearson(p_s.T, p_t.T).mean()
    loss = temperature**2 * (beta * between_classes + gamma * between_samples)
    return loss if len(student) else p_s.sum()


def _pearson(x: Tensor, y: Tensor) -> Tensor:
    """[R] for rows x and y [R, K], from the first of which the others are measured: a constant row is exactly 0."""
    x, y = (z - z[:, :1] for z in (x, y))
    x, y = (z - z.mean(1, keepdim=True) for z in (x, y))
    norms = torch.linalg.vector_norm(x, dim=1) * torch.linalg.vector_norm(y, dim=1)
    return torch.where(norms == 0, 0, (x * y).sum(1) / (norms + 1e-8))


class Inputs(NamedTuple):
    student: Tensor
    teacher: Tensor
    beta: float
    gamma: float
    temperature: float


class _CompiledDIST(torch.autograd.Function):
    """The closed form for torch.compile on the CPU: autograd's own gradient of the reference takes more sums."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, beta: float, gamma: float, temperature: float) -> Tensor:
        from .cpu.dist_loss import closed_form

        gradient = torch.empty_like(student, dtype=acc_dtype([student, teacher]))
        loss, unused = gradient.new_empty(()), gradient.new_empty(0)
        closed_form(Inputs(student, teacher, beta, gamma, temperature), (loss, unused, unused), gradient)
        ctx.save_for_backward(gradient)
        ctx.dtype = student.dtype
        return loss.clone()  # torch 2.11 gives a tensor that was written in place the gradient 0

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_output).to(ctx.dtype), None, None, None, None


def dist_loss(
    student: Tensor, teacher: Tensor, *, beta: float = 1.0, gamma: float = 1.0, temperature: float = 1.0
) -> Tensor:
    """The scalar above for logits student and teacher [N, C], C >= 2.

    The gradient goes to the student; the teacher is a constant. A batch of one row has constant columns: its second
    term is gamma, without a gradient. An empty batch gives 0. Raises ValueError on shapes, dtypes or devices that do
    not fit and on temperature <= 0.
    """
    check_logits([student, teacher], temperature, ("student_logits", "teacher_logits"))
    if is_compiled_for_cpu(student) and student.shape[0]:
        return _CompiledDIST.apply(student, teacher.detach(), beta, gamma, temperature)
    return _dist_loss(Inputs(student, teacher.detach(), float(beta), float(gamma), float(temperature)))[0]


_dist_loss = FusedOp(
    "dist_loss",
    Inputs,
    names=("loss", "rows", "columns"),
    # the kernels' statistics of rows and columns, for their backward pass
    outputs=lambda inputs, new: (new(()), new((6, len(inputs.student))), new((4, inputs.student.shape[1]))),
    writes_grads=lambda inputs, on_gpu: not on_gpu,  # a kernel has the sums over the batch only at its end
)
