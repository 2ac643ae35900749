"""logit_loss.py where there is no GPU, for what counts row by row: class weights, mask_kd, reductions but the mean.

Every term is first computed for each row, [N]. Plain formulas, which are exact for classes that are ruled out; this is
not the way of a training run with the default options.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..logit_loss import Inputs
from ..op import Tensors, acc_dtype
from .logit_loss_general import Rows, table_of


class Target(NamedTuple):
    """A class for each row, or a distribution over classes, with the class weights in it."""

    label: Tensor | None
    """[N, 1] if there is one class for each row: `y` is not needed then."""
    y: Tensor | None
    """[N, C]"""
    mass: Tensor
    """[N, 1]: the weight of the label, or the sum of y."""


def by_rows(inputs: Inputs, outputs: Tensors, grads: Tensor, grad_outputs: Tensors) -> None:
    """Writes grads, and outputs unless they are None. Asks a GPU nothing: fp64 there comes here too."""
    H = len(inputs.heads)
    z = torch.stack([head.to(acc_dtype(inputs.heads)) for head in inputs.heads])
    table = table_of(inputs.weights, z).view(H, H + 1)
    rows = Rows(z, inputs.temperature, inputs.standardize, [i for i in range(H) if inputs.weights[i * (H + 1)]])
    target, scale = _target(inputs, z[0])
    factors = table * scale[:, None]
    if any(inputs.needs_grad):
        above = _grad_rows(inputs.reduction, *grad_outputs) if grad_outputs else 1.0
        gradient = _gradients(inputs, rows, target, torch.where(table == 0, 0, factors * above))
        if inputs.mask_kd:
            gradient = torch.where((scale == 0).all(1)[:, None], 0, gradient)  # whatever such a row holds
        grads.copy_(gradient)
    if outputs[0] is None:
        return
    terms = torch.where(factors == 0, 0, _terms(inputs, rows, target) * factors)
    if inputs.reduction != "none":
        terms = terms.sum(0)
    outputs[1].copy_(terms)
    outputs[0].copy_(terms.sum((-2, -1)))


def _target(inputs: Inputs, like: Tensor) -> tuple[Target, Tensor]:
    """(target, scale [N, 1 + H] of every term of a row)"""
    (N, C), target, H = like.shape, inputs.target, len(inputs.heads)
    class_weights = like.new_ones(C) if inputs.class_weights is None else inputs.class_weights.to(like.dtype)
    kept, label, y, mass = like.new_ones(N), None, None, like.new_zeros(N, 1)
    if target is not None and target.is_floating_point():
        y = target.to(like.dtype)
    elif target is not None:
        is_kept = torch.ones_like(target, dtype=torch.bool)
        if inputs.ignore_index is not None:
            is_kept = target != inputs.ignore_index
        kept, label = is_kept.to(like.dtype), target.clamp(0, C - 1)[:, None]
        is_known = ((target >= 0) & (target < C)) | ~is_kept
        mass = class_weights[label].where(is_known[:, None], torch.nan)  # a label that is no class shows
        if inputs.smoothing:
            y = like.new_zeros(N, C).scatter_(1, label, 1).where(is_known[:, None], torch.nan)
    scale = kept[:, None].repeat(1, H + 1)
    if not inputs.mask_kd:
        scale[:, 1:] = 1
    if inputs.reduction == "mean":
        each = kept if label is None else kept * class_weights[label[:, 0]]
        divisor = torch.full_like(scale[0], N) if label is None else torch.stack([each.sum(), *[scale[:, 1].sum()] * H])
        scale = scale / torch.where(divisor == 0, 1, divisor)
    scale[:, 1:] *= inputs.temperature**2
    if y is None:
        return Target(label, None, mass), scale
    y = ((1 - inputs.smoothing) * y + inputs.smoothing / C) * class_weights
    return Target(None, y, y.sum(1, keepdim=True)), scale


def _grad_rows(reduction: str, grad_loss: Tensor | None, grad_terms: Tensor | None) -> Tensor | float:
    """What comes from above for each row and term, to be broadcast to [N, H, 1 + H]."""
    above = [] if grad_terms is None else [grad_terms]
    if grad_loss is not None:
        above.append(grad_loss[:, None, None] if reduction == "none" else grad_loss)
    return sum(above[1:], above[0])


def _terms(inputs: Inputs, rows: Rows, target: Target) -> Tensor:
    """[N, H, 1 + H]: every row's terms without weights; a class of probability 0 adds 0, not 0 * inf."""
    H, N = rows.log_sum.shape
    terms = rows.p.new_zeros(N, H, H + 1)
    quick = rows.row_divergences().transpose(1, 2) if rows.p.device.type == "cpu" else None
    for k, weight in enumerate(inputs.weights):
        i, j = k // (H + 1), k % (H + 1) - 1
        if weight and j < 0:
            terms[:, i, 0] = _cross_entropy(rows, i, target)
        elif weight and quick is not None and math.isfinite(quick[:, i, j].sum()):
            terms[:, i, 1 + j] = quick[:, i, j]
        elif weight:
            log_ratio = rows.scaled[j] - rows.scaled[i] + (rows.log_sum[i] - rows.log_sum[j])[:, None]
            terms[:, i, 1 + j] = torch.where(rows.p[j] == 0, 0, rows.p[j] * log_ratio).sum(1)
    return terms


def _cross_entropy(rows: Rows, i: int, target: Target) -> Tensor:
    """[N]"""
    shifted, log_sum = rows.shifted[i], rows.log_sum1[i, :, None]
    if target.label is not None:
        return (target.mass * (log_sum - shifted.gather(1, target.label)))[:, 0]
    y = target.y
    return shifted.new_zeros(len(shifted)) if y is None else -torch.where(y == 0, 0, y * (shifted - log_sum)).sum(1)


def _gradients(inputs: Inputs, rows: Rows, target: Target, factors: Tensor) -> Tensor:
    """[learners, N, C]; factors [N, H, 1 + H] of the terms: weight, scale and what comes from above."""
    H, N, C = rows.p.shape
    learners = [i for i in range(H) if inputs.needs_grad[i]]
    gradient = rows.p.new_zeros(len(learners), N, C)
    for mine, i in zip(gradient, learners, strict=True):
        for j in range(H):
            if inputs.weights[i * (H + 1) + 1 + j]:
                factor = factors[:, i, 1 + j, None] / inputs.temperature
                mine.addcmul_(rows.p[i], factor).addcmul_(rows.p[j], factor, value=-1)
    if rows.way_back:
        gradient = rows.way_back(gradient, learners)
    for mine, i in zip(gradient, learners, strict=True):
        if inputs.weights[i * (H + 1)]:
            factor = factors[:, i, :1] * target.mass
            mine.addcmul_(rows.p1[i], factor)
            if target.label is not None:
                mine.scatter_add_(1, target.label, -factor)
            elif target.y is not None:
                mine.addcmul_(target.y, factors[:, i, :1], value=-1)
    return gradient
