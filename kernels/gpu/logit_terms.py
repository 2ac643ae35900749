"""The formulas of logit_loss.py in Triton, for the classes at hand of one row: statistics, terms, gradients.

`zs` holds the logits of every head, `stats` what row_statistics gives for each.
"""

import triton
import triton.language as tl


@triton.jit
def _load(head, stride, row, cols, C, UNIT: tl.constexpr):
    return tl.load(head + row * (stride * UNIT) + cols, mask=cols < C, other=-float("inf")).to(tl.float32)


@triton.jit
def load_heads(heads, strides, row, cols, C, UNIT: tl.constexpr):
    rows = ()
    for i in tl.static_range(len(heads)):
        rows = rows + (_load(heads[i], strides[i], row, cols, C, UNIT),)
    return rows


@triton.jit
def _z_score_statistics(count, mean, squares, temperature):
    """(1 / (T (std + eps)), factor of the gradient through the standard deviation)"""
    degrees = tl.maximum(count - 1, 1)
    std = tl.sqrt(squares / degrees)
    scale = 1 / (std + 1e-7)
    return scale / temperature, tl.where(std > 0, scale * scale / (degrees * std), 0.0)


@triton.jit
def row_statistics(z, temperature, STANDARDIZE: tl.constexpr, COLD: tl.constexpr):
    """(max, 1 / temperature, sum of exp at this temperature and at 1, mean, std factor) of a row in registers."""
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
def long_row_statistics(
    head, stride, row, C, temperature, STANDARDIZE: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr
):
    """The same for a row that is read in pieces. The sums are rescaled whenever the maximum grows."""
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
        new_top = tl.where(new == -float("inf"), 0.0, new)  # all -inf so far: -inf - -inf would be NaN
        at_t = at_t * tl.exp((top - new_top) * inverse) + tl.sum(tl.exp((z - new_top) * inverse), 0)
        at_1 = at_1 * tl.exp(top - new_top) + tl.sum(tl.exp(z - new_top), 0)
        top = new
        cols += BLOCK
    return top, inverse, at_t, at_1, mean, back


@triton.jit
def term_weight(weights, grad_loss, grad_terms, k: tl.constexpr):
    """The weight of term k, times its grad_output in the backward pass."""
    grad_output = 1.0
    if grad_loss is not None:
        grad_output = tl.load(grad_loss).to(tl.float32)
        if grad_terms is not None:
            grad_output += tl.load(grad_terms + k).to(tl.float32)
    elif grad_terms is not None:
        grad_output = tl.load(grad_terms + k).to(tl.float32)
    return weights[k] * grad_output


@triton.jit
def _pull(i: tl.constexpr, zs, stats, weights, grad_loss, grad_terms, USED: tl.constexpr):
    """w_i p_i - sum_j W_ij p_j: the gradient of head i's divergences, up to a scale."""
    H: tl.constexpr = len(zs)
    p = tl.exp((zs[i] - stats[i][0]) * stats[i][1] - tl.log(stats[i][2]))
    pull = tl.zeros_like(p)
    for j in tl.static_range(H):
        if USED[i * (H + 1) + 1 + j]:
            q = tl.exp((zs[j] - stats[j][0]) * stats[j][1] - tl.log(stats[j][2]))
            pull += term_weight(weights, grad_loss, grad_terms, i * (H + 1) + 1 + j) * (p - q)
    return pull


