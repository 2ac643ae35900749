"""Triton kernels of step_end. They are launch-bound: every number is read and written once."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..step_end import KEPT, StepState
from .host import on_device, power_of_2

BLOCK = 1024
# The elements of `counts`, as in kernels/step_end.py; a kernel reads constants of this type alone.
STEPS, SKIPPED, IN_A_ROW = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
STOPPED, PLACE = tl.constexpr(3), tl.constexpr(4)


@triton.jit
def _add_to_sums(sums, values, weight, share, counts, mark, ring, SLOTS: tl.constexpr, FIRST: tl.constexpr):
    slot = tl.arange(0, SLOTS)
    row = tl.where(slot == len(values), 1.0, tl.zeros([SLOTS], tl.float64))
    for k in tl.static_range(len(values)):
        row = tl.where(slot == k, tl.load(values[k]).to(tl.float64), row)
    broken = tl.sum((row - row != 0).to(tl.int32), 0)  # infinity - infinity is NaN
    mask = (slot <= len(values)) & (broken == 0)
    tl.store(sums + slot, tl.load(sums + slot, mask=mask) + row * weight, mask=mask)
    of_step = ring + tl.load(counts + PLACE) * (len(values) + 1) + slot
    noted, bad = row * share, tl.where(broken > 0, float("nan"), 0.0)
    number = tl.load(counts + STEPS).to(tl.float64)
    if not FIRST:
        bad += tl.load(mark)
        noted += tl.load(of_step, mask=slot < len(values), other=0.0)
    tl.store(mark, bad)
    tl.store(of_step, tl.where(slot == len(values), number, noted), mask=slot <= len(values))


@triton.jit
def _check_gradients(
    norms, parts, buffers, saved, size, counts, mark, found_inf, ring, limit, norm,
    KEPT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    each, total = tl.arange(0, BLOCK), tl.zeros([BLOCK], tl.float64)
    is_first = tl.program_id(0) == 0
    # The first program writes `counts` while others read STOPPED. It changes in bad steps alone, whose result is known.
    had_stopped = tl.load(counts + STOPPED) > 0
    of_step = ring + tl.load(counts + PLACE, mask=is_first, other=0) * parts
    place = each
    while tl.min(place) < parts:
        part = tl.load(norms + place, mask=place < parts, other=0.0).to(tl.float64)
        tl.store(of_step + place, part, mask=(place < parts) & is_first)
        total += part * part
        place += BLOCK
    whole = tl.sqrt(tl.sum(total, 0))
    checked = whole + tl.load(mark)
    bad = ((checked - checked) != 0).to(tl.int64)  # infinity - infinity is NaN
    skipped = ((bad > 0) | had_stopped).to(tl.int32)
    if is_first:
        tl.store(norm, whole)
        tl.store(found_inf, skipped.to(tl.float32))
        goes_on = had_stopped == 0
        steps = tl.load(counts + STEPS) + 1
        in_a_row = (tl.load(counts + IN_A_ROW) + 1) * bad
        stops = in_a_row >= limit
        tl.store(counts + STEPS, steps, mask=goes_on)
        tl.store(counts + SKIPPED, tl.load(counts + SKIPPED) + bad, mask=goes_on)
        tl.store(counts + IN_A_ROW, in_a_row, mask=goes_on)
        tl.store(counts + STOPPED, tl.where(stops, steps, 0), mask=goes_on)
        tl.store(counts + PLACE, tl.where(stops, KEPT, steps % KEPT), mask=goes_on)
    place = tl.program_id(0).to(tl.int64) * BLOCK + each
    mask = place < size * skipped
    tl.store(buffers + place, tl.load(saved + place, mask=mask), mask=mask)


def launch_sums(
    sums: Tensor, values: Sequence[Tensor], weight: int, share: float, is_first: bool, state: StepState, ring: Tensor
) -> None:
    slots = power_of_2(len(values) + 1)
    with on_device(sums.device):
        _add_to_sums[(1,)](
            sums, tuple(values), weight, share, state.counts, state.mark, ring,
            SLOTS=slots, FIRST=is_first, enable_fp_fusion=True, num_warps=1,
        )  # fmt: skip


def launch_check(norms: Tensor, buffers: Tensor, saved: Tensor, state: StepState, ring: Tensor, limit: int) -> Tensor:
    norm, size = torch.empty_like(state.found_inf), buffers.numel()
    grid = (max(1, triton.cdiv(size, BLOCK)),)
    with on_device(norms.device):
        _check_gradients[grid](
            norms, len(norms), buffers, saved, size, *state, ring, limit, norm,
            KEPT=KEPT, BLOCK=BLOCK, enable_fp_fusion=True, num_warps=4,
        )  # fmt: skip
    return norm
