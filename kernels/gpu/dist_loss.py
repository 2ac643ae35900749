"""The kernels of dist_loss.py: statistics of the rows, statistics of the columns, gradient."""

import math
from typing import Any

import torch
import triton
import triton.language as tl

from ..dist_loss import Inputs
from ..op import Tensors
from .host import common_unit, contiguous_rows, most_registers, programs, row_shape
from .reduce import ticket, total
from .rows import load, long_row


@triton.jit
def _p(z, top, inverse_sum, inverse):
    return tl.exp((z - top) * inverse) * inverse_sum


@triton.jit
def _correlation(xx, yy, xy):
    """(r, a, b) from sums over centred x and y: dr/dx = a x + b y. All are 0 if x or y is constant."""
    x_norm, y_norm = tl.sqrt(xx), tl.sqrt(yy)
    constant = x_norm * y_norm == 0
    D = x_norm * y_norm + 1e-8
    a = -(xy / D) * (y_norm / D) / x_norm
    return tl.where(constant, 0.0, xy / D), tl.where(constant, 0.0, a), tl.where(constant, 0.0, 1 / D)


@triton.jit
def _sums_of_row(s, t, C, top_s, inv_s, top_t, inv_t, inverse, BLOCK: tl.constexpr):
    """Sums over the classes of x^2, y^2 and x y; x = p_s - 1 / C, y = p_t - 1 / C."""
    xx, yy, xy = 0.0, 0.0, 0.0
    cols = tl.arange(0, BLOCK)
    while tl.min(cols) < C:
        inside = cols < C
        x = tl.where(inside, _p(load(s, cols, C), top_s, inv_s, inverse) - 1.0 / C, 0.0)
        y = tl.where(inside, _p(load(t, cols, C), top_t, inv_t, inverse) - 1.0 / C, 0.0)
        xx += tl.sum(x * x, 0)
        yy += tl.sum(y * y, 0)
        xy += tl.sum(x * y, 0)
        cols += BLOCK
    return xx, yy, xy


