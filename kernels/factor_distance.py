"""Distances of a student's factors from the teacher's: IE-KD (CVPR 2021, arXiv:2107.00181) and FT (arXiv:1802.04977).

    distance(x, t) = ( sum |x^ - t^|^p / N_el )^(1/p),   x^ = flatten(x) / max(||flatten(x)||_2, 1e-12) per sample
    loss = sum_k w_k distance(x_k, t):   inheritance has a weight > 0, exploration one < 0; FT is one part alone
    d distance / dx = (g - x^ <x^, g>) / ||x||,   g = sign(x^ - t^) / N_el  or  (x^ - t^) / (N_el distance)  for p = 2

Shapes: every part and the teacher's factor [N, C, H, W], any floating dtype; D = C H W, N_el = N D, the elements of the
whole batch. Computed in fp32 (in fp64 where an input is fp64, by the closed form in torch operations); norms up to
1.8e19 fit. Only parts get a gradient. Maps are read as rows of D numbers: the layout of the first part (channels-last
or NCHW, batch of any stride) is everyone's, and what lies otherwise is copied first.
One launch forward, which reads the teacher once for all parts and for p = 1 leaves the gradients; one backward, which
for p = 1 ends at once if the upstream gradients are 1. Bytes for a pair in bf16: 10 per element of the factor (3 reads,
2 writes) and, above 8,192 elements a sample, two more sweeps that come from the L2 cache; 16 for p = 2 and inside
torch.compile, where the gradients are left to the backward pass.
Departures: a part of norm 1e-12 or less gets gradient 0, where autograd gives g / 1e-12; p = 2 at distance 0 likewise.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .check import check_tensors
from .cpu.factor_distance import closed_form
from .cpu.grad_output import scaled
from .gpu.factor_distance import launch, launch_backward
from .op import accumulator, plain, savable, taken


class FactorDistance(NamedTuple):
    """Both are differentiable."""

    loss: Tensor
    """Scalar, the sum of the terms."""
    terms: Tensor
    """[K]: weights[k] * distance(parts[k], teacher)"""


def factor_distance_reference(parts: list[Tensor], teacher: Tensor, weights: list[float], p: int = 1) -> FactorDistance:
    """The specification: autograd through the normalised factors."""
    dtype = accumulator([*parts, teacher])
    t = _normalised(teacher.detach().to(dtype))
    root = max(t.numel(), 1) ** (1 / p)
    terms = [w * torch.linalg.vector_norm(_normalised(x.to(dtype)) - t, p) / root if w else t.new_zeros(())
             for x, w in zip(parts, weights, strict=True)]  # fmt: skip
    terms = torch.stack(terms)
    return FactorDistance(terms.sum(), terms)


def _normalised(x_NCHW: Tensor) -> Tensor:
    rows = x_NCHW.flatten(1)
    norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    unit = rows / norm.clamp(min=1e-12)
    return torch.where(norm <= 1e-12, unit.detach(), unit)


def factor_distance(parts: list[Tensor], teacher: Tensor, weights: list[float], p: int = 1) -> FactorDistance:
    """The equation above in one pass over the teacher's factor. ValueError on what does not fit.

    parts: K student factors [N, C, H, W] shaped like the teacher's; weights: K numbers, of which a 0 switches its part
    off, whatever its values; p: 1 or 2. An empty batch gives 0.
    """
    _check(parts, teacher, weights, p)
    weights = [float(w) for w in weights]
    learns = [torch.is_grad_enabled() and x.requires_grad and w != 0 for x, w in zip(parts, weights, strict=True)]
    return FactorDistance(*_FusedFactorDistance.apply((weights, p, learns), savable(teacher.detach()), *parts))


def _check(parts: list[Tensor], teacher: Tensor, weights: list[float], p: int) -> None:
    if not parts or len(parts) != len(weights):
        raise ValueError(
            f"one weight for each of 1 or more student factors: got {len(parts)} factors and weights {weights}"
        )
    if p not in (1, 2):
        raise ValueError(f"p must be 1 or 2, got {p}")
    for k, x in enumerate(parts, 1):
        check_tensors(student_factor=x, teacher_factor=teacher)
        which = "student_factor" if len(parts) == 1 else f"student_factor {k} of {len(parts)}"
        if x.dim() != 4 or x.shape != teacher.shape:
            raise ValueError(
                f"{which} and teacher_factor must be [N, C, H, W] of one shape, got {list(x.shape)} and "
                f"{list(teacher.shape)}"
            )
        if x.device != teacher.device:
            raise ValueError(f"{which} and teacher_factor must be on one device, got {x.device} and {teacher.device}")
        if not (x.is_floating_point() and teacher.is_floating_point()):
            raise ValueError(f"{which} and teacher_factor must be floating point, got {x.dtype} and {teacher.dtype}")


def _on_gpu(tensors: list[Tensor]) -> bool:
    return tensors[0].device.type == "cuda" and accumulator(tensors) == torch.float32


def _empty_grads(parts: Sequence[Tensor], teacher: Tensor, learns: Sequence[bool], used: bool = True) -> Tensor:
    dtypes = {x.dtype for x, learner in zip(parts, learns, strict=True) if learner}
    dtype = dtypes.pop() if len(dtypes) == 1 else accumulator([*parts, teacher])
    return teacher.new_empty((sum(learns) if used else 0, *teacher.shape), dtype=dtype)


def _results(parts: Sequence[Tensor], teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, terms, and of every sample the K + 1 norms, then <x^, direction> of every part: [2 K + 1, N]."""
    K, dtype = len(parts), accumulator([*parts, teacher])
    return tuple(teacher.new_empty(shape, dtype=dtype) for shape in ((), (K,), (2 * K + 1, len(teacher))))


