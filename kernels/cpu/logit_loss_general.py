"""logit_loss.py where there is no GPU, for all options, large logits and classes that are ruled out.

All heads lie in one [H, N, C] buffer: one log-softmax for all of them, the pairs' cross-entropies as one small matrix
product per row, the gradients as one product with the [H, H] table.
"""

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..logit_loss import Inputs
from ..op import Tensors, acc_dtype
from .logit_loss import scratch


def general(inputs: Inputs, outputs: Tensors, grads: Tensor, grad_outputs: Tensors) -> None:
    """Writes grads and, unless they are None, outputs. On the CPU grad_outputs are in the weights already."""
    heads, target, _, weights, temperature, smoothing, ignore_index, standardize, _, _, needs_grad = inputs
    assert target is not None
    H, (N, C) = len(heads), heads[0].shape
    z = scratch("z", (H, N, C), torch.empty((), dtype=acc_dtype(heads), device=target.device))
    for mine, head in zip(z, heads, strict=True):
        mine.copy_(head)
    labels = Labels(target, C, smoothing, ignore_index, z.dtype)
    rows = Rows(z, temperature, standardize, [i for i in range(H) if weights[i * (H + 1)]])
    table = torch.tensor(weights, dtype=z.dtype, device=z.device).view(H, H + 1)
    if grad_outputs:
        above = sum((gradient for gradient in grad_outputs if gradient is not None), torch.zeros_like(table))
        table = torch.where(table == 0, 0, table * above)
    if any(needs_grad):
        _gradients(rows, labels, table, [i for i in range(H) if needs_grad[i]], temperature, grads)
    if outputs[0] is None:
        return
    ce, factors = labels.cross_entropy(rows)[:, None], torch.cat([table[:, :1], table[:, 1:] * temperature**2], 1)
    terms = factors * torch.cat([ce, rows.divergences()], 1)
    if table.device.type != "cpu" or not math.isfinite(terms.sum()):
        terms = torch.where(table == 0, 0, factors * torch.cat([ce, rows.careful_divergences()], 1))
    outputs[0].copy_(outputs[1].copy_(terms).sum())


class Rows:
    """Softmax statistics of all heads' rows: the shifted logits, these over T, the softmax of both.

    log p = scaled - log_sum. The largest probability gives log_sum, which spares a pass of exponentials.
    """

    def __init__(self, z: Tensor, temperature: float, standardize: bool, labelled: list[int]):
        """z [H, N, C] becomes the shifted logits; `labelled`: the heads with a cross-entropy, which is at T = 1."""
        cold = temperature == 1 and not standardize
        self.inverse, self.way_back = _inverse_temperature(z, temperature, standardize)
        self.shifted = z.sub_(z.amax(2, keepdim=True))
        self.scaled = z if cold else torch.mul(z, self.inverse, out=scratch("scaled", z.shape, z))
        self.p = torch.softmax(self.scaled, 2, out=scratch("p", z.shape, z))
        self.log_sum = -self.p.amax(2).log()
        self.p1, self.log_sum1 = self.p, self.log_sum
        if not cold:
            self.p1, self.log_sum1 = scratch("p1", z.shape, z), torch.zeros_like(self.log_sum)
            for i in labelled:
                torch.softmax(z[i], 1, out=self.p1[i])
                self.log_sum1[i] = -self.p1[i].amax(1).log()
        self.labelled = labelled

    def divergences(self) -> Tensor:
        """[H, H]: KL(p_j || p_i) at [i, j], mean over rows, unless a class is ruled out: log p = -inf."""
        cross = torch.bmm(self.p.transpose(0, 1), self.scaled.permute(1, 2, 0)) - self.log_sum.T[:, None]
        return (cross.diagonal(dim1=1, dim2=2)[:, :, None] - cross).mean(0).T  # cross [N, j, i]: sum_c p_j log p_i

    def careful_divergences(self) -> Tensor:
        """The same for every case; a class of probability 0 adds 0, not 0 * inf."""
        H, N = self.log_sum.shape
        pairs = torch.empty(H, H, dtype=self.p.dtype, device=self.p.device)
        for i, j in itertools.product(range(H), repeat=2):
            log_ratio = self.scaled[j] - self.scaled[i] + (self.log_sum[i] - self.log_sum[j])[:, None]
            pairs[i, j] = torch.where(self.p[j] == 0, 0, self.p[j] * log_ratio).sum() / N
        return pairs


