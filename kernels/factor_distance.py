"""Distances of a student's factors from the teacher's: IE-KD (CVPR 2021, arXiv:2107.00181) and FT (arXiv:1802.04977).

    distance(x, t) = ( sum |x^ - t^|^p / N_el )^(1/p),   x^ = flatten(x) / max(||flatten(x)||_2, 1e-12) per sample
    loss = sum_k w_k distance(x_k, t):   inheritance has a weight > 0, exploration one < 0; FT is one part alone
    d distance / dx = (g - x^ <x^, g>) / ||x||,   g = sign(x^ - t^) / N_el  or  (x^ - t^) / (N_el distance)  for p = 2

Shapes: every part and the teacher's factor [N, C, H, W], any floating dtype; D = C H W, N_el = N D, the elements of the
whole batch. Norms up to 1.8e19 fit. Only factors get a gradient. Maps are read as rows of D numbers in the layout of
the first part (channels-last or NCHW, batch of any stride); a map of another layout is copied first.
One launch forward reads the teacher once for all factors and for p = 1 leaves the gradients. Bytes for a pair in bf16:
10 per element of the factor (3 reads, 2 writes) and, above 8,192 elements a sample, two more sweeps that come from the
L2 cache; 16 for p = 2 and inside torch.compile, where the gradients are left to the backward pass.
Departures: a part of norm 1e-12 or less gets gradient 0, where autograd gives g / 1e-12; p = 2 at distance 0 likewise.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .check import check_floating
from .op import FusedOp, acc_dtype, empty_grads, is_compiled_for_cpu


class FactorDistance(NamedTuple):
    """Both are differentiable."""

    loss: Tensor
    """Scalar, the sum of the terms."""
    terms: Tensor
    """[K]: weights[k] * distance(factors[k], teacher)"""


def factor_distance_reference(
    factors: Sequence[Tensor], teacher: Tensor, weights: Sequence[float], p: int = 1
) -> FactorDistance:
    """The specification, with torch's autograd. torch.compile on the CPU gets it in place of the operator.

    Compiled it is 3.5 to 8.8 times as fast as F.normalize of flattened maps, which copies channels-last maps.
    """
    dtype, is_NCHW = acc_dtype([*factors, teacher]), _is_NCHW(factors)
    *rows, t = (_unit_rows(_rows(x, is_NCHW).to(dtype)) for x in (*factors, teacher.detach()))
    zero, elements, terms = t.new_zeros(()), max(t.numel(), 1), []
    for x, w in zip(rows, weights, strict=True):
        mean = ((x - t).abs() if p == 1 else (x - t).square()).sum() / elements
        if p == 2:  # no gradient at distance 0
            mean = torch.where(mean == 0, 0, torch.where(mean == 0, 1, mean).sqrt())
        terms.append(w * mean if w else zero)
    return FactorDistance(sum(terms, zero), torch.stack(terms))


def _unit_rows(x_ND: Tensor) -> Tensor:
    """Rows of length 1. A row whose norm is 1e-12 or less gets no gradient."""
    squares = x_ND.square().sum(1, keepdim=True)
    no_norm = squares <= 1e-24
    unit = x_ND / torch.where(no_norm, 1, squares).sqrt()
    return torch.where(no_norm, x_ND.detach() / 1e-12, unit)


class Inputs(NamedTuple):
    factors: Sequence[Tensor]
    teacher: Tensor
    weights: Sequence[float]
    p: int
    needs_grad: Sequence[bool]

    def rows(self, grads: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """Factors [N, D], teacher [N, D] and grads [factors that need a gradient, N, D]."""
        *factors, teacher, out = (_rows(x, _is_NCHW(self.factors)) for x in (*self.factors, self.teacher, grads))
        return factors, teacher, out


def factor_distance(factors: list[Tensor], teacher: Tensor, weights: list[float], p: int = 1) -> FactorDistance:
    """The equation above in one pass over the teacher's factor. ValueError on what does not fit.

    factors: K student factors [N, C, H, W] shaped like the teacher's; weights: K numbers, a 0 switches its factor off;
    p: 1 or 2. An empty batch gives 0.
    """
    if not factors or len(factors) != len(weights):
        given = f"got {len(factors)} factors and weights {weights}"
        raise ValueError(f"one weight for each of 1 or more student factors: {given}")
    if p not in (1, 2):
        raise ValueError(f"p must be 1 or 2, got {p}")
    for k, x in enumerate(factors, 1):
        which = "student_factor" if len(factors) == 1 else f"student_factor {k} of {len(factors)}"
        check_floating(**{which: x, "teacher_factor": teacher})
        if x.dim() != 4 or x.shape != teacher.shape:
            shapes = f"{list(x.shape)} and {list(teacher.shape)}"
            raise ValueError(f"{which} and teacher_factor must be [N, C, H, W] of one shape, got {shapes}")
    if is_compiled_for_cpu(teacher):
        return factor_distance_reference(factors, teacher, weights, p)
    weights = [float(w) for w in weights]
    needs_grad = [torch.is_grad_enabled() and x.requires_grad and w != 0 for x, w in zip(factors, weights, strict=True)]
    return FactorDistance(*_factor_distance(Inputs(list(factors), teacher.detach(), weights, p, needs_grad)))


def _is_NCHW(factors: Sequence[Tensor]) -> bool:
    """The memory layout in which all factors are read: that of the first, NCHW or channels-last."""
    _, _, H, W = factors[0].shape
    return factors[0].stride()[1:] == (H * W, W, 1)


def _rows(maps: Tensor, is_NCHW: bool) -> Tensor:
    """[..., C, H, W] -> [..., D] with contiguous elements, a view if the memory layout allows it."""
    return (maps if is_NCHW else maps.movedim(-3, -1)).flatten(-3)


def _grads(inputs: Inputs, dtype: torch.dtype) -> Tensor:
    """[factors that need a gradient, N, C, H, W] in the memory layout of the factors."""
    grads = empty_grads(inputs, dtype)
    if _is_NCHW(inputs.factors):
        return grads
    return grads.view(*grads.shape[:2], *grads.shape[3:], grads.shape[2]).movedim(-1, -3)


_factor_distance = FusedOp(
    "factor_distance",
    Inputs,
    names=("loss", "terms", "statistics"),
    # statistics: K + 1 norms of a sample, then K <x^, direction>
    outputs=lambda inputs, new: (new(()), new(len(inputs.factors)), new((2 * len(inputs[0]) + 1, len(inputs.teacher)))),
    values=2,
    saved_from=1,
    grads=_grads,
    writes_grads=lambda inputs, on_gpu: inputs.p == 1,
)