def _forward(
    parts: Sequence[Tensor], teacher: Tensor, weights: Sequence[float], p: int, learns: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of rows [N, D], whose elements are contiguous: (loss, terms, statistics, gradients of the learning parts)"""
    grads = _empty_grads(parts, teacher, learns, p == 1)
    results = _results(parts, teacher)
    if teacher.numel() == 0:
        return *(zeros.zero_() for zeros in results), grads
    (launch if _on_gpu([*parts, teacher]) else closed_form)(parts, teacher, weights, p, learns, *results, grads)
    return *results, grads


_factor_distance = torch.library.custom_op("fastkd::factor_distance", _forward, mutates_args=())


@_factor_distance.register_fake
def _(parts, teacher, weights, p, learns):
    return *_results(parts, teacher), _empty_grads(parts, teacher, learns, p == 1)


def _write_gradients(
    grads: Tensor,
    parts: Sequence[Tensor],
    teacher: Tensor,
    terms: Tensor,
    statistics: Tensor,
    weights: Sequence[float],
    p: int,
    learns: Sequence[bool],
    loss_gradient: Tensor | None,
    terms_gradient: Tensor | None,
    skip_ones: bool,
) -> None:
    """Write grads, unless skip_ones and the gradients that come from above are all 1."""
    if teacher.numel():
        settings = (parts, teacher, weights, p, learns)
        upstream = (loss_gradient, terms_gradient)
        if _on_gpu([*parts, teacher]):
            launch_backward(*settings, terms, statistics, grads, upstream, skip_ones)
        elif not (skip_ones and scaled(grads, *upstream, learns)):
            closed_form(*settings, None, terms, statistics, grads, upstream)


_factor_distance_backward = torch.library.custom_op(
    "fastkd::factor_distance_backward", _write_gradients, mutates_args=("grads",)
)


def _setup(ctx, inputs, output):
    parts, teacher, *ctx.settings = inputs
    _, terms, statistics, grads = output
    ctx.save_for_backward(*parts, teacher, terms, statistics)
    ctx.mark_non_differentiable(statistics, grads)
    ctx.set_materialize_grads(False)
    ctx.grads = None  # whoever calls the op holds its gradients too: they are not to be written


def _backward(ctx, loss_gradient, terms_gradient, *_):
    if torch.is_grad_enabled():
        raise RuntimeError("factor_distance has no second derivative; fastkd.kernels.factor_distance_reference has one")
    *parts, teacher, terms, statistics = ctx.saved_tensors
    learns = ctx.settings[2]
    if loss_gradient is None and terms_gradient is None:
        return [None] * len(parts), *[None] * 4
    grads = taken(ctx, (loss_gradient, terms_gradient))
    left = grads is not None
    if not left:
        grads = _empty_grads(parts, teacher, learns)
    settings = (parts, teacher, terms, statistics, *ctx.settings)
    write = _write_gradients if plain((*parts, teacher, loss_gradient, terms_gradient)) else _factor_distance_backward
    write(grads, *settings, loss_gradient, terms_gradient, left)
    rows = iter(grads.unbind())
    gradients = [next(rows).to(x.dtype) if learner else None for x, learner in zip(parts, learns, strict=True)]
    return gradients, *[None] * 4


_factor_distance.register_autograd(_backward, setup_context=_setup)


class _FusedFactorDistance(torch.autograd.Function):
    """The same autograd with less time on the host (no walk through nested arguments), of maps instead of rows."""

    @staticmethod
    def forward(ctx, settings, teacher, *parts):
        N, C, H, W = teacher.shape
        as_NCHW = parts[0].stride()[1:] == (H * W, W, 1)
        ctx.as_maps = ((N, C, H, W), (0, 1, 2, 3)) if as_NCHW else ((N, H, W, C), (0, 3, 1, 2))
        *parts, teacher = ((x if as_NCHW else x.permute(0, 2, 3, 1)).flatten(1) for x in (*parts, teacher))
        weights, p, learns = settings
        # a compiled backward may run twice and would find what it wrote: there the gradients are left to it altogether
        at_once = p == 1 and not torch.compiler.is_compiling()
        compute = _forward if plain((*parts, teacher)) else _factor_distance
        learns = learns if at_once else [False] * len(parts)
        loss, terms, statistics, grads = compute(parts, teacher, weights, p, learns)
        ctx.settings = settings
        ctx.save_for_backward(*parts, teacher, terms, statistics)
        ctx.set_materialize_grads(False)
        # not among the saved tensors: the first backward may write them, a second one must not use them
        ctx.grads = grads if at_once else None
        return loss, terms

    @staticmethod
    def backward(ctx, *gradients):
        shape, order = ctx.as_maps
        maps = [g if g is None else g.view(shape).permute(order) for g in _backward(ctx, *gradients)[0]]
        return None, None, *maps
