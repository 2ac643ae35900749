"""One loss for KD, DML, SOKD and DCM: H heads, of which some learn from labels and from one another.

    L = sum_i c_i CE(z_i, y) + T^2 sum_ij W_ij KL(p_j^T || p_i^T),   p^T = softmax(z / T), means over the batch
    dL/dz_i = [ c_i (p_i - y) + T (w_i p_i^T - sum_j W_ij p_j^T) ] / N,   w_i = sum_j W_ij

W_ij is how much head i learns from head j; targets are constants. The diagonal of W must be 0.

Shapes: heads [N, C] each, any floating dtype and row stride; target [N] int64 or a distribution [N, C].
Computed in fp32 (in fp64 where a head is fp64, by the closed form in torch operations). One launch forward: it reads
every logit once and leaves every term, the gradients and the hits. One launch backward, which ends at once if the
upstream gradients are 1 and otherwise computes the gradients anew with them. Bytes per logit for two heads in bf16,
one learning: 6 (read, read, write); 10 above 8,192 classes, where a row no longer fits into the registers and is read
twice. With two learners that is above 2,048 classes, with four or six above 1,024, with eight above 512.

`standardize` (arXiv:2403.01427) divides a row's z-score by T. The softmax ignores the mean, so this is a temperature
of the row's own, T (std + 1e-7). Classes with logit -inf take no part in mean and std.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .check import check_labels, check_logits, check_settings, check_target, check_weights
from .cpu.grad_output import scaled
from .cpu.logit_loss import closed_form
from .gpu.logit_loss import launch
from .op import accumulator, plain, savable, taken


class LogitLoss(NamedTuple):
    """What one pass over the logits gives; `loss` and `terms` are differentiable."""

    loss: Tensor
    """Scalar, the sum of all terms."""
    terms: Tensor
    """[H, 1 + H]: weighted terms: c_i CE(z_i, y) at [i, 0], T^2 W_ij KL(p_j || p_i) at [i, 1 + j]."""
    hits: Tensor
    """[2, H]: rows whose label is a head's top class, and among its top 5, where `count_hits`; NaN for soft targets.
    Equal logits rank by class number."""


def logit_loss_reference(
    heads: list[Tensor],
    target: Tensor,
    ce_weights: list[float],
    table: list[list[float]],
    *,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    ignore_index: int | None = None,
    standardize: bool = False,
    count_hits: bool = False,
) -> LogitLoss:
    """The specification: autograd through torch's own cross_entropy and log_softmax."""
    dtype = torch.promote_types(max((h.dtype for h in heads), key=lambda d: d.itemsize), torch.float32)
    heads = [head.to(dtype) for head in heads]
    target = target.to(dtype) if target.is_floating_point() else target
    ignore = -100 if ignore_index is None else ignore_index
    ce = [w * F.cross_entropy(z, target, label_smoothing=label_smoothing, ignore_index=ignore) if w else z.new_zeros(())
          for w, z in zip(ce_weights, heads, strict=True)]  # fmt: skip
    log_p = [F.log_softmax((z_score(z) if standardize else z) / temperature, dim=1) for z in heads]
    kl = [[w * temperature**2 * _kl(q.detach(), p) if w else p.new_zeros(()) for w, q in zip(row, log_p, strict=True)]
          for row, p in zip(table, log_p, strict=True)]  # fmt: skip
    terms = torch.stack([torch.stack([c, *row]) for c, row in zip(ce, kl, strict=True)])
    return LogitLoss(terms.sum(), terms, _hits(heads, target) if count_hits else terms.new_zeros(2, len(heads)))


def z_score(z_NC: Tensor) -> Tensor:
    taking_part = z_NC != -torch.inf
    count = taking_part.sum(1, keepdim=True)
    mean = torch.where(taking_part, z_NC, 0).sum(1, keepdim=True) / count
    variance = torch.where(taking_part, z_NC - mean, 0).square().sum(1, keepdim=True) / (count - 1).clamp(min=1)
    return (z_NC - mean) / (variance.sqrt() + 1e-7)


