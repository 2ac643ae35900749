"""One loss for KD, DML, SOKD and DCM: H heads, of which some learn from labels and from one another.

    L = sum_i c_i CE(z_i, y) + T^2 sum_ij W_ij KL(p_j^T || p_i^T),   p^T = softmax(z / T), means over the batch
    dL/dz_i = [ c_i (p_i - y) + T (w_i p_i^T - sum_j W_ij p_j^T) ] / N,   w_i = sum_j W_ij

W_ij is how much head i learns from head j; targets are constants. The diagonal of W must be 0.
Shapes: heads [N, C] each, any floating dtype and row stride; target [N] int64 or a distribution [N, C], or None if no
c_i is used. `class_weights` w [C] as in torch's cross_entropy: the target's classes count w_c times, and the mean over
rows with labels is sum_n w_y CE_n / sum_n w_y.
One launch forward: it reads every logit once and leaves every term and the gradients. Bytes per logit for two heads in
bf16, one learning: 6 (read, read, write); 10 above 8,192 classes, where a row no longer fits into the registers and is
read twice. With two learners that is above 2,048 classes, with four or six above 1,024, with eight above 512.

`reduction="none"` gives each row's loss [N] and terms. The forward pass writes no gradient then, for the gradient from
above is known in the backward pass alone, which reads the logits again: 10 bytes for KD. It costs no more launches.

`standardize` (arXiv:2403.01427) divides a row's z-score by T. The softmax ignores the mean, so this is a temperature
of the row's own, T (std + 1e-7). Classes with logit -inf take no part in mean and std.
"""

import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .check import check_logit_loss, check_rows
from .op import FusedOp, acc_dtype, is_compiled_for_cpu

UNLABELLED = -100
"""The label of an image without one: the default `ignore_index` of torch's losses."""


class LogitLoss(NamedTuple):
    """What one pass over the logits gives; `loss` and `terms` are differentiable."""

    loss: Tensor
    """Scalar, the sum of all terms; [N] with reduction "none"."""
    terms: Tensor
    """[H, 1 + H], or [N, H, 1 + H]: weighted terms: c_i CE(z_i, y) at [i, 0], T^2 W_ij KL(p_j || p_i) at [i, 1 + j]."""


def logit_loss_reference(
    heads: Sequence[Tensor],
    target: Tensor | None,
    ce_weights: Sequence[float],
    table: Sequence[Sequence[float]],
    *,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    ignore_index: int | None = None,
    standardize: bool = False,
    class_weights: Tensor | None = None,
    mask_kd: bool = False,
    reduction: str = "mean",
) -> LogitLoss:
    """The specification, with torch's autograd. torch.compile on the CPU gets it in place of the operator.

    Through log-sum-exp no gradient needs another sum: compiled it is 1.0 to 1.9 times as fast as torch's cross_entropy
    and log_softmax for KD, 1.2 to 1.4 times for DCM. A label that is not a class gives NaN here, not an error, because
    the check would end the graph.
    """
    N, C = heads[0].shape
    heads = [head.to(acc_dtype(heads)) for head in heads]
    labels = _Labels(target, heads[0], label_smoothing, ignore_index, class_weights)
    scaled = [_shifted((standardized(z) if standardize else z) / temperature) for z in heads]

    def ce(z: Tensor) -> Tensor:
        rows = labels.cross_entropy(_shifted(z))
        return _reduced(rows, reduction, labels.divisor)

    def kl(x: Tensor, q: Tensor) -> Tensor:
        rows = _divergences(x, q.detach())
        if not mask_kd or labels.kept is None:
            return _reduced(rows, reduction, max(N, 1))
        return _reduced(torch.where(labels.kept, rows, 0), reduction, labels.kept.sum().clamp(min=1))

    zero = heads[0].new_zeros((N,) if reduction == "none" else ())
    terms = [[c * ce(z) if c else zero] for c, z in zip(ce_weights, heads, strict=True)]
    for row, weights, x in zip(terms, table, scaled, strict=True):
        factors = [weight * temperature**2 for weight in weights]
        row += [w * kl(x, q) if w else zero for w, q in zip(factors, scaled, strict=True)]
    flat = [term for row in terms for term in row]
    return LogitLoss(sum(flat, zero), torch.stack(flat, -1).unflatten(-1, (len(heads), -1)))


