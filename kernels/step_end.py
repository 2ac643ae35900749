"""The bookkeeping at the end of a training step: two launches instead of about 25, most of them for one number.

    add_to_sums        sums += weight * (v_1, ..., v_n, 1), unless a v is not finite
    check_gradients    norm = sqrt(sum_i norms_i^2); if it is not finite: count += 1, found_inf = 1, buffers = saved

Shapes: v_i, norm, count, found_inf: scalars; sums [n + 1] fp64; norms [p], one for each parameter; buffers, saved [b].
Bytes: those of the scalars. `buffers` is touched only if a step is bad. Nothing waits for the device. On the CPU
torch's operations do the same; they are the specification.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def add_to_sums_reference(sums: Tensor, values: Sequence[Tensor], weight: int) -> None:
    """The specification: one operation after another."""
    row = torch.stack([*(value.double() for value in values)])
    row = torch.cat([row, row.new_ones(1)])
    sums += torch.where(row.isfinite().all(), row * weight, 0.0)


def add_to_sums(sums: Tensor, values: Sequence[Tensor], weight: int) -> None:
    """Add weight * (values, 1) to sums [n + 1] fp64 in place, if all values are finite. values: n scalars."""
    if sums.is_cuda:
        from .gpu.step_end import launch_sums as compute
    else:
        compute = add_to_sums_reference
    compute(sums, values, weight)


def check_gradients_reference(
    norms: Tensor, buffers: Tensor, saved: Tensor, count: Tensor, found_inf: Tensor
) -> Tensor:
    """The specification: one operation after another."""
    norm = torch.linalg.vector_norm(norms)
    bad = ~norm.isfinite()
    count += bad
    found_inf.copy_(bad)
    buffers.copy_(torch.where(bad, saved, buffers))
    return norm


def check_gradients(norms: Tensor, buffers: Tensor, saved: Tensor, count: Tensor, found_inf: Tensor) -> Tensor:
    """The norm of the whole gradient, from those of its parts, norms [p]. A bad one has consequences, in place.

    If the norm is not finite, `count` grows by 1, `found_inf` becomes 1, else 0, and buffers [b] become `saved` [b].
    count, found_inf: fp32 scalars.
    """
    if norms.is_cuda:
        from .gpu.step_end import launch_check as compute
    else:
        compute = check_gradients_reference
    return compute(norms, buffers, saved, count, found_inf)