def _kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(q || p), mean over rows; a class of probability 0 adds 0, not 0 * inf."""
    return torch.where(log_q.exp() == 0, 0.0, log_q.exp() * (log_q - log_p)).sum() / len(log_q)


def _hits(heads: list[Tensor], target: Tensor) -> Tensor:
    if target.is_floating_point():
        return heads[0].new_full((2, len(heads)), torch.nan)
    ranks = torch.stack([z.argsort(dim=1, descending=True, stable=True) for z in heads])[:, :, :5] == target[:, None]
    return torch.stack([ranks[:, :, 0].sum(1), ranks.sum((1, 2))]).to(heads[0].dtype)


def logit_loss(
    heads: list[Tensor],
    target: Tensor,
    ce_weights: list[float],
    table: list[list[float]],
    *,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    ignore_index: int | None = None,
    standardize: bool = False,
    count_hits: bool = False,
) -> LogitLoss:
    """The equation above in one pass. ce_weights: c [H]; table: W [H][H], all from 0. ValueError on shapes,
    devices, dtypes and settings that do not fit, TypeError on what is no tensor.

    Rows with the label `ignore_index` have no cross-entropy, whose mean is over the others (0 if there is none); their
    divergences count: teachers need no label. An empty batch gives 0. Gradients go to the heads that require one and
    have a weight. A weight of 0 switches its term off, whatever its value.
    """
    check_logits(heads)
    check_target(target, heads[0])
    check_settings(temperature, label_smoothing)
    H = len(heads)
    if len(ce_weights) != H or len(table) != H or any(len(row) != H for row in table):
        raise ValueError(f"{H} heads need {H} ce_weights and a {H} x {H} table, got {ce_weights} and {table}")
    weights = [float(w) for c, row in zip(ce_weights, table, strict=True) for w in (c, *row)]
    check_weights(weights, H)
    learns = [torch.is_grad_enabled() and z.requires_grad and any(weights[i * (H + 1) : (i + 1) * (H + 1)])
              for i, z in enumerate(heads)]  # fmt: skip
    settings = (weights, temperature, label_smoothing, ignore_index, standardize, learns, count_hits)
    return LogitLoss(*_FusedLogitLoss.apply(settings, target, *map(savable, heads))[:3])


def _compute(heads: list[Tensor]):
    return launch if heads[0].device.type == "cuda" and accumulator(heads) == torch.float32 else closed_form


def _empty_grads(heads: list[Tensor], learns: Sequence[bool]) -> Tensor:
    dtypes = {head.dtype for head, learner in zip(heads, learns, strict=True) if learner}
    dtype = dtypes.pop() if len(dtypes) == 1 else accumulator(heads)
    return heads[0].new_empty((sum(learns), *heads[0].shape), dtype=dtype)


def _forward(
    heads: Sequence[Tensor],
    target: Tensor,
    weights: Sequence[float],
    temperature: float,
    smoothing: float,
    ignore_index: int | None,
    standardize: bool,
    learns: Sequence[bool],
    count_hits: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_labels(target, heads[0].shape[1], ignore_index)
    grads = _empty_grads(heads, learns)
    if len(target) == 0:
        return *(zeros.zero_() for zeros in _results(heads)), grads
    settings = (weights, temperature, smoothing, ignore_index, standardize, learns, count_hits)
    return *_compute(heads)(heads, target, *settings, grads), grads


_logit_loss = torch.library.custom_op("fastkd::logit_loss", _forward, mutates_args=())


def _results(heads: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    H, dtype = len(heads), accumulator(heads)
    return tuple(heads[0].new_empty(shape, dtype=dtype) for shape in ((), (H, H + 1), (2, H)))


@_logit_loss.register_fake
def _(heads, target, weights, temperature, smoothing, ignore_index, standardize, learns, count_hits):
    return *_results(heads), _empty_grads(heads, learns)


def _write_gradients(
    grads: Tensor,
    heads: Sequence[Tensor],
    target: Tensor,
    weights: Sequence[float],
    temperature: float,
    smoothing: float,
    ignore_index: int | None,
    standardize: bool,
    learns: Sequence[bool],
    loss_gradient: Tensor | None,
    terms_gradient: Tensor | None,
    skip_ones: bool,
) -> None:
    """Write grads; with skip_ones they hold those of upstream gradients of 1, which then need not be computed."""
    compute, upstream = _compute(heads), (loss_gradient, terms_gradient)
    done = skip_ones and compute is closed_form and scaled(grads, *upstream, weights)  # the kernel looks by itself
    if target.shape[0] and not done:
        settings = (weights, temperature, smoothing, ignore_index, standardize, learns, False)
        compute(heads, target, *settings, grads, upstream, skip_ones)


_logit_loss_backward = torch.library.custom_op("fastkd::logit_loss_backward", _write_gradients, mutates_args=("grads",))


def _setup(ctx, inputs, output):
    heads, target, *ctx.settings, _ = inputs
    ctx.save_for_backward(*heads, target)
    ctx.grads = None
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _backward(ctx, loss_gradient, terms_gradient, *_):
    if torch.is_grad_enabled():
        raise RuntimeError(
            "logit_loss has no second derivative; fastkd.kernels.logit_loss_reference has one, and kd_loss_reference"
        )
    *heads, target = ctx.saved_tensors
    if loss_gradient is None and terms_gradient is None:
        return [None] * len(heads), *[None] * 8
    learns = ctx.settings[-1]
    grads = taken(ctx, (loss_gradient, terms_gradient))
    left = grads is not None
    if not left:
        grads = _empty_grads(heads, learns)
    write = _write_gradients if plain((*heads, target, loss_gradient, terms_gradient)) else _logit_loss_backward
    write(grads, heads, target, *ctx.settings, loss_gradient, terms_gradient, left)
    rows = iter(grads.unbind())
    gradients = [next(rows).to(head.dtype) if learner else None for head, learner in zip(heads, learns, strict=True)]
    return gradients, *[None] * 8


_logit_loss.register_autograd(_backward, setup_context=_setup)


class _FusedLogitLoss(torch.autograd.Function):
    """What `logit_loss` goes through. Eagerly the first backward takes the gradients of the forward pass over in place.

    A compiler may run one backward graph twice over what it has saved, so for it the backward pass computes them, as
    the autograd registered above does for callers of the op itself.
    """

    @staticmethod
    def forward(ctx, settings, target, *heads):
        if plain((*heads, target)):
            *results, grads = _forward(heads, target, *settings)
            _setup(ctx, (heads, target, *settings), results)
            ctx.grads = grads  # not saved_tensors: the first backward writes it, a second one must not use it
            return tuple(results)
        *others, learns, count_hits = settings
        results = _logit_loss(list(heads), target, *others, [False] * len(learns), count_hits)
        _setup(ctx, (heads, target, *settings), results)
        return results

    @staticmethod
    def backward(ctx, *gradients):
        return None, None, *_backward(ctx, *gradients)[0]
