"""logit_loss.py where there is no GPU, for what counts row by row: class weights, mask_kd, reductions but the mean.

Every term is first computed for each row, [N]. Plain formulas, which are exact for classes that are ruled out; this is
not the way of a training run with the default options.
"""

import torch
from torch import Tensor

from ..logit_loss import Inputs
from ..op import Tensors, acc_dtype
from .logit_loss_general import Rows


def by_rows(inputs: Inputs, outputs: Tensors, grads: Tensor, grad_outputs: Tensors) -> None:
    """Writes grads, and outputs unless they are None. Asks the device nothing: fp64 on a GPU comes here too."""
    H = len(inputs.heads)
    z = torch.stack([head.to(acc_dtype(inputs.heads)) for head in inputs.heads])
    table = torch.tensor(inputs.weights, dtype=z.dtype, device=z.device).view(H, H + 1)
    rows = Rows(z, inputs.temperature, inputs.standardize, [i for i in range(H) if inputs.weights[i * (H + 1)]])
    y, scale = _target(inputs, z[0])
    factors = table * scale[:, None]
    if any(inputs.needs_grad):
        above = _grad_rows(inputs.reduction, *grad_outputs) if grad_outputs else 1.0
        gradient = _gradients(inputs, rows, y, torch.where(table == 0, 0, factors * above))
        is_left_out = (scale == 0).all(1)[:, None]
        grads.copy_(torch.where(is_left_out, 0, gradient))
    if outputs[0] is None:
        return
    terms = torch.where(factors == 0, 0, _terms(inputs, rows, y) * factors)
    if inputs.reduction != "none":
        terms = terms.sum(0)
    outputs[1].copy_(terms)
    outputs[0].copy_(terms.sum((-2, -1)))


def _target(inputs: Inputs, like: Tensor) -> tuple[Tensor, Tensor]:
    """(the distribution over classes [N, C] with its class weights, scale [N, 1 + H] of every term of a row)."""
    (N, C), target, H = like.shape, inputs.target, len(inputs.heads)
    class_weights = like.new_ones(C) if inputs.class_weights is None else inputs.class_weights.to(like.dtype)
    kept, label = like.new_ones(N), None
    if target is None:
        y = torch.zeros_like(like)
    elif target.is_floating_point():
        y = target.to(like.dtype)
    else:
        kept = kept if inputs.ignore_index is None else (target != inputs.ignore_index).to(like.dtype)
        y = (torch.arange(C, device=like.device) == target[:, None]).to(like.dtype)
        known = ((target >= 0) & (target < C)) | (kept == 0)
        y = torch.where(known[:, None], y, torch.nan)  # a label that is no class shows, as in the GPU's kernel
        label = target.clamp(0, C - 1)
    y = ((1 - inputs.smoothing) * y + inputs.smoothing / C) * class_weights
    scale = kept[:, None].repeat(1, H + 1)
    if not inputs.mask_kd:
        scale[:, 1:] = 1
    if inputs.reduction == "mean":
        each = kept if label is None else kept * class_weights[label]
        divisor = torch.full_like(scale[0], N) if label is None else torch.stack([each.sum(), *[scale[:, 1].sum()] * H])
        scale = scale / torch.where(divisor == 0, 1, divisor)
    scale[:, 1:] *= inputs.temperature**2
    return y, scale


def _grad_rows(reduction: str, grad_loss: Tensor | None, grad_terms: Tensor | None) -> Tensor | float:
    """What comes from above for each row and term, to be broadcast to [N, H, 1 + H]."""
    above = [] if grad_terms is None else [grad_terms]
    if grad_loss is not None:
        above.append(grad_loss[:, None, None] if reduction == "none" else grad_loss)
    return sum(above[1:], above[0])


def _terms(inputs: Inputs, rows: Rows, y: Tensor) -> Tensor:
    """[N, H, 1 + H]: every row's terms without weights; a class of probability 0 adds 0, not 0 * inf."""
    H, N = rows.log_sum.shape
    terms = rows.p.new_zeros(N, H, H + 1)
    log_p = rows.scaled - rows.log_sum[:, :, None]
    for k, weight in enumerate(inputs.weights):
        i, j = k // (H + 1), k % (H + 1) - 1
        if weight and j < 0:
            terms[:, i, 0] = -torch.where(y == 0, 0, y * (rows.shifted[i] - rows.log_sum1[i, :, None])).sum(1)
        elif weight:
            terms[:, i, 1 + j] = torch.where(rows.p[j] == 0, 0, rows.p[j] * (log_p[j] - log_p[i])).sum(1)
    return terms


def _gradients(inputs: Inputs, rows: Rows, y: Tensor, factors: Tensor) -> Tensor:
    """[learners, N, C]; factors [N, H, 1 + H] of the terms: weight, scale and what comes from above."""
    H = len(rows.p)
    learners = [i for i in range(H) if inputs.needs_grad[i]]
    gradient = torch.zeros((len(learners), *y.shape), dtype=y.dtype, device=y.device)
    for mine, i in zip(gradient, learners, strict=True):
        for j in range(H):
            if inputs.weights[i * (H + 1) + 1 + j]:
                mine += factors[:, i, 1 + j, None] / inputs.temperature * (rows.p[i] - rows.p[j])
    if rows.way_back:
        gradient = rows.way_back(gradient, learners)
    for mine, i in zip(gradient, learners, strict=True):
        if inputs.weights[i * (H + 1)]:
            mine += factors[:, i, :1] * (rows.p1[i] * y.sum(1, keepdim=True) - y)
    return gradient
