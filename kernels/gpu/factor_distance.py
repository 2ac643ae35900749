"""The kernels of factor_distance.py: one program takes samples. A sample is kept in registers if it fits."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..factor_distance import Inputs
from ..op import Tensors
from .host import common_unit, contiguous_rows, power_of_2, programs
from .reduce import ticket, total


@triton.jit
def _load_all(maps, strides, row, cols, D, UNIT: tl.constexpr):
    values = ()
    for k in tl.static_range(len(maps)):
        place = maps[k] + row * (strides[k] * UNIT) + cols
        values = values + (tl.load(place, mask=cols < D, other=0.0).to(tl.float32),)
    return values


@triton.jit
def _add_squares(values, squares):
    result = ()
    for k in tl.static_range(len(values)):
        result = result + (squares[k] + values[k] * values[k],)
    return result


@triton.jit
def _norms(squares):
    norms = ()
    for k in tl.static_range(len(squares)):
        norms = norms + (tl.sqrt(tl.sum(squares[k], 0)),)
    return norms


@triton.jit
def _inverse(norm):
    return 1 / tl.where(norm < 1e-12, 1e-12, norm)  # tl.maximum would lose a NaN


@triton.jit
def _direction(difference, P: tl.constexpr):
    """The derivative of |d|^p / p. The sign of 0 is 0 and the sign of NaN is NaN."""
    if P == 1:
        difference = tl.where(difference > 0, 1.0, tl.where(difference < 0, -1.0, difference))
    return difference


@triton.jit
def _add_distances(values, norms, sums, dots, P: tl.constexpr):
    """(sums + |d|^p, dots + direction * x^) for every student factor, with d = x^ - t^."""
    K: tl.constexpr = len(values) - 1
    t = values[K] * _inverse(norms[K])
    new_sums = ()
    new_dots = ()
    for k in tl.static_range(K):
        x = values[k] * _inverse(norms[k])
        direction = _direction(x - t, P)
        new_sums = new_sums + (sums[k] + direction * (x - t),)
        new_dots = new_dots + (dots[k] + direction * x,)
    return new_sums, new_dots


@triton.jit
def _store_gradients(values, norms, dots, factors, grads, row, cols, N, D, LEARNER: tl.constexpr, P: tl.constexpr):
    """factor * (direction - x^ dot) / ||x||; 0 where the norm is clamped."""
    K: tl.constexpr = len(values) - 1
    t = values[K] * _inverse(norms[K])
    for k in tl.static_range(K):
        if LEARNER[k] >= 0:
            x = values[k] * _inverse(norms[k])
            scale = tl.where(norms[k] <= 1e-12, 0.0, factors[k] * _inverse(norms[k]))
            gradient = scale * (_direction(x - t, P) - x * dots[k])
            place = grads + (row + LEARNER[k] * N.to(tl.int64)) * D + cols
            tl.store(place, gradient, mask=cols < D)


@triton.jit
def _store_statistics(norms, distances, products, statistics, sums, row, N, SLOTS: tl.constexpr):
    """(sums [SLOTS] + distances of this sample, dots). Stored: the norms of all maps, then the dots."""
    K: tl.constexpr = len(norms) - 1
    dots = ()
    for k in tl.static_range(K):
        dots = dots + (tl.sum(products[k], 0),)
        sums += tl.where(tl.arange(0, SLOTS) == k, tl.sum(distances[k], 0), 0.0)
        tl.store(statistics + k * N.to(tl.int64) + row, norms[k])
        tl.store(statistics + (K + 1 + k) * N.to(tl.int64) + row, dots[k])
    tl.store(statistics + K * N.to(tl.int64) + row, norms[K])
    return sums, dots


@triton.jit
def _sample(
    maps, strides, grads, statistics, sums, factors, row, N, D, LEARNER: tl.constexpr, GRADIENTS: tl.constexpr,
    P: tl.constexpr, ONE_PASS: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """sums [SLOTS] + the distances of a sample. Three sweeps: norms, distances, gradients (p = 1 only)."""
    K: tl.constexpr = len(maps) - 1
    cols = tl.arange(0, BLOCK)
    zeros = tl.zeros([BLOCK], tl.float32)
    squares = (zeros,) * (K + 1)
    distances, products = (zeros,) * K, (zeros,) * K
    if ONE_PASS:
        values = _load_all(maps, strides, row, cols, D, UNIT)
        norms = _norms(_add_squares(values, squares))
        distances, products = _add_distances(values, norms, distances, products, P)
    else:
        while tl.min(cols) < D:
            squares = _add_squares(_load_all(maps, strides, row, cols, D, UNIT), squares)
            cols += BLOCK
        norms = _norms(squares)
        cols = tl.arange(0, BLOCK)
        while tl.min(cols) < D:
            values = _load_all(maps, strides, row, cols, D, UNIT)
            distances, products = _add_distances(values, norms, distances, products, P)
            cols += BLOCK
    sums, dots = _store_statistics(norms, distances, products, statistics, sums, row, N, SLOTS)
    if GRADIENTS:
        if ONE_PASS:
            _store_gradients(values, norms, dots, factors, grads, row, cols, N, D, LEARNER, P)
        else:
            cols = tl.arange(0, BLOCK)
            while tl.min(cols) < D:
                values = _load_all(maps, strides, row, cols, D, UNIT)
                _store_gradients(values, norms, dots, factors, grads, row, cols, N, D, LEARNER, P)
                cols += BLOCK
    return sums


@triton.jit(do_not_specialize=["N"])
def _kernel(
    maps, strides, grads, weights, statistics, partials, ticket, loss, terms, N, d_units, inverse_elements,
    LEARNER: tl.constexpr, GRADIENTS: tl.constexpr, P: tl.constexpr, ONE_PASS: tl.constexpr, UNIT: tl.constexpr,
    BLOCK: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """maps: the student factors, then the teacher's."""
    K: tl.constexpr = len(maps) - 1
    D = d_units * UNIT
    slot = tl.arange(0, SLOTS)
    sums = tl.zeros([SLOTS], tl.float32)
    factors = ()
    for k in tl.static_range(K):
        factors = factors + (weights[k] * inverse_elements,)
    row = tl.program_id(0).to(tl.int64)
    while row < N:
        sums = _sample(maps, strides, grads, statistics, sums, factors, row, N, D, LEARNER, GRADIENTS, P, ONE_PASS,
                       UNIT, BLOCK, SLOTS)  # fmt: skip
        row += tl.num_programs(0)
    last, everything = total(sums, partials, ticket, SLOTS, ROWS)
    if last:
        distance = everything * inverse_elements
        if P == 2:
            distance = tl.sqrt(distance)
        weighted = tl.zeros([SLOTS], tl.float32)
        for k in tl.static_range(K):
            weighted = tl.where((slot == k) & (weights[k] != 0), distance * weights[k], weighted)
        tl.store(terms + slot, weighted, mask=slot < K)
        tl.store(loss, tl.sum(weighted, 0))


