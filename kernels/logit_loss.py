"""One loss for KD, DML, SOKD and DCM: H heads, of which some learn from labels and from one another.

    L = sum_i c_i CE(z_i, y) + T^2 sum_ij W_ij KL(p_j^T || p_i^T),   p^T = softmax(z / T), means over the batch
    dL/dz_i = [ c_i (p_i - y) + T (w_i p_i^T - sum_j W_ij p_j^T) ] / N,   w_i = sum_j W_ij

W_ij is how much head i learns from head j; targets are constants. The diagonal of W must be 0.
Shapes: heads [N, C] each, any floating dtype and row stride; target [N] int64 or a distribution [N, C].
One launch forward: it reads every logit once and leaves every term and the gradients. Bytes per logit for two heads in
bf16, one learning: 6 (read, read, write); 10 above 8,192 classes, where a row no longer fits into the registers and is
read twice. With two learners that is above 2,048 classes, with four or six above 1,024, with eight above 512.

`standardize` (arXiv:2403.01427) divides a row's z-score by T. The softmax ignores the mean, so this is a temperature
of the row's own, T (std + 1e-7). Classes with logit -inf take no part in mean and std.
"""

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .check import check_logit_loss
from .op import FusedOp, acc_dtype, is_compiled_for_cpu


class LogitLoss(NamedTuple):
    """What one pass over the logits gives; `loss` and `terms` are differentiable."""

    loss: Tensor
    """Scalar, the sum of all terms."""
    terms: Tensor
    """[H, 1 + H]: weighted terms: c_i CE(z_i, y) at [i, 0], T^2 W_ij KL(p_j || p_i) at [i, 1 + j]."""


def logit_loss_reference(
    heads: Sequence[Tensor],
    target: Tensor,
    ce_weights: Sequence[float],
    table: Sequence[Sequence[float]],
    *,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    ignore_index: int | None = None,
    standardize: bool = False,
) -> LogitLoss:
    """The specification, with torch's autograd. torch.compile on the CPU gets it in place of the operator.

    Through log-sum-exp no gradient needs another sum: compiled it is 1.0 to 1.9 times as fast as torch's cross_entropy
    and log_softmax for KD, 1.2 to 1.4 times for DCM. A label that is not a class gives NaN here, not an error, because
    the check would end the graph.
    """
    N, C = heads[0].shape
    heads = [head.to(acc_dtype(heads)) for head in heads]
    labels = _Labels(target, heads[0].dtype, C, label_smoothing, ignore_index)
    scaled = [_shifted((standardized(z) if standardize else z) / temperature) for z in heads]
    zero = heads[0].new_zeros(())
    terms = [[c * labels.cross_entropy(_shifted(z)) if c else zero] for c, z in zip(ce_weights, heads, strict=True)]
    for row, weights, x in zip(terms, table, scaled, strict=True):
        factors = [weight * temperature**2 for weight in weights]
        row += [w * (_divergences(x, q.detach()).sum() / max(N, 1)) if w else zero
                for w, q in zip(factors, scaled, strict=True)]  # fmt: skip
    flat = [term for row in terms for term in row]
    return LogitLoss(sum(flat, zero), torch.stack(flat).view(len(heads), -1))


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
    """The target as the reference uses it: a class or a distribution per row, smoothed, with ignored rows."""

    def __init__(self, target: Tensor, dtype: torch.dtype, C: int, smoothing: float, ignore_index: int | None):
        self.soft, self.smoothing = target.is_floating_point(), smoothing
        self.count: int | Tensor = max(target.shape[0], 1)
        if self.soft:
            self.y = target.to(dtype) * (1 - smoothing) + smoothing / C
            return
        self.kept = torch.ones_like(target, dtype=torch.bool) if ignore_index is None else target != ignore_index
        if ignore_index is not None:
            self.count = self.kept.sum().clamp(min=1)
        self.is_label = torch.arange(C, device=target.device) == target[:, None]
        known = ((target >= 0) & (target < C)) | ~self.kept
        self.poison = torch.where(known, 1, torch.nan)  # a label that is not a class shows, as in the GPU's kernel

    def cross_entropy(self, shifted_NC: Tensor) -> Tensor:
        """The mean over the rows that are not ignored."""
        log_sum = _log_sum_exp(shifted_NC)
        if self.soft:
            rows = self.y.sum(1) * log_sum - torch.where(self.y == 0, 0, self.y * shifted_NC).sum(1)
            return rows.sum() / self.count
        rows = log_sum - (1 - self.smoothing) * torch.where(self.is_label, shifted_NC, 0).sum(1)
        if self.smoothing:
            rows = rows - self.smoothing * shifted_NC.mean(1)
        return torch.where(self.kept, rows * self.poison, 0).sum() / self.count


class Inputs(NamedTuple):
    """What the operator takes; `weights` is row by row [H, 1 + H], the weight of every term."""

    heads: Sequence[Tensor]
    target: Tensor
    weights: Sequence[float]
    temperature: float
    smoothing: float
    ignore_index: int | None
    standardize: bool
    needs_grad: Sequence[bool]


def logit_loss(
    heads: Sequence[Tensor],
    target: Tensor,
    ce_weights: Sequence[float],
    table: Sequence[Sequence[float]],
    *,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    ignore_index: int | None = None,
    standardize: bool = False,
    names: Sequence[str] = (),
) -> LogitLoss:
    """The equation above in one pass.

    heads: H tensors [N, C]; target: [N] int64 or [N, C] floating; ce_weights: c [H]; table: W [H][H]. All weights are 0
    or more. `names` are those of the heads in error messages. Raises ValueError on shapes, devices, dtypes and settings
    that do not fit, TypeError on what is no tensor.

    Rows with the label `ignore_index` have no cross-entropy, whose mean is over the others (0 if there is none); their
    divergences count: teachers need no label. An empty batch gives 0. Gradients go to the heads that require one and
    have a weight. A weight of 0 switches its term off, whatever its value.
    """
    weights = check_logit_loss(heads, target, ce_weights, table, temperature, label_smoothing, names)
    needs_grad = []
    for head, ce_weight, row in zip(heads, ce_weights, table, strict=True):
        needs_grad.append(torch.is_grad_enabled() and head.requires_grad and any((ce_weight, *row)))
    if is_compiled_for_cpu(target):
        return logit_loss_reference(
            heads, target, ce_weights, table, temperature=temperature, label_smoothing=label_smoothing,
            ignore_index=ignore_index, standardize=standardize,
        )  # fmt: skip
    settings = (weights, float(temperature), float(label_smoothing), ignore_index, standardize, needs_grad)
    return LogitLoss(*_logit_loss(Inputs(list(heads), target, *settings)))


def check_labels(
    target: Tensor,
    classes: int,
    ignore_index: int | None = None,
    unlabelled: str = "pass ignore_index for rows without a label",
) -> None:
    """ValueError if a label is no class; on the CPU, elsewhere if FASTKD_DEBUG=1: there such a label makes NaN."""
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


_logit_loss = FusedOp(
    "logit_loss",
    Inputs,
    names=("loss", "terms"),
    outputs=lambda inputs, new: (new(()), new((len(inputs.heads), len(inputs.heads) + 1))),
    values=2,
    check=lambda inputs: check_labels(inputs.target, inputs.heads[0].shape[1], inputs.ignore_index),
    reference="logit_loss_reference (for KD: kd_loss_reference)",
)