def _gradients(
    rows: Rows, labels: "Labels", table: Tensor, learners: list[int], temperature: float, grads: Tensor
) -> None:
    """grads [learners, N, C]: one product of the table with all heads' probabilities, and the labels' part."""
    H, N, _ = rows.p.shape
    pulls = table[:, 1:]
    towards = (pulls.sum(1).diag() - pulls).mul_(temperature / N)
    plain = rows.p1 is rows.p and not labels.soft and labels.kept is None
    if plain:  # the labels' softmax is the teachers': one product serves both
        towards += (table[:, 0] / N).diag()
    mine = slice(None) if len(learners) == H else learners
    gradient = grads if grads.dtype == rows.p.dtype else scratch("gradient", grads.shape, rows.p)
    on_cpu = rows.p.device.type == "cpu"
    if on_cpu:
        torch.mm(towards[mine], rows.p.flatten(1), out=gradient.flatten(1))
    if not on_cpu or not math.isfinite(rows.log_sum.sum()):  # with a factor of 0 not even NaN counts
        for out, factors in zip(gradient, towards[mine, :, None, None], strict=True):
            torch.sum(torch.where(factors == 0, 0, factors * rows.p), 0, out=out)
    if rows.way_back:
        gradient.copy_(rows.way_back(gradient, learners))
    labelled = [rows.p1[i] if i in rows.labelled else None for i in learners]
    labels.add_gradient(gradient, None if plain else labelled, table[mine, 0])
    if gradient is not grads:
        grads.copy_(gradient)


def _inverse_temperature(
    z: Tensor, temperature: float, standardize: bool
) -> tuple[float | Tensor, Callable[[Tensor, list[int]], Tensor] | None]:
    """(1 / T or 1 / (T (std + eps)) [H, N, 1], the gradient's way back from the z-score times T to the logits)"""
    if not standardize:
        return 1 / temperature, None
    takes_part = z != -torch.inf
    count = takes_part.sum(2, keepdim=True)
    off = torch.where(takes_part, z - torch.where(takes_part, z, 0).sum(2, keepdim=True) / count, 0)
    degrees = (count - 1).clamp(min=1)
    std = (off.square().sum(2, keepdim=True) / degrees).sqrt()
    scale = 1 / (std + 1e-7)

    def way_back(gradient: Tensor, learners: list[int]) -> Tensor:
        u, s, d, r = (tensor[learners] for tensor in (off, std, degrees, scale))
        factor = torch.where(s > 0, r * r / (d * s), 0)
        return gradient * r - factor * (gradient * u).sum(2, keepdim=True) * u

    return scale / temperature, way_back


class Labels:
    """The target as the loss uses it: a class or a distribution per row, smoothed, with ignored rows."""

    def __init__(self, target: Tensor, classes: int, smoothing: float, ignore_index: int | None, dtype: torch.dtype):
        self.soft, self.smoothing, self.classes = target.is_floating_point(), smoothing, classes
        self.kept = None if ignore_index is None or self.soft else target != ignore_index
        self.count = len(target) if self.kept is None else self.kept.sum().clamp(min=1)
        if self.soft:
            self.y = target.to(dtype) * (1 - smoothing) + smoothing / classes if smoothing else target.to(dtype)
        else:
            self.y = (target if self.kept is None else target.where(self.kept, 0))[:, None]

    def cross_entropy(self, rows: Rows) -> Tensor:
        """[H]: mean over the rows that count."""
        if self.soft:
            log_p = rows.shifted - rows.log_sum1[:, :, None]
            each = -torch.where(self.y == 0, 0, self.y * log_p).sum(2)
        else:
            each = rows.log_sum1 - rows.shifted.gather(2, self.y.expand(len(rows.p), -1, 1))[:, :, 0]
            if self.smoothing:
                spread = rows.log_sum1 - rows.shifted.mean(2)
                each = (1 - self.smoothing) * each + self.smoothing * spread
        return (each if self.kept is None else each.where(self.kept, 0)).sum(1) / self.count

    def add_gradient(self, gradient: Tensor, p: list[Tensor | None] | None, weights: Tensor) -> None:
        """gradient[l] += weights[l] (p[l] - y) / count; without p, its part is there already; None at weight 0."""
        scale = (weights / self.count)[:, None, None].expand(-1, gradient.shape[1], 1)
        if self.kept is not None:
            scale = scale * self.kept[:, None]
        mass = self.y.sum(1, keepdim=True) if self.soft else 1
        for mine, q, factor in zip(gradient, p or [], scale, strict=bool(p)):
            if q is not None:
                mine.addcmul_(q, factor * mass)
        if self.soft:
            gradient -= scale * self.y
            return
        if self.smoothing:
            gradient -= scale * (self.smoothing / self.classes)
        gradient.scatter_add_(2, self.y.expand(len(gradient), -1, 1), (self.smoothing - 1) * scale)