@triton.jit
def _backward_factors(
    weights, terms, grad_loss, grad_terms, inverse_elements, LEARNER: tl.constexpr, P: tl.constexpr
):  # fmt: skip
    """(the factor of every gradient, 1 if a grad_output is not 1)"""
    factors = ()
    changed = 0
    for k in tl.static_range(len(weights)):
        grad_output = tl.zeros([], tl.float32)
        if grad_loss is not None:
            grad_output += tl.load(grad_loss).to(tl.float32)
        if grad_terms is not None:
            grad_output += tl.load(grad_terms + k).to(tl.float32)
        factor = weights[k] * inverse_elements * grad_output
        if P == 2:  # over the distance, which is term / weight
            term = tl.load(terms + k)
            factor = tl.where(term == 0, 0.0, factor * weights[k] / term)
        factors = factors + (factor,)
        if LEARNER[k] >= 0:
            changed |= (grad_output != 1).to(tl.int32)
    return factors, changed


@triton.jit(do_not_specialize=["N"])
def _backward_kernel(
    maps, strides, grads, weights, statistics, terms, grad_loss, grad_terms, N, d_units, pieces, inverse_elements,
    LEARNER: tl.constexpr, SKIP_ONES: tl.constexpr, P: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program takes pieces of samples. The statistics hold what a gradient needs of the rest of its sample."""
    K: tl.constexpr = len(maps) - 1
    D = d_units * UNIT
    factors, changed = _backward_factors(weights, terms, grad_loss, grad_terms, inverse_elements, LEARNER, P)
    tiles = N.to(tl.int64) * pieces
    tile = tl.program_id(0).to(tl.int64)
    if SKIP_ONES:  # the forward pass has left the gradients for a grad_output of 1
        tile = tl.where(changed == 1, tile, tiles)
    while tile < tiles:
        row = tile // pieces
        cols = (tile % pieces).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
        norms = ()
        dots = ()
        for k in tl.static_range(K + 1):
            norms = norms + (tl.load(statistics + k * N.to(tl.int64) + row),)
        for k in tl.static_range(K):
            dots = dots + (tl.load(statistics + (K + 1 + k) * N.to(tl.int64) + row),)
        values = _load_all(maps, strides, row, cols, D, UNIT)
        _store_gradients(values, norms, dots, factors, grads, row, cols, N, D, LEARNER, P)
        tile += tl.num_programs(0)


def _shape(elements: int, maps: int) -> tuple[int, int]:
    """(elements read at once, warps) without spilled registers, as the ahead-of-time compiler counts them.

    8 elements a thread make 128-bit accesses in 16 bits; 16 a thread keep a sample of a pair in registers up to 8,192.
    """
    each = 16 if maps <= 3 else 8
    block = max(16, power_of_2(elements))
    if block > each * 32 * 16:  # in pieces
        return 8 * 32 * 16, 16
    return block, min(max(1, block // (32 * 8)), 16)


def launch(inputs: Inputs, outputs: Tensors, grads: Tensor, grad_outputs: Tensors = (), written: bool = False) -> None:
    """See FusedOp. If `written`, the backward pass writes nothing where all grad_outputs are 1.

    Only for p = 1 the forward pass writes grads, [factors that need one, N, D].
    """
    (factors, teacher, grads), (loss, terms, statistics) = inputs.rows(grads), outputs
    (N, D), K, device = teacher.shape, len(factors), teacher.device
    maps = tuple(contiguous_rows(x) for x in (*factors, teacher))
    unit, order = common_unit(D, *(x.stride(0) for x in maps)), iter(range(K))
    strides, weights = tuple(x.stride(0) // unit for x in maps), tuple(inputs.weights)
    learner = tuple(next(order) if on else -1 for on in inputs.needs_grad)  # the place of its gradient
    if grad_outputs:
        grad_loss, grad_terms = grad_outputs
        grad_terms = None if grad_terms is None else grad_terms.contiguous()
        block = min(2048, max(16, power_of_2(D)))
        pieces = math.ceil(D / block)
        _backward_kernel[(programs(N * pieces, 8, device),)](
            maps, strides, grads, weights, statistics, terms, grad_loss, grad_terms, N, D // unit, pieces,
            1 / (N * D), LEARNER=learner, SKIP_ONES=written, P=inputs.p, UNIT=unit, BLOCK=block, num_warps=8,
            enable_fp_fusion=False,
        )  # fmt: skip
        return
    block, warps = _shape(D, len(maps))
    slots, grid = max(2, power_of_2(K)), programs(N, warps, device)
    partials = torch.empty((grid, slots), dtype=torch.float32, device=device)
    _kernel[(grid,)](
        maps, strides, grads, weights, statistics, partials, ticket(device), loss, terms, N, D // unit, 1 / (N * D),
        LEARNER=learner, GRADIENTS=len(grads) > 0, P=inputs.p, ONE_PASS=block >= D, UNIT=unit,
        BLOCK=block, SLOTS=slots, ROWS=max(1, 256 * warps // slots),
        num_warps=warps, enable_fp_fusion=False,  # fused, x^ - t^ of equal factors is a rounding error with a sign
    )  # fmt: skip
