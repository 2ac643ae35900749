"""The kernel of logit_loss.py: one program takes rows. A row of all heads is kept in registers if it fits."""

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..logit_loss import Inputs
from ..op import Tensors
from .host import common_unit, contiguous_rows, most_registers, power_of_2, programs
from .logit_terms import (
    add_dots,
    add_terms,
    load_heads,
    long_row_statistics,
    row_label,
    row_statistics,
    target_distribution,
    term_weight,
    weighted_terms,
    write_gradients,
)
from .reduce import ticket, total


@triton.jit
def _row_in_registers(
    heads, strides, grads, target, target_stride, class_weights, weights, grad_loss, grad_terms, row, label, known,
    ignored, ce_scale, kl_scale, N, C, temperature, smoothing,
    USED: tl.constexpr, LEARNER: tl.constexpr, SOFT: tl.constexpr, SMOOTH: tl.constexpr, COLD: tl.constexpr,
    STANDARDIZE: tl.constexpr, MASK_KD: tl.constexpr, FORWARD: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
):  # fmt: skip
    """The terms [SLOTS] of a row that is read once; its gradients are written."""
    H: tl.constexpr = len(heads)
    cols = tl.arange(0, BLOCK)
    zs = load_heads(heads, strides, row, cols, C, UNIT)
    stats = ()
    for i in tl.static_range(H):
        stats = stats + (row_statistics(zs[i], temperature, STANDARDIZE, COLD),)
    y = target_distribution(target, target_stride, class_weights, row, cols, C, label, known, smoothing, SOFT, SMOOTH)
    labels_sum = tl.sum(y, 0) if SOFT or class_weights is not None else 1.0
    dots = (0.0,) * H
    if STANDARDIZE:
        dots = add_dots(zs, stats, dots, weights, grad_loss, grad_terms, USED, LEARNER)
    sums = tl.zeros([SLOTS], tl.float32)
    if FORWARD:
        sums = add_terms(zs, stats, y, sums, tl.arange(0, SLOTS), ignored, USED, MASK_KD)
    write_gradients(zs, stats, labels_sum, y, row, cols, C, grads, weights, grad_loss, grad_terms, ce_scale, kl_scale,
                    dots, temperature, USED, LEARNER, STANDARDIZE, N, ignored, MASK_KD)  # fmt: skip
    return sums


