"""factor_distance.py where there is no GPU: value and gradient together, in few passes of torch operations.

x^ - t^ is taken as (x - r t) / ||x|| with r = ||x|| / ||t||: no normalised copy is ever written, and equal factors
differ by exactly 0. It is also the path of fp64 on every device.
"""

import torch
from torch import Tensor

from .scratch import scratch

CHUNK = 1 << 20  # elements of a factor at a time: what the passes share stays in the last-level cache


def closed_form(
    parts: list[Tensor],
    teacher: Tensor,
    weights: list[float],
    p: int,
    learns: list[bool],
    loss: Tensor | None,
    terms: Tensor,
    statistics: Tensor,
    grads: Tensor,
    upstream: tuple[Tensor | None, Tensor | None] | None = None,
) -> None:
    """Forward (no `upstream`): loss, terms, statistics, and for p = 1 grads, are written. Backward: grads are."""
    N, D = teacher.shape
    xs, t = [x.detach().to(terms.dtype) for x in parts], teacher.to(terms.dtype)
    norms, dots = statistics[: len(xs) + 1], statistics[len(xs) + 1 :]
    if not upstream:
        for norm, x in zip(norms, (*xs, t), strict=True):
            torch.linalg.vector_norm(x, dim=1, out=norm)
    scales = _scales(norms, _factors(weights, p, N * D, terms, upstream))
    sums = None if upstream else torch.empty_like(dots)
    order = iter(grads)
    slots = [next(order) if learner and len(grads) else None for learner in learns]
    rows = N if t.device.type != "cpu" else max(1, CHUNK // D)
    for start in range(0, N, rows):
        some = slice(start, start + rows)
        for k, (x, slot) in enumerate(zip(xs, slots, strict=True)):
            part = Part(x[some], t[some], p, scales[:, k, some], dots[k, some], None if slot is None else slot[some])
            if not upstream:
                part.measure(sums[k, some])
            if slot is not None:
                part.gradient(measured=not upstream)
    if not upstream:
        distances = sums.sum(1) / (N * D)
        distances = distances if p == 1 else distances.sqrt()
        torch.stack([d * w if w else torch.zeros_like(d) for d, w in zip(distances, weights, strict=True)], out=terms)
        torch.sum(terms, 0, out=loss)


def _factors(weights: list[float], p: int, elements: int, terms: Tensor, upstream) -> Tensor:
    """What the gradients are multiplied by: weight / N_el, over the distance for p = 2, times what comes from above."""
    w = terms.new_tensor(weights)
    factors = w / elements
    if upstream is None:
        return factors
    if p == 2:  # the distance is term / weight; at distance 0 the gradient is 0
        factors = torch.where(terms == 0, 0, w * factors / terms)
    return factors * sum(gradient for gradient in upstream if gradient is not None)


def _scales(norms: Tensor, factors: Tensor) -> Tensor:
    """[3, K, N, 1]: ||x|| / ||t||, which is exactly 1 for equal norms; 1 / ||x||; factor / ||x||, 0 at norm 0."""
    clamped = norms.clamp(min=1e-12)
    inverse, ratio = 1 / clamped[:-1], clamped[:-1] / clamped[-1]
    return torch.stack([ratio, inverse, torch.where(norms[:-1] <= 1e-12, 0, inverse) * factors[:, None]])[..., None]


class Part:
    """Some samples of one part, x [n, D], and of the teacher's factor t."""

    def __init__(self, x: Tensor, t: Tensor, p: int, scales: Tensor, dot: Tensor, out: Tensor | None):
        """scales [3, n, 1]; dot [n], <x^, direction>, is written or read; out [n, D]: where the gradient goes."""
        self.x, self.t, self.p, self.dot, self.out = x, t, p, dot, out
        self.ratio, self.inverse, self.scale = scales
        fits = out is not None and out.dtype == x.dtype
        self.work = out if fits else scratch("difference", x.shape, x)  # the gradient is made where it goes

    def _difference(self) -> Tensor:
        return torch.addcmul(self.x, self.t, self.ratio, value=-1, out=self.work)

    def measure(self, total: Tensor) -> None:
        """Writes <x^, direction>, and sum |x^ - t^|^p of every sample into total [n]."""
        difference, spare, inverse = self._difference(), scratch("spare", self.x.shape, self.x), self.inverse[:, 0]
        if self.p == 1:  # torch's own 1-norm takes four times as long
            torch.sum(torch.abs(difference, out=spare), 1, out=total)
            total.mul_(inverse)
            difference.sign_()
        else:
            torch.linalg.vector_norm(difference, dim=1, out=total)
            total.mul_(inverse).square_()
        torch.sum(torch.mul(difference, self.x, out=spare), 1, out=self.dot)
        self.dot.mul_(inverse if self.p == 1 else inverse * inverse)
        self.dot.add_(total, alpha=0)  # the sign of NaN is 0 in torch, the distance of its sample is NaN

    def gradient(self, measured: bool) -> None:
        """factor * (direction - x^ dot) / ||x||"""
        x, work, pull = self.x, self.work, -self.inverse * self.dot[:, None]
        if self.p == 1:
            direction = work if measured else self._difference().sign_()
            direction.addcmul_(x, pull).mul_(self.scale)
        else:
            torch.mul(x, self.scale * (self.inverse + pull), out=work)
            work.addcmul_(self.t, self.scale * self.inverse * self.ratio, value=-1)
        if work is not self.out:
            self.out.copy_(work)
