"""The bookkeeping at the end of a training step: two launches instead of about 40, most of them for one number.

    add_to_sums        sums += weight * (v_1, ..., v_n, 1) if all v are finite; else the step is marked as bad
    check_gradients    norm = sqrt(sum_i norms_i^2); if it is not finite, or the step is marked: found_inf = 1,
                       buffers = saved, and the step is counted as skipped

Both also note what they have read in a ring of the last KEPT steps, for the report of a run that diverges. After
`limit` skipped steps in a row the counters stop: all later steps are skipped, and the rings keep what led there. So the
host may read the counters late.

Shapes: v_i, mark, found_inf, norm: scalars; sums [n + 1] fp64; norms [p], one for each parameter; buffers, saved [b];
counts [5] int64, see STEPS to PLACE; rings [KEPT + 1, n + 1] fp64 and [KEPT + 1, p] fp32, whose last row is unused
until the counters stop. Bytes: those of the scalars. `buffers` is touched only if a step is bad. Nothing waits for the
device. On the CPU torch's operations do the same; they are the specification.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

KEPT = 32  # steps
STEPS, SKIPPED, IN_A_ROW, STOPPED, PLACE = range(5)
"""Elements of `counts`: all steps; skipped ones since the host set it to 0; those in a row up to now; the number of
steps at which `limit` was reached, else 0; the row of the rings for the next step."""


class StepState(NamedTuple):
    """What both functions write: counts [5] int64, mark and found_inf fp32 scalars. mark: 0, or NaN in a bad step."""

    counts: Tensor
    mark: Tensor
    found_inf: Tensor


def add_to_sums_reference(
    sums: Tensor, values: Sequence[Tensor], weight: int, share: float, is_first: bool, state: StepState, ring: Tensor
) -> None:
    """The specification: one operation after another."""
    row = torch.stack([*(value.double() for value in values)])
    bad = ~row.isfinite().all()
    sums += torch.where(bad, 0.0, torch.cat([row, row.new_ones(1)]) * weight)
    mark, place = torch.where(bad, torch.nan, 0.0), state.counts[PLACE : PLACE + 1]
    if is_first:
        state.mark.copy_(mark)
        ring.index_copy_(0, place, torch.cat([row * share, state.counts[:1]])[None])
    else:
        state.mark.add_(mark)
        ring.index_add_(0, place, torch.cat([row * share, row.new_zeros(1)])[None])


def add_to_sums(
    sums: Tensor, values: Sequence[Tensor], weight: int, share: float, is_first: bool, state: StepState, ring: Tensor
) -> None:
    """Add weight * (values, 1) to sums [n + 1] fp64 in place, if all values are finite. values: n scalars.

    share: the micro-batch's part of the step's images; is_first: it is the first one of a step. The row of the step in
    `ring` becomes (sum of share * values, number of the step from 0).
    """
    if sums.is_cuda:
        from .gpu.step_end import launch_sums as compute
    else:
        compute = add_to_sums_reference
    compute(sums, values, weight, share, is_first, state, ring)


def check_gradients_reference(
    norms: Tensor, buffers: Tensor, saved: Tensor, state: StepState, ring: Tensor, limit: int
) -> Tensor:
    """The specification: one operation after another."""
    counts, norm = state.counts, torch.linalg.vector_norm(norms)
    ring.index_copy_(0, counts[PLACE : PLACE + 1], norms[None])
    had_stopped = counts[STOPPED] > 0
    bad = ~(norm + state.mark).isfinite()
    steps, in_a_row = counts[STEPS] + 1, torch.where(bad, counts[IN_A_ROW] + 1, 0)
    stops = in_a_row >= limit
    stopped, place = torch.where(stops, steps, 0), torch.where(stops, KEPT, steps % KEPT)
    row = torch.stack([steps, counts[SKIPPED] + bad, in_a_row, stopped, place])
    counts.copy_(torch.where(had_stopped, counts, row))
    skipped = bad | had_stopped
    state.found_inf.copy_(skipped)
    buffers.copy_(torch.where(skipped, saved, buffers))
    return norm


def check_gradients(
    norms: Tensor, buffers: Tensor, saved: Tensor, state: StepState, ring: Tensor, limit: int
) -> Tensor:
    """The norm of the whole gradient, from those of its parts, norms [p]. A bad one has consequences, in place.

    If the norm is not finite, or `add_to_sums` has marked the step, it is counted as skipped, `found_inf` becomes 1,
    else 0, and buffers [b] become `saved` [b]. The step's row in `ring` becomes `norms`.
    """
    if norms.is_cuda:
        from .gpu.step_end import launch_check as compute
    else:
        compute = check_gradients_reference
    return compute(norms, buffers, saved, state, ring, limit)