def _reduced(rows_N: Tensor, reduction: str, divisor: int | Tensor) -> Tensor:
    if reduction == "none":
        return rows_N
    return rows_N.sum() / divisor if reduction == "mean" else rows_N.sum()


def _shifted(z_NC: Tensor) -> Tensor:
    """z less its maximum, which is a constant: neither a softmax nor its gradient depends on it."""
    return z_NC - z_NC.detach().amax(1, keepdim=True)


def _log_sum_exp(shifted_NC: Tensor) -> Tensor:
    return shifted_NC.exp().sum(1).log()


def _divergences(x_NC: Tensor, teacher_NC: Tensor) -> Tensor:
    """KL of every row, from shifted logits; a class of probability 0 adds 0, not 0 * inf."""
    log_sum, teacher_log_sum = _log_sum_exp(x_NC), _log_sum_exp(teacher_NC)
    p = (teacher_NC - teacher_log_sum[:, None]).exp()
    return torch.where(p == 0, 0, p * (teacher_NC - x_NC)).sum(1) + (log_sum - teacher_log_sum)


def standardized(z_NC: Tensor) -> Tensor:
    """The z-score but for the mean, which a softmax ignores; its gradient is 0 for a row without deviation."""
    finite = z_NC != -torch.inf
    count = finite.sum(1, keepdim=True)
    offsets = torch.where(finite, z_NC - torch.where(finite, z_NC, 0).sum(1, keepdim=True) / count, 0)
    variance = offsets.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)
    std = torch.where(variance == 0, 0, torch.where(variance == 0, 1, variance).sqrt())
    return torch.where(finite, offsets / (std + 1e-7), -torch.inf)


class _Labels:
    """The target as the reference uses it: a class or a distribution per row, smoothed, with ignored rows.

    divisor: that of a mean. kept [N] bool: rows that are not ignored; None for a soft target.
    """

    def __init__(
        self, target: Tensor | None, z_NC: Tensor, smoothing: float, ignore_index: int | None, weights: Tensor | None
    ):
        (N, C), self.smoothing, self.kept = z_NC.shape, smoothing, None
        self.divisor: int | Tensor = max(N, 1)
        self.y: Tensor | None = None  # the distribution, if the labels alone do not do
        weights = None if weights is None else weights.to(z_NC.dtype)
        if target is None:
            return
        if target.is_floating_point():
            y = target.to(z_NC.dtype) * (1 - smoothing) + smoothing / C
            self.y = y if weights is None else y * weights
            return
        self.kept = torch.ones_like(target, dtype=torch.bool) if ignore_index is None else target != ignore_index
        if ignore_index is not None:
            self.divisor = self.kept.sum().clamp(min=1)
        self.is_label = torch.arange(C, device=target.device) == target[:, None]
        known = ((target >= 0) & (target < C)) | ~self.kept
        self.poison = torch.where(known, 1, torch.nan)  # a label that is not a class shows, as in the GPU's kernel
        if weights is not None:
            self.y = (self.is_label * (1 - smoothing) + smoothing / C) * weights
            total = torch.where(self.is_label & self.kept[:, None], weights, 0).sum()
            self.divisor = torch.where(total == 0, 1, total)

    def cross_entropy(self, shifted_NC: Tensor) -> Tensor:
        """[N]: that of every row, 0 where it is ignored."""
        log_sum = _log_sum_exp(shifted_NC)
        if self.y is not None:
            rows = self.y.sum(1) * log_sum - torch.where(self.y == 0, 0, self.y * shifted_NC).sum(1)
        else:
            rows = log_sum - (1 - self.smoothing) * torch.where(self.is_label, shifted_NC, 0).sum(1)
            if self.smoothing:
                rows = rows - self.smoothing * shifted_NC.mean(1)
        return rows if self.kept is None else torch.where(self.kept, rows * self.poison, 0)


class Inputs(NamedTuple):
    """What the operator takes; `weights` is row by row [H, 1 + H], the weight of every term."""

    heads: Sequence[Tensor]
    target: Tensor | None
    class_weights: Tensor | None
    weights: Sequence[float]
    temperature: float
    smoothing: float
    ignore_index: int | None
    standardize: bool
    mask_kd: bool
    reduction: str
    needs_grad: Sequence[bool]