@triton.jit
def write_gradients(
    zs, stats, labels_sum, y, row, cols, C, grads, weights, grad_loss, grad_terms, ce_scale, kl_scale, dots,
    temperature, USED: tl.constexpr, LEARNER: tl.constexpr, STANDARDIZE: tl.constexpr, N, ignored,
    MASK_KD: tl.constexpr,
):  # fmt: skip
    """Write the gradient of every head that needs one, at these classes."""
    H: tl.constexpr = len(zs)
    for i in tl.static_range(H):
        if LEARNER[i] >= 0:
            pull = _pull(i, zs, stats, weights, grad_loss, grad_terms, USED)
            if STANDARDIZE:
                top, inverse, at_t, at_1, mean, back = stats[i]
                off = tl.where(zs[i] == -float("inf"), 0.0, zs[i] - mean)
                pull = pull * inverse * temperature - back * dots[i] * off
            gradient = kl_scale * temperature * pull
            if USED[i * (H + 1)]:
                p = tl.exp(zs[i] - stats[i][0] - tl.log(stats[i][3]))
                ce_weight = ce_scale * term_weight(weights, grad_loss, grad_terms, i * (H + 1))
                gradient += ce_weight * (p * labels_sum - y)
            if MASK_KD:
                gradient = tl.where(ignored, 0.0, gradient)
            place = grads + (row + LEARNER[i] * N.to(tl.int64)) * C + cols
            tl.store(place, gradient, mask=cols < C)


@triton.jit
def add_dots(zs, stats, dots, weights, grad_loss, grad_terms, USED: tl.constexpr, LEARNER: tl.constexpr):
    """dots += sum over classes of pull x (z - mean), for the gradient through the standard deviation."""
    result = ()
    for i in tl.static_range(len(zs)):
        dot = dots[i]
        if LEARNER[i] >= 0:
            off = tl.where(zs[i] == -float("inf"), 0.0, zs[i] - stats[i][4])
            dot += tl.sum(_pull(i, zs, stats, weights, grad_loss, grad_terms, USED) * off, 0)
        result = result + (dot,)
    return result


@triton.jit
def add_terms(zs, stats, y, sums, slot, ignored, USED: tl.constexpr, MASK_KD: tl.constexpr):
    """sums [SLOTS] += this row's unweighted terms: for each head the CE, then the KL with every teacher."""
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
                if MASK_KD:
                    kl = tl.where(ignored, 0.0, kl)
                sums += tl.where(slot == i * (H + 1) + 1 + j, kl, 0.0)
    return sums


@triton.jit
def weighted_terms(sums, slot, weights, ce_scale, kl_scale, H: tl.constexpr, USED: tl.constexpr, SLOTS: tl.constexpr):
    """[SLOTS]: the sums times the weights of their terms and their scale."""
    weighted = tl.zeros([SLOTS], tl.float32)
    scale = tl.where(slot % (H + 1) == 0, ce_scale, kl_scale)
    for k in tl.static_range(H * (H + 1)):
        if USED[k]:
            weighted = tl.where(slot == k, sums * (scale * weights[k]), weighted)
    return weighted


@triton.jit
def row_label(target, row, C, ignore_index, SOFT: tl.constexpr, IGNORE: tl.constexpr):
    """(label or -1, is it a class or ignored, is the row ignored) of an integer target."""
    label, known, ignored = tl.full([], -1, tl.int32), tl.full([], 1, tl.int1), tl.full([], 0, tl.int1)
    if target is not None and not SOFT:
        given = tl.load(target + row)
        if IGNORE:
            ignored = given == ignore_index
        known = (given >= 0) & (given < C)
        label = tl.where(known, given, -1).to(tl.int32)  # int64 would double the registers of every comparison
    return label, known | ignored, ignored


@triton.jit
def target_distribution(target, target_stride, class_weights, row, cols, C, label, known, smoothing,
                        SOFT: tl.constexpr, SMOOTH: tl.constexpr):  # fmt: skip
    """The target distribution over these classes, each times its weight. A label that is no class gives NaN."""
    if SOFT:
        y = tl.load(target + row * target_stride + cols, mask=cols < C, other=0.0).to(tl.float32)
    else:
        y = tl.where(known, (cols == label).to(tl.float32), float("nan"))
    if SMOOTH:
        y = (1 - smoothing) * y + smoothing / C
    if class_weights is not None:
        y *= tl.load(class_weights + cols, mask=cols < C, other=0.0).to(tl.float32)
    return tl.where(cols < C, y, 0.0)
