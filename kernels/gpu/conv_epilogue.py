"""The kernel of conv_epilogue.py: the map is a flat array, of which each program takes one piece, in place."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .host import common_unit, on_device

_ELEMENTS = 2048  # of a program: 16 a thread, for 4 warps


@triton.jit(do_not_specialize=["units", "period", "inner"])
def _kernel(
    y, bias, z, units, period, inner,
    LAST: tl.constexpr, RELU: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    unit = tl.arange(0, BLOCK)[:, None]
    lane = tl.arange(0, UNIT)[None, :]
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = start * UNIT + (unit * UNIT + lane)
    mask = start + unit + 0 * lane < units
    total = tl.load(y + offsets, mask=mask, other=0.0).to(tl.float32)
    if bias is not None:
        channel = ((start % period).to(tl.int32) + unit) % period  # in units
        channel = channel * UNIT + lane if LAST else channel // inner + 0 * lane
        total += tl.load(bias + channel).to(tl.float32)
    if z is not None:
        total += tl.load(z + offsets, mask=mask, other=0.0).to(tl.float32)
    if RELU:
        total = tl.where(total <= 0, 0.0, total)  # NaN stays
    tl.store(y + offsets, total, mask=mask)


def launch(y: Tensor, bias: Tensor | None, z: Tensor | None, relu: bool) -> None:
    """Run the kernel, which overwrites y. y must not be empty."""
    _, C, H, W = y.shape
    last = y.is_contiguous(memory_format=torch.channels_last)
    format = torch.channels_last if last else torch.contiguous_format
    z = z if z is None else z.contiguous(memory_format=format)
    bias = bias if bias is None else bias.contiguous()
    unit = common_unit(y.numel(), C if last else H * W)
    units, block = y.numel() // unit, _ELEMENTS // unit
    period, inner = (C // unit, 1) if last else (C * H * W // unit, H * W // unit)
    with on_device(y.device):
        _kernel[(math.ceil(units / block),)](
            y, bias, z, units, period, inner,
            LAST=last, RELU=relu, UNIT=unit, BLOCK=block, enable_fp_fusion=True, num_warps=4,
        )  # fmt: skip