@triton.jit(do_not_specialize=["N"])
def _rows_kernel(
    student, student_stride, teacher, teacher_stride, rows, row_sum, partials, ticket, N, c_units, weight, temperature,
    UNIT: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """rows [6, N]: max and 1 / sum of exp of student and teacher; weight / N times the coefficients of dr/dx."""
    C = c_units * UNIT
    inverse = 1 / temperature
    sums = tl.zeros([1], tl.float32)
    row = tl.program_id(0).to(tl.int64)
    while row < N:
        s = student + row * (student_stride * UNIT)
        t = teacher + row * (teacher_stride * UNIT)
        top_s, sum_s = long_row(s, -1, C, inverse, BLOCK)
        top_t, sum_t = long_row(t, -1, C, inverse, BLOCK)
        r, a, b = _correlation(*_sums_of_row(s, t, C, top_s, 1 / sum_s, top_t, 1 / sum_t, inverse, BLOCK))
        sums += r
        place = rows + row
        tl.store(place, top_s)
        tl.store(place + N, 1 / sum_s)
        tl.store(place + 2 * N, top_t)
        tl.store(place + 3 * N, 1 / sum_t)
        tl.store(place + 4 * N, a * (weight / N))
        tl.store(place + 5 * N, b * (weight / N))
        row += tl.num_programs(0)
    last, everything = total(sums, partials, ticket, 1, ROWS)
    if last:
        tl.store(row_sum, tl.sum(everything, 0))


@triton.jit
def _tile(logits, stride, row, cols, C, N, top, inverse_sum, inverse):
    """Probabilities [rows, classes] of a tile."""
    inside = (row < N)[:, None] & (cols < C)[None, :]
    z = tl.load(logits + row[:, None] * stride + cols[None, :], mask=inside, other=-float("inf")).to(tl.float32)
    scale = tl.load(inverse_sum + row, mask=row < N, other=0.0)
    return _p(z, tl.load(top + row, mask=row < N, other=0.0)[:, None], scale[:, None], inverse)


@triton.jit
def _column_sums(
    student, s_stride, teacher, t_stride, rows, cols, pivot_s, pivot_t, N, C, inverse,
    TALL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """[WIDE] each: means of p - pivot of student and teacher, sums over the rows of x^2, y^2 and x y, centred.

    Tiles of rows are merged by their means and centred sums (Chan et al. 1979), so that nothing cancels.
    """
    row = tl.arange(0, TALL).to(tl.int64)
    top_t = rows + 2 * N.to(tl.int64)
    mean_x, mean_y = tl.zeros([WIDE], tl.float32), tl.zeros([WIDE], tl.float32)
    xx, yy, xy = tl.zeros([WIDE], tl.float32), tl.zeros([WIDE], tl.float32), tl.zeros([WIDE], tl.float32)
    done = 0.0
    while tl.min(row) < N:
        inside = (row < N)[:, None]
        count = tl.sum((row < N).to(tl.float32), 0)
        x = tl.where(inside, _tile(student, s_stride, row, cols, C, N, rows, rows + N, inverse) - pivot_s, 0.0)
        y = tl.where(inside, _tile(teacher, t_stride, row, cols, C, N, top_t, top_t + N, inverse) - pivot_t, 0.0)
        here_x, here_y = tl.sum(x, 0) / count, tl.sum(y, 0) / count
        x = tl.where(inside, x - here_x[None, :], 0.0)
        y = tl.where(inside, y - here_y[None, :], 0.0)
        share = count / (done + count)
        off_x, off_y = here_x - mean_x, here_y - mean_y
        xx += tl.sum(x * x, 0) + off_x * off_x * (done * share)
        yy += tl.sum(y * y, 0) + off_y * off_y * (done * share)
        xy += tl.sum(x * y, 0) + off_x * off_y * (done * share)
        mean_x += off_x * share
        mean_y += off_y * share
        done += count
        row += TALL
    return mean_x, mean_y, xx, yy, xy


@triton.jit(do_not_specialize=["N"])
def _columns_kernel(
    student, student_stride, teacher, teacher_stride, rows, row_sum, columns, loss, partials, ticket,
    N, c_units, beta, gamma, temperature,
    UNIT: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """columns [4, C]: mean of student and teacher; gamma / C times the coefficients of dr/dx.

    The first row is subtracted before anything is summed, so that a constant column is exactly 0.
    """
    C = c_units * UNIT
    inverse = 1 / temperature
    cols = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    first = tl.zeros([1], tl.int64)
    s_stride, t_stride = student_stride * UNIT, teacher_stride * UNIT
    top_t = rows + 2 * N.to(tl.int64)
    pivot_s = _tile(student, s_stride, first, cols, C, N, rows, rows + N, inverse)
    pivot_t = _tile(teacher, t_stride, first, cols, C, N, top_t, top_t + N, inverse)
    mean_x, mean_y, xx, yy, xy = _column_sums(
        student, s_stride, teacher, t_stride, rows, cols, pivot_s, pivot_t, N, C, inverse, TALL, WIDE
    )
    r, a, b = _correlation(xx, yy, xy)
    place = columns + cols
    tl.store(place, tl.sum(pivot_s, 0) + mean_x, mask=cols < C)
    tl.store(place + C, tl.sum(pivot_t, 0) + mean_y, mask=cols < C)
    tl.store(place + 2 * C, a * (gamma / C), mask=cols < C)
    tl.store(place + 3 * C, b * (gamma / C), mask=cols < C)
    sums = tl.zeros([1], tl.float32) + tl.sum(tl.where(cols < C, r, 0.0), 0)
    last, everything = total(sums, partials, ticket, 1, ROWS)
    if last:
        value = beta * (1 - tl.load(row_sum) / N) + gamma * (1 - tl.sum(everything, 0) / C)
        tl.store(loss, temperature * temperature * value)


@triton.jit
def _pull(s, t, rows, columns, cols, row, C, N, inverse):
    """(p_s, G): the student's probabilities and the gradient of the mean correlations with respect to them."""
    place = rows + row
    p_s = _p(load(s, cols, C), tl.load(place), tl.load(place + N), inverse)
    p_t = _p(load(t, cols, C), tl.load(place + 2 * N), tl.load(place + 3 * N), inverse)
    inside = cols < C
    G = tl.load(place + 4 * N) * (p_s - 1.0 / C) + tl.load(place + 5 * N) * (p_t - 1.0 / C)
    G += tl.load(columns + 2 * C + cols, inside, 0.0) * (p_s - tl.load(columns + cols, inside, 0.0))
    G += tl.load(columns + 3 * C + cols, inside, 0.0) * (p_t - tl.load(columns + C + cols, inside, 0.0))
    return p_s, G


@triton.jit(do_not_specialize=["N"])
def _gradient_kernel(
    student, student_stride, teacher, teacher_stride, rows, columns, grad_output, grads, N, c_units, temperature,
    ONE_PASS: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    C = c_units * UNIT
    inverse = 1 / temperature
    scale = -temperature * tl.load(grad_output).to(tl.float32)
    row = tl.program_id(0).to(tl.int64)
    while row < N:
        s = student + row * (student_stride * UNIT)
        t = teacher + row * (teacher_stride * UNIT)
        cols = tl.arange(0, BLOCK)
        p, G = _pull(s, t, rows, columns, cols, row, C, N, inverse)
        dot = tl.sum(p * G, 0)
        if ONE_PASS:
            tl.store(grads + row * C + cols, scale * p * (G - dot), mask=cols < C)
        else:
            cols += BLOCK
            while tl.min(cols) < C:
                p, G = _pull(s, t, rows, columns, cols, row, C, N, inverse)
                dot += tl.sum(p * G, 0)
                cols += BLOCK
            cols = tl.arange(0, BLOCK)
            while tl.min(cols) < C:
                p, G = _pull(s, t, rows, columns, cols, row, C, N, inverse)
                tl.store(grads + row * C + cols, scale * p * (G - dot), mask=cols < C)
                cols += BLOCK
        row += tl.num_programs(0)


def launch(inputs: Inputs, outputs: Tensors, grads: Any, grad_outputs: Tensors = (), written: bool = False) -> None:
    """See FusedOp. The forward pass writes the loss, `rows` and `columns`, of which the backward pass makes grads."""
    student, teacher, beta, gamma, temperature = inputs
    (N, C), device, (loss, rows, columns) = student.shape, student.device, outputs
    student, teacher = contiguous_rows(student), contiguous_rows(teacher)
    unit = common_unit(C, student.stride(0), teacher.stride(0))
    networks = student, student.stride(0) // unit, teacher, teacher.stride(0) // unit
    block, warps = row_shape(C, max(student.element_size(), teacher.element_size()))
    if grad_outputs:
        _gradient_kernel[(programs(N, warps, device),)](
            *networks, rows, columns, *grad_outputs, grads, N, C // unit, temperature, ONE_PASS=block >= C,
            UNIT=unit, BLOCK=block, enable_fp_fusion=True, num_warps=warps, maxnreg=most_registers(warps),
        )  # fmt: skip
        return
    wide = 16 if C <= 4096 else 64  # enough programs for few classes, whole cache lines for many
    grids = programs(N, warps, device), math.ceil(C / wide)
    row_sum, *partials = (torch.empty(n, dtype=torch.float32, device=device) for n in (1, *grids))
    _rows_kernel[grids[:1]](
        *networks, rows, row_sum, partials[0], ticket(device), N, C // unit, beta, temperature,
        UNIT=unit, BLOCK=block, ROWS=32 * warps, enable_fp_fusion=True, num_warps=warps, maxnreg=most_registers(warps),
    )  # fmt: skip
    _columns_kernel[grids[1:]](
        *networks, rows, row_sum, columns, loss, partials[1], ticket(device), N, C // unit, beta, gamma,
        temperature, UNIT=unit, TALL=1024 // wide, WIDE=wide, ROWS=128, enable_fp_fusion=True, num_warps=4,
    )  # fmt: skip