def logit_loss(
    heads: Sequence[Tensor],
    target: Tensor | None,
    ce_weights: Sequence[float],
    table: Sequence[Sequence[float]],
    *,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    ignore_index: int | None = None,
    standardize: bool = False,
    class_weights: Tensor | None = None,
    mask_kd: bool = False,
    reduction: str = "mean",
    names: Sequence[str] = (),
) -> LogitLoss:
    """The equation above in one pass.

    heads: H tensors [N, C]; target: [N] int64 or [N, C] floating, or None if all ce_weights are 0; ce_weights: c [H];
    table: W [H][H]. All weights are 0 or more. class_weights: [C] floating. reduction: "mean", "sum" or "none", over
    the rows. `names` are those of the heads in error messages. Raises ValueError on shapes, devices, dtypes and
    settings that do not fit, TypeError on what is no tensor.

    Rows with the label `ignore_index` have no cross-entropy, whose mean is over the others (0 if there is none); their
    divergences count: teachers need no label. With `mask_kd` such rows have no divergences either, and the mean of
    these is over the other rows too. Both have no effect on a floating target. An empty batch gives 0. Gradients go to
    the heads that require one and have a weight. A weight of 0 switches its term off, whatever its value.
    """
    weights = check_logit_loss(heads, target, ce_weights, table, temperature, label_smoothing, names)
    check_rows(heads[0], target, class_weights, ignore_index, mask_kd, reduction)
    if target is None or target.is_floating_point():
        ignore_index, mask_kd = None, False
    needs_grad = []
    for head, ce_weight, row in zip(heads, ce_weights, table, strict=True):
        needs_grad.append(torch.is_grad_enabled() and head.requires_grad and any((ce_weight, *row)))
    if is_compiled_for_cpu(heads[0]):
        return logit_loss_reference(
            heads, target, ce_weights, table, temperature=temperature, label_smoothing=label_smoothing,
            ignore_index=ignore_index, standardize=standardize, class_weights=class_weights, mask_kd=mask_kd,
            reduction=reduction,
        )  # fmt: skip
    settings = (float(temperature), float(label_smoothing), ignore_index, standardize, mask_kd, reduction, needs_grad)
    return LogitLoss(*_logit_loss(Inputs(list(heads), target, class_weights, weights, *settings)))


def check_labels(
    target: Tensor | None,
    classes: int,
    ignore_index: int | None = None,
    unlabelled: str = "pass ignore_index for rows without a label",
) -> None:
    """ValueError if a label is no class; on the CPU, elsewhere if FASTKD_DEBUG=1: there such a label makes NaN."""
    if target is None:
        return
    is_read = target.device.type == "cpu" or os.environ.get("FASTKD_DEBUG") == "1"
    if target.is_floating_point() or not is_read or not target.numel():
        return
    lowest, highest = target.aminmax()
    if lowest.item() >= 0 and highest.item() < classes:
        return
    wrong = (target < 0) | (target >= classes)
    if ignore_index is not None:
        wrong &= target != ignore_index
        unlabelled = f"ignore_index, for rows without a label, is {ignore_index}"
    if wrong.any():
        rows, labels = wrong.nonzero()[:, 0].tolist(), target[wrong]
        hints = [unlabelled] * bool(labels.min() < 0)
        if labels.max() >= classes:
            hints.append(f"the logits have {classes} classes: check their number, and that labels count from 0")
        raise ValueError(
            f"{len(rows)} label(s) are not from 0 to {classes - 1}, first in row {rows[0]}: {labels[0].item()}; "
            + "; ".join(hints)
        )


def _outputs(inputs: Inputs, new: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    H, rows = len(inputs.heads), inputs.heads[0].shape[:1] if inputs.reduction == "none" else ()
    return new((*rows,)), new((*rows, H, H + 1))


_logit_loss = FusedOp(
    "logit_loss",
    Inputs,
    names=("loss", "terms"),
    outputs=_outputs,
    values=2,
    writes_grads=lambda inputs, on_gpu: inputs.reduction != "none",
    check=lambda inputs: check_labels(inputs.target, inputs.heads[0].shape[1], inputs.ignore_index),
    reference="logit_loss_reference(...).loss (for KD: kd_loss_reference(...).loss)",
)
