"""The kernel of dkd_loss.py: one program takes rows. A row of both networks is kept in registers if it fits."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dkd_loss import Inputs
from ..op import Tensors
from .host import common_unit, contiguous_rows, most_registers, programs, row_shape
from .reduce import ticket, total
from .rows import load, long_row, shift


@triton.jit
def _softplus(x):
    u = tl.exp(-tl.abs(x))
    log1p = tl.where(u < 0.01, u * (1 - u * (0.5 - u / 3)), tl.log(1 + u))
    return tl.maximum(x, 0.0) + log1p


@triton.jit
def _label_terms(d_s, d_t):
    """(KL(b_t || b_s), p_s - p_t) from d = log p_y - log(1 - p_y)."""
    log_p_s, log_q_s = -_softplus(-d_s), -_softplus(d_s)
    log_p_t, log_q_t = -_softplus(-d_t), -_softplus(d_t)
    p_t, q_t = tl.exp(log_p_t), tl.exp(log_q_t)
    kl = tl.where(p_t == 0, 0.0, p_t * (log_p_t - log_p_s)) + tl.where(q_t == 0, 0.0, q_t * (log_q_t - log_q_s))
    return kl, tl.where(d_s > 0, q_t - tl.exp(log_q_s), tl.exp(log_p_s) - p_t)  # no cancellation near 1


@triton.jit
def _rest_terms(z_s, z_t, cols, label, top_s, sum_s, top_t, sum_t, inverse):
    """(r_s, r_t, r_t log(r_t / r_s)) at these classes; 0 at the label."""
    s = tl.where(cols == label, -float("inf"), z_s - top_s) * inverse
    t = tl.where(cols == label, -float("inf"), z_t - top_t) * inverse
    r_s = tl.exp(s) * tl.where(sum_s == 0, 0.0, 1 / sum_s)
    r_t = tl.exp(t) * tl.where(sum_t == 0, 0.0, 1 / sum_t)
    return r_s, r_t, tl.where(r_t == 0, 0.0, r_t * (t - s + (tl.log(sum_s) - tl.log(sum_t))))


@triton.jit
def _write(grads, cols, label, C, r_s, r_t, gap, alpha, beta, scale):
    others = beta * (r_s - r_t) - alpha * gap * r_s
    tl.store(grads + cols, scale * tl.where(cols == label, alpha * gap, others), mask=cols < C)


@triton.jit
def _row_in_registers(s, t, y_s, y_t, label, grads, C, alpha, beta, inverse, scale, BLOCK: tl.constexpr):
    """(TCKD, NCKD) of a row that is read once; its gradient is written to grads, unless that is None."""
    cols = tl.arange(0, BLOCK)
    z_s, z_t = load(s, cols, C), load(t, cols, C)
    rest_s, rest_t = tl.where(cols == label, -float("inf"), z_s), tl.where(cols == label, -float("inf"), z_t)
    top_s, top_t = shift(tl.max(rest_s, 0)), shift(tl.max(rest_t, 0))
    sum_s = tl.sum(tl.exp((rest_s - top_s) * inverse), 0)
    sum_t = tl.sum(tl.exp((rest_t - top_t) * inverse), 0)
    tckd, gap = _label_terms((y_s - top_s) * inverse - tl.log(sum_s), (y_t - top_t) * inverse - tl.log(sum_t))
    r_s, r_t, terms = _rest_terms(z_s, z_t, cols, label, top_s, sum_s, top_t, sum_t, inverse)
    if grads is not None:
        _write(grads, cols, label, C, r_s, r_t, gap, alpha, beta, scale)
    return tckd, tl.sum(terms, 0)


@triton.jit
def _row_in_pieces(s, t, y_s, y_t, label, grads, C, alpha, beta, inverse, scale, BLOCK: tl.constexpr):
    """The same for a long row, which is read twice."""
    top_s, sum_s = long_row(s, label, C, inverse, BLOCK)
    top_t, sum_t = long_row(t, label, C, inverse, BLOCK)
    tckd, gap = _label_terms((y_s - top_s) * inverse - tl.log(sum_s), (y_t - top_t) * inverse - tl.log(sum_t))
    nckd = 0.0
    cols = tl.arange(0, BLOCK)
    while tl.min(cols) < C:
        z_s, z_t = load(s, cols, C), load(t, cols, C)
        r_s, r_t, terms = _rest_terms(z_s, z_t, cols, label, top_s, sum_s, top_t, sum_t, inverse)
        nckd += tl.sum(terms, 0)
        if grads is not None:
            _write(grads, cols, label, C, r_s, r_t, gap, alpha, beta, scale)
        cols += BLOCK
    return tckd, nckd


@triton.jit(do_not_specialize=["N"])
def _kernel(
    student, student_stride, teacher, teacher_stride, target, grads, grad_output, partials, ticket, loss,
    N, c_units, alpha, beta, temperature,
    FORWARD: tl.constexpr, SKIP_ONE: tl.constexpr, ONE_PASS: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    C = c_units * UNIT
    inverse, scale = 1 / temperature, temperature / N
    sums = tl.zeros([2], tl.float32)
    row = tl.program_id(0).to(tl.int64)
    if not FORWARD:
        scale *= tl.load(grad_output).to(tl.float32)
        if SKIP_ONE:  # the forward pass has left the gradient for a grad_output of 1
            row = tl.where(tl.load(grad_output).to(tl.float32) == 1, N, row)
    while row < N:
        s = student + row * (student_stride * UNIT)
        t = teacher + row * (teacher_stride * UNIT)
        given = tl.load(target + row)
        known = (given >= 0) & (given < C)
        label = tl.where(known, given, -1).to(tl.int32)  # int64 would double the registers of every comparison
        y_s = tl.load(s + label, mask=known, other=float("nan")).to(tl.float32)
        y_t = tl.load(t + label, mask=known, other=float("nan")).to(tl.float32)
        row_grads = grads
        if grads is not None:
            row_grads = grads + row * C
        if ONE_PASS:
            tckd, nckd = _row_in_registers(s, t, y_s, y_t, label, row_grads, C, alpha, beta, inverse, scale, BLOCK)
        else:
            tckd, nckd = _row_in_pieces(s, t, y_s, y_t, label, row_grads, C, alpha, beta, inverse, scale, BLOCK)
        sums += tl.where(tl.arange(0, 2) == 0, tckd, nckd)
        row += tl.num_programs(0)
    if FORWARD:
        last, everything = total(sums, partials, ticket, 2, ROWS)
        if last:
            weights = tl.where(tl.arange(0, 2) == 0, alpha, beta) * (scale * temperature)
            tl.store(loss, tl.sum(weights * everything, 0))


def launch(
    inputs: Inputs, outputs: Tensors, grads: Tensor | None, grad_outputs: Tensors = (), written: bool = False
) -> None:
    """Run the kernel; see FusedOp. If `written`, it writes nothing where grad_outputs are 1."""
    student, teacher, target, alpha, beta, temperature = inputs
    grad_loss = grad_outputs[0] if grad_outputs else None
    (N, C), device, forward = student.shape, student.device, not grad_outputs
    student, teacher, target = contiguous_rows(student), contiguous_rows(teacher), target.contiguous()
    unit = common_unit(C, student.stride(0), teacher.stride(0))
    block, warps = row_shape(C, max(student.element_size(), teacher.element_size()))
    grid = programs(N, warps, device)
    partials = torch.empty((grid, 2), dtype=torch.float32, device=device) if forward else None
    _kernel[(grid,)](
        student, student.stride(0) // unit, teacher, teacher.stride(0) // unit, target, grads, grad_loss,
        partials, ticket(device) if forward else None, *outputs, N, C // unit, alpha, beta, temperature,
        FORWARD=forward, SKIP_ONE=written, ONE_PASS=block >= C, UNIT=unit, BLOCK=block, ROWS=32 * warps,
        enable_fp_fusion=True, num_warps=warps, maxnreg=most_registers(warps),
    )  # fmt: skip
