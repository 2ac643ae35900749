"""DIST (Huang et al. 2022, arXiv:2205.10536): the student's probabilities correlate with the teacher's.

    L = T^2 [ beta (1 - mean over rows of r(p_s row, p_t row)) + gamma (1 - mean over columns of r(p_s col, p_t col)) ]
    p = softmax(z / T);  r(x, y) = <x', y'> / (|x'| |y'| + 1e-8), x' = x - mean(x)
    dr/dx = y' / D - <x', y'> |y'| / (|x'| D^2) x',  D = |x'| |y'| + 1e-8;   dL/dz = p (G - <p, G>) / T,  G = dL/dp

Shapes: student and teacher [N, C], any floating dtype and row stride. Computed in fp32 (in fp64 where an input is fp64,
by the closed form in torch operations). Two launches forward, for the rows' statistics and then for the columns', as
sums over the whole batch are needed before any gradient is known; one launch backward.
Bytes per logit in bf16: 8 forward, 6 backward; above 8,192 classes 12 and 10.

T^2 is the official code's; at temperature 1, the paper's setting, it changes nothing. Departure: a constant row or
column of the student has correlation 0 and no gradient; the official code gives it one of 1e8 y'.
"""

import torch
from torch import Tensor

from .check import check_logits
from .cpu.dist_loss import closed_form
from .gpu.dist_loss import launch, launch_backward
from .op import accumulator, plain, savable


def dist_loss_reference(
    student: Tensor, teacher: Tensor, *, beta: float = 1.0, gamma: float = 1.0, temperature: float = 1.0
) -> Tensor:
    """The specification: autograd through torch's softmax."""
    dtype = accumulator([student, teacher])
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


def dist_loss(
    student: Tensor, teacher: Tensor, *, beta: float = 1.0, gamma: float = 1.0, temperature: float = 1.0
) -> Tensor:
    """The scalar above for logits student and teacher [N, C], C >= 2.

    The gradient goes to the student; the teacher is a constant. A batch of one row has constant columns: its second
    term is gamma, without a gradient. An empty batch gives 0. Raises ValueError on shapes, dtypes or devices that do
    not fit and on temperature <= 0.
    """
    check_logits([student, teacher])
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    learns = torch.is_grad_enabled() and student.requires_grad
    inputs = student, savable(teacher.detach()), float(beta), float(gamma), float(temperature), learns
    return _FusedDIST.apply(*inputs) if plain((student, teacher)) else _dist_loss(*inputs)[0]


def _on_gpu(student: Tensor, teacher: Tensor) -> bool:
    return student.is_cuda and accumulator([student, teacher]) == torch.float32


def _forward(
    student: Tensor, teacher: Tensor, beta: float, gamma: float, temperature: float, learns: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, rows [6, N], columns [4, C]) from the kernels, (loss, gradient [N, C], nothing) from the closed form."""
    loss, rows, columns = _results(student, teacher, learns)
    if len(student) == 0:
        return loss.zero_(), rows, columns
    compute = launch if _on_gpu(student, teacher) else closed_form
    compute(student, teacher, beta, gamma, temperature, loss, rows, columns)
    return loss, rows, columns


_dist_loss = torch.library.custom_op("fastkd::dist_loss", _forward, mutates_args=())


def _results(student: Tensor, teacher: Tensor, learns: bool) -> tuple[Tensor, Tensor, Tensor]:
    (N, C), dtype = student.shape, accumulator([student, teacher])
    shapes = ((), (6, N), (4, C)) if _on_gpu(student, teacher) else ((), (N, C) if learns else (0,), (0,))
    return tuple(student.new_empty(shape, dtype=dtype) for shape in shapes)


@_dist_loss.register_fake
def _(student, teacher, beta, gamma, temperature, learns):
    return _results(student, teacher, learns)


def _gradient(
    student: Tensor,
    teacher: Tensor,
    rows: Tensor,
    columns: Tensor,
    upstream: Tensor,
    temperature: float,
) -> Tensor:
    if not _on_gpu(student, teacher):
        return (rows * upstream).to(student.dtype)  # the gradient itself
    grads = student.new_empty(student.shape)
    if len(student):
        launch_backward(student, teacher, rows, columns, upstream, temperature, grads)
    return grads


_dist_loss_backward = torch.library.custom_op("fastkd::dist_loss_backward", _gradient, mutates_args=())


@_dist_loss_backward.register_fake
def _(student, teacher, rows, columns, upstream, temperature):
    return student.new_empty(student.shape)


def _setup(ctx, inputs, output):
    student, teacher, _, _, ctx.temperature, _ = inputs
    ctx.save_for_backward(student, teacher, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, upstream, *_):
    if torch.is_grad_enabled():
        raise RuntimeError("dist_loss has no second derivative; fastkd.kernels.dist_loss_reference has one")
    if upstream is None:
        return (None,) * 6
    inputs = *ctx.saved_tensors, upstream
    compute = _gradient if plain(inputs) else _dist_loss_backward
    return compute(*inputs, ctx.temperature), *[None] * 5


_dist_loss.register_autograd(_backward, setup_context=_setup)


class _FusedDIST(torch.autograd.Function):
    """The same autograd with less time on the host."""

    @staticmethod
    def forward(ctx, student, teacher, beta, gamma, temperature, learns):
        results = _forward(student, teacher, beta, gamma, temperature, learns)
        ctx.save_for_backward(student, teacher, *results[1:])
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return results[0]

    @staticmethod
    def backward(ctx, upstream):
        return _backward(ctx, upstream)
