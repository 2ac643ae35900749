"""factor_distance.py where there is no GPU: value and gradient together, in few passes of torch operations.

x^ - t^ is taken as (x - r t) / ||x|| with r = ||x|| / ||t||: no normalised copy is ever written, and equal factors
differ by exactly 0. Calls on the numbers of a sample, [n, 1], take time as well: there are few.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..factor_distance import Inputs
from ..op import Tensors
from .logit_loss import scratch

CHUNK = 1 << 19
"""Elements of a factor at a time: what the passes share stays in the last-level cache."""
NO_NORM = 1e-12
"""A norm up to here counts as this, and its part gets no gradient."""


def closed_form(inputs: Inputs, outputs: Tensors, grads: Tensor, grad_outputs: Tensors = ()) -> None:
    """See FusedOp. For p = 2 only the backward pass has gradients."""
    (parts, teacher, out), (loss, terms, statistics) = inputs.rows(grads), outputs
    _, _, weights, p, needs_grad = inputs
    N, D = teacher.shape
    chunks = math.ceil(N * D / CHUNK) if teacher.device.type == "cpu" else 1
    rows, w = math.ceil(N / chunks), terms.new_tensor(weights)
    factors = w / (N * D)  # of the gradients
    if grad_outputs:
        if p == 2:  # over the distance, which is term / weight; at distance 0 the gradient is 0
            factors = torch.where(terms == 0, 0, w * factors / terms)
        factors = factors * sum(gradient for gradient in grad_outputs if gradient is not None)
    slots = iter(out.unbind())
    outs = [next(slots, None) if learner else None for learner in needs_grad]
    sums = []
    for start in range(0, N, rows):
        some = slice(start, start + rows) if rows < N else ...
        xs, t = [x[some].detach().to(terms.dtype) for x in parts], teacher[some].to(terms.dtype)
        here = [out if out is None else out[some] for out in outs]
        sums.append(_samples(xs, t, p, statistics[:, some, None], factors[:, None, None], here, loss is not None))
    if loss is not None:
        distances = torch.stack([x for x in sums if x is not None]).sum(0) / (N * D)
        torch.mul(distances if p == 1 else distances.sqrt_(), w, out=terms)
        if 0.0 in weights:
            terms.masked_fill_(w == 0, 0)
        torch.sum(terms, 0, out=loss)


def _samples(
    xs: Sequence[Tensor],
    t: Tensor,
    p: int,
    statistics: Tensor,
    factors: Tensor,
    outs: list[Tensor | None],
    forward: bool,
) -> Tensor | None:
    """Forward [K]: sum |x^ - t^|^p of some samples of each part, [n, D]. Gradients go into outs, where there is one."""
    norms, dots = statistics[: len(xs) + 1], statistics[len(xs) + 1 :]
    if forward:
        for x, norm in zip((*xs, t), norms.unbind(), strict=True):
            torch.linalg.vector_norm(x, dim=1, keepdim=True, out=norm)
    norms = norms.clamp(min=NO_NORM)
    own, totals = norms[:-1], torch.empty_like(dots)
    ratios, scales = own / norms[-1], factors / torch.threshold(own, NO_NORM, math.inf)  # 1 for equal norms; 0 for none
    each = (tensor.unbind() for tensor in (own, ratios, scales, dots, totals))
    for x, out, norm, ratio, scale, dot, total in zip(xs, outs, *each, strict=True):
        in_place = out is not None and out.dtype == x.dtype
        part = Part(x, t, out if in_place else scratch("difference", x.shape, x), norm, ratio, dot)
        if forward:
            part.measure(p, total)
        if out is not None:
            part.gradient(p, scale, measured=forward)
        if out is not None and not in_place:
            out.copy_(part.work)
    return totals.div_(own).pow_(p).sum((1, 2)) if forward else None


class Part(NamedTuple):
    """Some samples of one part."""

    x: Tensor
    t: Tensor
    work: Tensor  # [n, D], where the gradient is made
    norm: Tensor
    ratio: Tensor  # ||x|| / ||t||
    dot: Tensor  # <x^, direction>

    def _difference(self) -> Tensor:
        return torch.addcmul(self.x, self.t, self.ratio, value=-1, out=self.work)

    def measure(self, p: int, total: Tensor) -> None:
        """Writes <x^, direction>, and |x - r t| of every sample into total, in the norm of p."""
        difference, spare = self._difference(), scratch("spare", self.x.shape, self.x)
        if p == 1:  # torch's own 1-norm takes four times as long
            torch.sum(torch.abs(difference, out=spare), 1, keepdim=True, out=total)
            difference.sign_()
        else:
            torch.linalg.vector_norm(difference, dim=1, keepdim=True, out=total)
        torch.sum(torch.mul(difference, self.x, out=spare), 1, keepdim=True, out=self.dot)
        self.dot.div_(self.norm if p == 1 else self.norm * self.norm)
        self.dot.add_(total, alpha=0)  # the sign of NaN is 0 in torch, the distance of its sample is NaN

    def gradient(self, p: int, scale: Tensor, measured: bool) -> None:
        """work becomes scale * (direction - x^ dot); for p = 1 measuring left the direction there."""
        if p == 1:
            direction = self.work if measured else self._difference().sign_()
            direction.addcmul_(self.x, self.dot / self.norm, value=-1).mul_(scale)
        else:
            self._difference().addcmul_(self.x, self.dot, value=-1).mul_(scale / self.norm)
