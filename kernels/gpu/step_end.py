"""Triton kernels of step_end. They are launch-bound: every number is read and written once."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .host import on_device, power_of_2

BLOCK = 1024


@triton.jit
def _add_to_sums(sums, values, weight, SLOTS: tl.constexpr):
    slot = tl.arange(0, SLOTS)
    row = tl.where(slot == len(values), 1.0, tl.zeros([SLOTS], tl.float64))
    for k in tl.static_range(len(values)):
        row = tl.where(slot == k, tl.load(values[k]).to(tl.float64), row)
    broken = tl.sum((row - row != 0).to(tl.int32), 0)  # infinity - infinity is NaN
    mask = (slot <= len(values)) & (broken == 0)
    tl.store(sums + slot, tl.load(sums + slot, mask=mask) + row * weight, mask=mask)


@triton.jit
def _check_gradients(norms, parts, buffers, saved, size, count, found_inf, norm, BLOCK: tl.constexpr):
    each, total = tl.arange(0, BLOCK), tl.zeros([BLOCK], tl.float64)
    place = each
    while tl.min(place) < parts:
        part = tl.load(norms + place, mask=place < parts, other=0.0).to(tl.float64)
        total += part * part
        place += BLOCK
    whole = tl.sqrt(tl.sum(total, 0))
    bad = ((whole - whole) != 0).to(tl.int32)  # infinity - infinity is NaN
    if tl.program_id(0) == 0:
        tl.store(norm, whole)
        tl.store(found_inf, bad.to(tl.float32))
        tl.store(count, tl.load(count) + bad.to(tl.float32))
    place = tl.program_id(0).to(tl.int64) * BLOCK + each
    mask = place < size * bad
    tl.store(buffers + place, tl.load(saved + place, mask=mask), mask=mask)


def launch_sums(sums: Tensor, values: Sequence[Tensor], weight: int) -> None:
    slots = power_of_2(len(values) + 1)
    with on_device(sums.device):
        _add_to_sums[(1,)](sums, tuple(values), weight, SLOTS=slots, enable_fp_fusion=True, num_warps=1)


def launch_check(norms: Tensor, buffers: Tensor, saved: Tensor, count: Tensor, found_inf: Tensor) -> Tensor:
    norm, size = torch.empty_like(count), buffers.numel()
    grid = (max(1, triton.cdiv(size, BLOCK)),)
    with on_device(norms.device):
        _check_gradients[grid](
            norms, len(norms), buffers, saved, size, count, found_inf, norm,
            BLOCK=BLOCK, enable_fp_fusion=True, num_warps=4,
        )  # fmt: skip
    return norm
