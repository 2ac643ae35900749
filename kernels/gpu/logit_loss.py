"""The kernel of logit_loss.py: one program takes rows; a row of all heads sits in registers where it fits."""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reduce import power_of_2, programs, ticket, total


@triton.jit
def _load(head, stride, row, cols, C, UNIT: tl.constexpr):
    return tl.load(head + row * (stride * UNIT) + cols, mask=cols < C, other=-float("inf")).to(tl.float32)


@triton.jit
def _load_all(heads, strides, row, cols, C, UNIT: tl.constexpr):
    rows = ()
    for i in tl.static_range(len(heads)):
        rows = rows + (_load(heads[i], strides[i], row, cols, C, UNIT),)
    return rows


@triton.jit
def _z_score_statistics(count, mean, squares, temperature):
    """(1 / (T (std + eps)), the factor of the gradient's way back through the standard deviation)"""
    degrees = tl.maximum(count - 1, 1)
    std = tl.sqrt(squares / degrees)
    scale = 1 / (std + 1e-7)
    return scale / temperature, tl.where(std > 0, scale * scale / (degrees * std), 0.0)


@triton.jit
def _statistics(z, temperature, STANDARDIZE: tl.constexpr, COLD: tl.constexpr):
    """(max, 1 / temperature, sum of exp at this temperature and at 1, mean, factor) of a row in registers."""
    top, mean, back = tl.max(z, 0), 0.0, 0.0
    inverse = 1.0 if COLD else 1 / temperature
    if STANDARDIZE:
        finite = z != -float("inf")
        count = tl.sum(finite.to(tl.float32), 0)
        mean = tl.sum(tl.where(finite, z, 0.0), 0) / count
        off = tl.where(finite, z - mean, 0.0)
        inverse, back = _z_score_statistics(count, mean, tl.sum(off * off, 0), temperature)
    at_t = tl.sum(tl.exp((z - top) * inverse), 0)
    at_1 = at_t if COLD else tl.sum(tl.exp(z - top), 0)
    return top, inverse, at_t, at_1, mean, back


@triton.jit
def _statistics_of_long_row(
    head, stride, row, C, temperature, STANDARDIZE: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr
):
    """The same of a row that is read in pieces; the sums are rescaled whenever the maximum moves."""
    mean, back, inverse = 0.0, 0.0, 1 / temperature
    if STANDARDIZE:
        count, squares = 0.0, 0.0
        cols = tl.arange(0, BLOCK)
        while tl.min(cols) < C:
            z = _load(head, stride, row, cols, C, UNIT)
            finite = z != -float("inf")
            count += tl.sum(finite.to(tl.float32), 0)
            mean += tl.sum(tl.where(finite, z, 0.0), 0)
            cols += BLOCK
        mean = mean / count
        cols = tl.arange(0, BLOCK)
        while tl.min(cols) < C:
            z = _load(head, stride, row, cols, C, UNIT)
            off = tl.where(z != -float("inf"), z - mean, 0.0)
            squares += tl.sum(off * off, 0)
            cols += BLOCK
        inverse, back = _z_score_statistics(count, mean, squares, temperature)
    top, at_t, at_1 = -float("inf"), 0.0, 0.0
    cols = tl.arange(0, BLOCK)
    while tl.min(cols) < C:
        z = _load(head, stride, row, cols, C, UNIT)
        new = tl.maximum(top, tl.max(z, 0))
        new_top = tl.where(new == -float("inf"), 0.0, new)  # nothing but -inf so far: -inf - -inf is no number
        at_t = at_t * tl.exp((top - new_top) * inverse) + tl.sum(tl.exp((z - new_top) * inverse), 0)
        at_1 = at_1 * tl.exp(top - new_top) + tl.sum(tl.exp(z - new_top), 0)
        top = new
        cols += BLOCK
    return top, inverse, at_t, at_1, mean, back


@triton.jit
def _weight(weights, g_loss, g_terms, k: tl.constexpr):
    """The weight of term k, times its upstream gradient in the backward pass."""
    upstream = 1.0
    if g_loss is not None:
        upstream = tl.load(g_loss).to(tl.float32)
        if g_terms is not None:
            upstream += tl.load(g_terms + k).to(tl.float32)
    elif g_terms is not None:
        upstream = tl.load(g_terms + k).to(tl.float32)
    return weights[k] * upstream


@triton.jit
def _pull(i: tl.constexpr, zs, stats, weights, g_loss, g_terms, USED: tl.constexpr):
    """w_i p_i - sum_j W_ij p_j: the direction in which head i's teachers push it."""
    H: tl.constexpr = len(zs)
    p = tl.exp((zs[i] - stats[i][0]) * stats[i][1] - tl.log(stats[i][2]))
    pull = tl.zeros_like(p)
    for j in tl.static_range(H):
        if USED[i * (H + 1) + 1 + j]:
            q = tl.exp((zs[j] - stats[j][0]) * stats[j][1] - tl.log(stats[j][2]))
            pull += _weight(weights, g_loss, g_terms, i * (H + 1) + 1 + j) * (p - q)
    return pull


