"""The kernel of map_distance.py: both maps are read as flat arrays, 8 elements at a time."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..map_distance import Inputs
from ..op import Tensors
from .host import common_unit, programs
from .reduce import ticket, total


@triton.jit(do_not_specialize=["units", "period", "inner", "step"])
def _kernel(
    student, teacher, margin, grad, grad_output, partials, ticket, value, units, period, inner, step, scale,
    LAST: tl.constexpr, SKIP_ONE: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    unit = tl.arange(0, BLOCK)[:, None]
    lane = tl.arange(0, UNIT)[None, :]
    start = tl.program_id(0).to(tl.int64) * BLOCK
    place = (start % period).to(tl.int32)
    factor = 2 * scale
    if grad_output is not None:
        given = tl.load(grad_output).to(tl.float32)
        factor *= given
        if SKIP_ONE:  # the forward pass has left the gradient for a grad_output of 1
            start = tl.where(given == 1, units, start)
    squares = tl.zeros([BLOCK, UNIT], tl.float32)
    while start < units:
        offsets = start * UNIT + (unit * UNIT + lane)
        mask = start + unit < units
        s = tl.load(student + offsets, mask=mask, other=0.0).to(tl.float32)
        t = tl.load(teacher + offsets, mask=mask, other=0.0).to(tl.float32)
        if margin is not None:
            channel = (place + unit) % period  # in units
            channel = channel * UNIT + lane if LAST else channel // inner + 0 * lane
            floor = tl.load(margin + channel).to(tl.float32)
            t = tl.where((t < floor) | (floor != floor), floor, t)  # NaN stays
        residual = tl.where(mask, s - t, 0.0)
        if margin is not None:
            residual = tl.where((t <= 0) & (residual <= 0), 0.0, residual)
        if grad_output is None:
            squares += residual * residual
        if grad is not None:
            tl.store(grad + offsets, residual * factor, mask=mask)
        start += tl.num_programs(0) * BLOCK
        place = (place + step) % period
    if grad_output is None:
        last, everything = total(tl.zeros([1], tl.float32) + tl.sum(tl.sum(squares, 1), 0), partials, ticket, 1, ROWS)
        if last:
            tl.store(value + tl.arange(0, 1), everything * scale)


def launch(
    inputs: Inputs, outputs: Tensors, grads: Tensor | None, grad_outputs: Tensors = (), written: bool = False
) -> None:
    """Run the kernel; see FusedOp. If `written`, it writes nothing where grad_outputs are 1."""
    student, teacher, margin, scale = inputs.dense()
    grad_value = grad_outputs[0] if grad_outputs else None
    (_, C, H, W), device, forward = student.shape, student.device, not grad_outputs
    last = student.is_contiguous(memory_format=torch.channels_last)
    unit = common_unit(student.numel(), *(() if margin is None else (C if last else H * W,)))
    units = student.numel() // unit
    block = 1024 if unit == 1 else 1024 // max(student.element_size(), teacher.element_size())  # in units
    warps = 8
    # half the threads that would fit: each has 64 registers and loads 32 bytes or more of each map at a time
    grid = programs(math.ceil(units / block), 2 * warps, device)
    period, inner = (C // unit, 1) if last else (C * H * W // unit, max(1, H * W // unit))
    margin = margin if margin is None else margin.contiguous()
    partials = torch.empty((grid, 1), dtype=torch.float32, device=device) if forward else None
    _kernel[(grid,)](
        student, teacher, margin, grads, grad_value, partials, ticket(device) if forward else None, *outputs,
        units, max(1, period), inner, grid * block % max(1, period), scale,
        LAST=last, SKIP_ONE=written, UNIT=unit, BLOCK=block, ROWS=256, enable_fp_fusion=True, num_warps=warps,
    )  # fmt: skip