@triton.jit
def _row_in_pieces(
    heads, strides, grads, target, target_stride, class_weights, weights, grad_loss, grad_terms, row, label, known,
    ignored, ce_scale, kl_scale, N, C, temperature, smoothing,
    USED: tl.constexpr, LEARNER: tl.constexpr, SOFT: tl.constexpr, SMOOTH: tl.constexpr, STANDARDIZE: tl.constexpr,
    MASK_KD: tl.constexpr, FORWARD: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """The same for a long row: one sweep for the statistics, at most two for what needs sums, one for the rest."""
    H: tl.constexpr = len(heads)
    stats = ()
    for i in tl.static_range(H):
        stats = stats + (long_row_statistics(heads[i], strides[i], row, C, temperature, STANDARDIZE, UNIT, BLOCK),)
    labels_sum = 1.0
    if SOFT or class_weights is not None:
        labels_sum = 0.0
        cols = tl.arange(0, BLOCK)
        while tl.min(cols) < C:
            y = target_distribution(
                target, target_stride, class_weights, row, cols, C, label, known, smoothing, SOFT, SMOOTH
            )
            labels_sum += tl.sum(y, 0)
            cols += BLOCK
    dots = (0.0,) * H
    if STANDARDIZE:
        cols = tl.arange(0, BLOCK)
        while tl.min(cols) < C:
            zs = load_heads(heads, strides, row, cols, C, UNIT)
            dots = add_dots(zs, stats, dots, weights, grad_loss, grad_terms, USED, LEARNER)
            cols += BLOCK
    sums = tl.zeros([SLOTS], tl.float32)
    cols = tl.arange(0, BLOCK)
    while tl.min(cols) < C:
        zs = load_heads(heads, strides, row, cols, C, UNIT)
        y = target_distribution(
            target, target_stride, class_weights, row, cols, C, label, known, smoothing, SOFT, SMOOTH
        )
        if FORWARD:
            sums = add_terms(zs, stats, y, sums, tl.arange(0, SLOTS), ignored, USED, MASK_KD)
        write_gradients(zs, stats, labels_sum, y, row, cols, C, grads, weights, grad_loss, grad_terms, ce_scale,
                        kl_scale, dots, temperature, USED, LEARNER, STANDARDIZE, N, ignored, MASK_KD)  # fmt: skip
        cols += BLOCK
    return sums


@triton.jit(do_not_specialize=["N"])
def _kernel(
    heads, strides, grads, target, target_stride, class_weights, weights, kept, weight_sum, grad_loss, grad_stride,
    grad_terms, partials, ticket, loss, terms, N, c_units, temperature, smoothing, ignore_index,
    USED: tl.constexpr, LEARNER: tl.constexpr, SOFT: tl.constexpr, SMOOTH: tl.constexpr, IGNORE: tl.constexpr,
    COLD: tl.constexpr, STANDARDIZE: tl.constexpr, MASK_KD: tl.constexpr, MEAN: tl.constexpr, PER_ROW: tl.constexpr,
    FORWARD: tl.constexpr, SKIP_ONES: tl.constexpr, ONE_PASS: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
    SLOTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    H: tl.constexpr = len(heads)
    C = c_units * UNIT
    sums = tl.zeros([SLOTS], tl.float32)
    ce_scale, kl_scale = 1.0, 1.0
    if MEAN:
        ce_scale, kl_scale = 1.0 / N, 1.0 / N
        if kept is not None:
            ce_scale = 1.0 / tl.maximum(tl.load(kept), 1).to(tl.float32)
            if MASK_KD:
                kl_scale = ce_scale
        if weight_sum is not None:
            divisor = tl.load(weight_sum).to(tl.float32)
            ce_scale = tl.where(divisor > 0, 1.0 / divisor, 0.0)
    row = tl.program_id(0).to(tl.int64)
    if SKIP_ONES:  # the forward pass has left the gradients for a grad_output of 1
        changed = 0
        for k in tl.static_range(len(weights)):
            if USED[k]:
                changed |= (term_weight(weights, grad_loss, grad_terms, k) != weights[k]).to(tl.int32)
        row = tl.where(changed == 0, N, row)
    while row < N:
        label, known, ignored = row_label(target, row, C, ignore_index, SOFT, IGNORE)
        row_ce_scale = tl.where(ignored, 0.0, ce_scale)
        row_grad_loss, row_grad_terms = grad_loss, grad_terms
        if PER_ROW and grad_loss is not None:
            row_grad_loss = grad_loss + row * grad_stride
        if PER_ROW and grad_terms is not None:
            row_grad_terms = grad_terms + row * (H * (H + 1))
        if ONE_PASS:
            row_sums = _row_in_registers(
                heads, strides, grads, target, target_stride, class_weights, weights, row_grad_loss, row_grad_terms,
                row, label, known, ignored, row_ce_scale, kl_scale, N, C, temperature, smoothing, USED, LEARNER, SOFT,
                SMOOTH, COLD, STANDARDIZE, MASK_KD, FORWARD, UNIT, BLOCK, SLOTS)  # fmt: skip
        else:
            row_sums = _row_in_pieces(
                heads, strides, grads, target, target_stride, class_weights, weights, row_grad_loss, row_grad_terms,
                row, label, known, ignored, row_ce_scale, kl_scale, N, C, temperature, smoothing, USED, LEARNER, SOFT,
                SMOOTH, STANDARDIZE, MASK_KD, FORWARD, UNIT, BLOCK, SLOTS)  # fmt: skip
        if PER_ROW and FORWARD:
            slot = tl.arange(0, SLOTS)
            weighted = weighted_terms(row_sums, slot, weights, 1.0, temperature * temperature, H, USED, SLOTS)
            tl.store(terms + row * (H * (H + 1)) + slot, weighted, mask=slot < H * (H + 1))
            tl.store(loss + row, tl.sum(weighted, 0))
        sums += row_sums
        row += tl.num_programs(0)
    if FORWARD and not PER_ROW:
        last, everything = total(sums, partials, ticket, SLOTS, ROWS)
        if last:
            slot = tl.arange(0, SLOTS)
            kl_factor = kl_scale * temperature * temperature
            weighted = weighted_terms(everything, slot, weights, ce_scale, kl_factor, H, USED, SLOTS)
            tl.store(terms + slot, weighted, mask=slot < H * (H + 1))
            tl.store(loss, tl.sum(weighted, 0))


def _shape(classes: int, heads: int, learners: int, itemsize: int) -> tuple[int, int, int]:
    """(classes read at once, warps, registers a thread may have). Chosen with bench/scripts/aot.py for no spills.

    8 classes a thread make 128-bit accesses in 16 bits; more heads leave room for fewer.
    """
    each = power_of_2(96 // ((heads + learners) * itemsize) + 1) // 2
    block, most = max(16, power_of_2(classes)), 16 if learners == 1 else 8
    if block > each * 32 * most:  # in pieces
        block, warps = min(each, 8) * 256, 8
    else:
        warps = min(max(1, block // (32 * min(each, 8))), most)
    light = heads + learners <= 3 and classes <= block <= 256 * warps  # 96 registers: five blocks of 4 warps at once
    return block, warps, 96 if light else most_registers(warps)


class _Plan(NamedTuple):
    """What a launch needs besides tensors and numbers that change; `constants` are the kernel's, by name."""

    grid: tuple[int]
    unit: int
    partials: tuple[int, int]
    constants: dict[str, Any]


@functools.lru_cache(256)
def _plan(
    shape: tuple[int, int], strides: tuple[int, ...], itemsize: int, device: torch.device, used: tuple[bool, ...],
    needs_grad: tuple[bool, ...], soft: bool, smooth: bool, ignore: bool, cold: bool, standardize: bool, mask_kd: bool,
    reduction: str, forward: bool, written: bool,
) -> _Plan:  # fmt: skip
    """Worked out once for calls that are alike: on the host it takes as long as the launch."""
    (N, C), H = shape, len(strides)
    block, warps, registers = _shape(C, H, sum(needs_grad), itemsize)
    slots, grid, order = power_of_2(H * (H + 1)), programs(N, warps, device), iter(range(H))
    unit = common_unit(C, *strides)
    constants = {
        "USED": used, "LEARNER": tuple(next(order) if learner else -1 for learner in needs_grad),
        "SOFT": soft, "SMOOTH": smooth, "IGNORE": ignore, "STANDARDIZE": standardize, "COLD": cold, "MASK_KD": mask_kd,
        "MEAN": reduction == "mean", "PER_ROW": reduction == "none", "FORWARD": forward, "SKIP_ONES": written,
        "ONE_PASS": block >= C, "UNIT": unit, "BLOCK": block, "SLOTS": slots, "ROWS": max(1, 256 * warps // slots),
        "enable_fp_fusion": True, "num_warps": warps, "maxnreg": registers,
    }  # fmt: skip
    return _Plan((grid,), unit, (grid, slots), constants)


def launch(inputs: Inputs, outputs: Tensors, grads: Tensor, grad_outputs: Tensors = (), written: bool = False) -> None:
    """Run the kernel; see FusedOp. If `written`, it writes nothing where all grad_outputs are 1."""
    (N, C), device, forward = inputs.heads[0].shape, inputs.heads[0].device, not grad_outputs
    temperature, ignore_index, standardize = inputs.temperature, inputs.ignore_index, inputs.standardize
    heads = tuple([contiguous_rows(head) for head in inputs.heads])
    target = None if inputs.target is None else contiguous_rows(inputs.target)
    class_weights = None if inputs.class_weights is None else inputs.class_weights.contiguous()
    soft, strides = target is not None and target.is_floating_point(), tuple([head.stride(0) for head in heads])
    plan = _plan(
        (N, C), strides, max([head.element_size() for head in heads]), device, tuple([w != 0 for w in inputs.weights]),
        tuple(inputs.needs_grad), soft, inputs.smoothing > 0, ignore_index is not None,
        temperature == 1 and not standardize,  # one softmax serves labels and teachers
        standardize, inputs.mask_kd, inputs.reduction, forward, written,
    )  # fmt: skip
    grad_loss, grad_terms = grad_outputs or (None, None)
    grad_terms = None if grad_terms is None else grad_terms.contiguous()  # that of terms.sum() is expanded
    grad_stride = grad_loss.stride(0) if grad_loss is not None and grad_loss.dim() else 0
    kept, weight_sum = _divisors(target, class_weights, ignore_index) if inputs.reduction == "mean" else (None, None)
    summed = forward and inputs.reduction != "none"
    partials = torch.empty(plan.partials, dtype=torch.float32, device=device) if summed else None
    _kernel[plan.grid](
        heads, tuple([stride // plan.unit for stride in strides]), grads, target,
        target.stride(0) if target is not None and soft else 1, class_weights, tuple(inputs.weights), kept, weight_sum,
        grad_loss, grad_stride, grad_terms, partials, ticket(device) if summed else None, *outputs,
        N, C // plan.unit, temperature, inputs.smoothing, ignore_index or 0, **plan.constants,
    )  # fmt: skip


def _divisors(
    target: Tensor | None, class_weights: Tensor | None, ignore_index: int | None
) -> tuple[Tensor | None, Tensor | None]:
    """(rows that are not ignored, the sum of their labels' class weights), where a mean is not over all rows.

    Two launches for the first, four or five for the second, all of [N] numbers.
    """
    if target is None or target.is_floating_point():
        return None, None
    kept = None if ignore_index is None else target != ignore_index
    count = None if kept is None else kept.sum()
    if class_weights is None:
        return count, None
    each = class_weights[target.clamp(0, len(class_weights) - 1)]  # a label that is no class makes its own row NaN
    return count, (each if kept is None else each.where(kept, 0)).sum(dtype=torch.float32)