@triton.jit
def _gradients(
    zs, stats, labels_sum, y, row, cols, C, grads, weights, g_loss, g_terms, ce_scale, kl_scale, dots, temperature,
    USED: tl.constexpr, LEARNER: tl.constexpr, STANDARDIZE: tl.constexpr, N,
):  # fmt: skip
    """Write the gradient of every learning head at these classes."""
    H: tl.constexpr = len(zs)
    for i in tl.static_range(H):
        if LEARNER[i] >= 0:
            pull = _pull(i, zs, stats, weights, g_loss, g_terms, USED)
            if STANDARDIZE:
                top, inverse, at_t, at_1, mean, back = stats[i]
                off = tl.where(zs[i] == -float("inf"), 0.0, zs[i] - mean)
                pull = pull * inverse * temperature - back * dots[i] * off
            gradient = kl_scale * temperature * pull
            if USED[i * (H + 1)]:
                p = tl.exp(zs[i] - stats[i][0] - tl.log(stats[i][3]))
                ce_weight = ce_scale * _weight(weights, g_loss, g_terms, i * (H + 1))
                gradient += ce_weight * (p * labels_sum - y)
            place = grads + (row + LEARNER[i] * N.to(tl.int64)) * C + cols
            tl.store(place, gradient, mask=cols < C)


@triton.jit
def _dots(zs, stats, dots, weights, g_loss, g_terms, USED: tl.constexpr, LEARNER: tl.constexpr):
    """dots += sum over classes of pull x (z - mean), which the gradient through the standard deviation needs."""
    result = ()
    for i in tl.static_range(len(zs)):
        dot = dots[i]
        if LEARNER[i] >= 0:
            off = tl.where(zs[i] == -float("inf"), 0.0, zs[i] - stats[i][4])
            dot += tl.sum(_pull(i, zs, stats, weights, g_loss, g_terms, USED) * off, 0)
        result = result + (dot,)
    return result


@triton.jit
def _terms(zs, stats, y, label, label_logits, cols, sums, slot, ignored,
           USED: tl.constexpr, HITS: tl.constexpr):  # fmt: skip
    """sums [SLOTS] += this row's unweighted terms: per head CE and KL with every teacher, then ranks of the label."""
    H: tl.constexpr = len(zs)
    for i in tl.static_range(H):
        log_p = (zs[i] - stats[i][0]) * stats[i][1] - tl.log(stats[i][2])
        if USED[i * (H + 1)]:
            log_p1 = zs[i] - stats[i][0] - tl.log(stats[i][3])
            ce = -tl.sum(tl.where(y == 0, 0.0, y * log_p1), 0)
            sums += tl.where((slot == i * (H + 1)) & ~ignored, ce, 0.0)
        for j in tl.static_range(H):
            if USED[i * (H + 1) + 1 + j]:
                log_q = (zs[j] - stats[j][0]) * stats[j][1] - tl.log(stats[j][2])
                q = tl.exp(log_q)
                kl = tl.sum(tl.where(q == 0, 0.0, q * (log_q - log_p)), 0)
                sums += tl.where(slot == i * (H + 1) + 1 + j, kl, 0.0)
        if HITS:  # how many classes come before the label's; NaN counts as before
            after = (zs[i] < label_logits[i]) | ((zs[i] == label_logits[i]) & (cols >= label))
            rank = tl.sum(tl.where(after, 0.0, 1.0), 0)
            sums += tl.where((slot == H * (H + 1) + i) | (slot == H * (H + 2) + i), rank, 0.0)
    return sums


@triton.jit
def _label(heads, strides, target, row, C, ignore_index, SOFT: tl.constexpr, IGNORE: tl.constexpr,
           HITS: tl.constexpr, UNIT: tl.constexpr):  # fmt: skip
    """(label or -1, is it a class, is the row ignored, every head's logit of the label); of an integer target"""
    label, known, ignored = tl.full([], -1, tl.int32), tl.full([], 1, tl.int1), tl.full([], 0, tl.int1)
    logits = ()
    if not SOFT:
        given = tl.load(target + row)
        if IGNORE:
            ignored = given == ignore_index
        known = (given >= 0) & (given < C)
        label = tl.where(known, given, -1).to(tl.int32)  # int64 would double the registers of every comparison
        if HITS:
            for i in tl.static_range(len(heads)):
                place = heads[i] + row * (strides[i] * UNIT) + label
                logits = logits + (tl.load(place, mask=known, other=float("nan")).to(tl.float32),)
    return label, known | ignored, ignored, logits


@triton.jit
def _distribution(target, target_stride, row, cols, C, label, known, smoothing,
                  SOFT: tl.constexpr, SMOOTH: tl.constexpr):  # fmt: skip
    """The labels' distribution over these classes; NaN for a label that is no class, so that it shows."""
    if SOFT:
        y = tl.load(target + row * target_stride + cols, mask=cols < C, other=0.0).to(tl.float32)
    else:
        y = tl.where(known, (cols == label).to(tl.float32), float("nan"))
    if SMOOTH:
        y = (1 - smoothing) * y + smoothing / C
    return tl.where(cols < C, y, 0.0)


@triton.jit(do_not_specialize=["N"])
def _kernel(
    heads, strides, grads, target, target_stride, weights, kept, g_loss, g_terms,
    partials, ticket, loss, terms, hits, N, c_units, temperature, smoothing, ignore_index,
    USED: tl.constexpr, LEARNER: tl.constexpr, SOFT: tl.constexpr, SMOOTH: tl.constexpr, IGNORE: tl.constexpr,
    COLD: tl.constexpr, STANDARDIZE: tl.constexpr, FORWARD: tl.constexpr, HITS: tl.constexpr, SKIP_ONES: tl.constexpr,
    ONE_PASS: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    H: tl.constexpr = len(heads)
    C = c_units * UNIT
    slot = tl.arange(0, SLOTS)
    sums = tl.zeros([SLOTS], tl.float32)
    ce_scale, kl_scale = 1.0 / N, 1.0 / N
    if kept is not None:
        ce_scale = 1.0 / tl.maximum(tl.load(kept), 1).to(tl.float32)
    row = tl.program_id(0).to(tl.int64)
    if SKIP_ONES:  # the forward pass has left the gradients for upstream gradients of 1
        changed = 0
        for k in tl.static_range(H * (H + 1)):
            if USED[k]:
                changed |= (_weight(weights, g_loss, g_terms, k) != weights[k]).to(tl.int32)
        row = tl.where(changed == 1, row, N)
    while row < N:
        cols = tl.arange(0, BLOCK)
        stats = ()
        if ONE_PASS:
            zs = _load_all(heads, strides, row, cols, C, UNIT)
            for i in tl.static_range(H):
                stats = stats + (_statistics(zs[i], temperature, STANDARDIZE, COLD),)
        else:
            for i in tl.static_range(H):
                stats = stats + (
                    _statistics_of_long_row(heads[i], strides[i], row, C, temperature, STANDARDIZE, UNIT, BLOCK),
                )
        label, known, ignored, label_logits = _label(
            heads, strides, target, row, C, ignore_index, SOFT, IGNORE, HITS, UNIT
        )
        row_ce_scale = tl.where(ignored, 0.0, ce_scale)
        row_sums = tl.zeros([SLOTS], tl.float32)
        dots = (0.0,) * H
        if ONE_PASS:
            y = _distribution(target, target_stride, row, cols, C, label, known, smoothing, SOFT, SMOOTH)
            mass = tl.sum(y, 0) if SOFT else 1.0
            if STANDARDIZE:
                dots = _dots(zs, stats, dots, weights, g_loss, g_terms, USED, LEARNER)
            if FORWARD:
                row_sums = _terms(zs, stats, y, label, label_logits, cols, row_sums, slot, ignored, USED, HITS)
            _gradients(zs, stats, mass, y, row, cols, C, grads, weights, g_loss, g_terms, row_ce_scale,
                       kl_scale, dots, temperature, USED, LEARNER, STANDARDIZE, N)  # fmt: skip
        else:
            mass = 1.0
            if SOFT:
                mass = 0.0
                while tl.min(cols) < C:
                    y = _distribution(target, target_stride, row, cols, C, label, known, smoothing, SOFT, SMOOTH)
                    mass += tl.sum(y, 0)
                    cols += BLOCK
            if STANDARDIZE:
                cols = tl.arange(0, BLOCK)
                while tl.min(cols) < C:
                    zs = _load_all(heads, strides, row, cols, C, UNIT)
                    dots = _dots(zs, stats, dots, weights, g_loss, g_terms, USED, LEARNER)
                    cols += BLOCK
            cols = tl.arange(0, BLOCK)
            while tl.min(cols) < C:
                zs = _load_all(heads, strides, row, cols, C, UNIT)
                y = _distribution(target, target_stride, row, cols, C, label, known, smoothing, SOFT, SMOOTH)
                if FORWARD:
                    row_sums = _terms(zs, stats, y, label, label_logits, cols, row_sums, slot, ignored, USED, HITS)
                _gradients(zs, stats, mass, y, row, cols, C, grads, weights, g_loss, g_terms, row_ce_scale,
                           kl_scale, dots, temperature, USED, LEARNER, STANDARDIZE, N)  # fmt: skip
                cols += BLOCK
        is_top5 = slot >= H * (H + 2)
        hit = (row_sums < tl.where(is_top5, 5.0, 1.0)).to(tl.float32)
        sums += tl.where(slot < H * (H + 1), row_sums, hit)
        row += tl.num_programs(0)
    if FORWARD:
        last, everything = total(sums, partials, ticket, SLOTS, ROWS)
        if last:
            weighted = tl.zeros([SLOTS], tl.float32)
            scale = tl.where(slot % (H + 1) == 0, ce_scale, kl_scale * temperature * temperature)
            for k in tl.static_range(H * (H + 1)):
                if USED[k]:
                    weighted = tl.where(slot == k, everything * (scale * weights[k]), weighted)
            tl.store(terms + slot, weighted, mask=slot < H * (H + 1))
            tl.store(loss, tl.sum(weighted, 0))
            if HITS:
                tl.store(hits + slot - H * (H + 1), everything, mask=(slot >= H * (H + 1)) & (slot < H * (H + 3)))


def _shape(classes: int, heads: int, learners: int, itemsize: int) -> tuple[int, int, int]:
    """(classes read at once, warps, registers a thread may have): no spills, as bench/aot.py counts them.

    8 classes a thread make 128-bit accesses in 16 bits; more heads leave room for fewer.
    """
    each = power_of_2(96 // ((heads + learners) * itemsize) + 1) // 2
    block, most = max(16, power_of_2(classes)), 16 if learners == 1 else 8
    if block > each * 32 * most:  # in pieces
        block, warps = min(each, 8) * 256, 8
    else:
        warps = min(max(1, block // (32 * min(each, 8))), most)
    light = heads + learners <= 3 and classes <= block <= 256 * warps  # 96 registers: five blocks of 4 warps at once
    return block, warps, 96 if light else min(255, 2048 // warps)


def launch(
    heads: list[Tensor],
    target: Tensor,
    weights: list[float],
    temperature: float,
    smoothing: float,
    ignore_index: int | None,
    standardize: bool,
    learns: list[bool],
    count_hits: bool,
    grads: Tensor,
    upstream: tuple[Tensor | None, Tensor | None] | None = None,
    skip_ones: bool = False,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Run the kernel: `grads` [learners, N, C] is written; forward (no `upstream`) gives (loss, terms, hits)."""
    (N, C), H, device = heads[0].shape, len(heads), heads[0].device
    soft = target.is_floating_point()
    heads = [head if head.stride(1) == 1 else head.contiguous() for head in heads]
    target = target if target.stride(-1) == 1 else target.contiguous()
    unit = 8 if C % 8 == 0 and all(head.stride(0) % 8 == 0 for head in heads) else 1
    block, warps, registers = _shape(C, H, sum(learns), max(head.element_size() for head in heads))
    slots, forward = power_of_2(H * (H + 3)), upstream is None
    grid = programs(N, warps, device)
    g_loss, g_terms = upstream or (None, None)
    g_terms = None if g_terms is None else g_terms.contiguous()  # of terms.sum() it is expanded
    kept = None if ignore_index is None else (target != ignore_index).sum()
    loss, terms, hits, partials = (
        torch.empty(shape, dtype=torch.float32, device=device) if forward else None
        for shape in ((), (H, H + 1), (2, H), (grid, slots))
    )
    order = iter(range(H))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        _kernel[(grid,)](
            tuple(heads), tuple(head.stride(0) // unit for head in heads), grads, target,
            target.stride(0) if soft else 1, tuple(weights), kept, g_loss, g_terms,
            partials, ticket(device) if forward else None, loss, terms, hits,
            N, C // unit, temperature, smoothing, ignore_index or 0,
            USED=tuple(weight != 0 for weight in weights),
            LEARNER=tuple(next(order) if learner else -1 for learner in learns),
            SOFT=soft, SMOOTH=smoothing > 0, IGNORE=ignore_index is not None, STANDARDIZE=standardize,
            COLD=temperature == 1 and not standardize,  # one softmax serves labels and teachers
            FORWARD=forward, HITS=count_hits and not soft, SKIP_ONES=skip_ones, ONE_PASS=block >= C, UNIT=unit,
            BLOCK=block, SLOTS=slots, ROWS=max(1, 256 * warps // slots), enable_fp_fusion=True, num_warps=warps,
            maxnreg=registers,
        )  # fmt: skip
    return (loss, terms, hits) if forward else None
