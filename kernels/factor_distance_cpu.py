"""factor_distance.py where there is no GPU: value and gradient together, in few passes of torch operations.

x^ - t^ is taken as (x - r t) / ||x|| with r = ||x|| / ||t||: no normalised copy is ever written, and equal factors
differ by exactly 0. It is also the path of fp64 on every device.
"""

import torch
from torch import Tensor

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
    skip_ones: bool = False,
) -> None:
    """Forward (no `upstream`): loss, terms, statistics, and for p = 1 grads, are written. Backward: grads are."""
    if upstream and skip_ones and _all_ones(learns, *upstream):
        return  # the forward pass has left the gradients of this case
    N, D = teacher.shape
    rows = N if teacher.device.type != "cpu" else max(1, CHUNK // D)
    order = iter(range(len(parts)))
    slots = [next(order) if learner and len(grads) else None for learner in learns]
    factors = _factors(weights, p, N * D, terms, upstream)
    sums = terms.new_empty(len(parts), N)
    # one set of buffers for all chunks: fresh memory costs more than a pass
    buffers = terms.new_empty(len(parts) + 1, min(rows, N), D)
    for start in range(0, N, rows):
        chunk = slice(start, start + rows)
        xs = [x[chunk].detach().to(terms.dtype) for x in (*parts, teacher)]
        outs = [None if slot is None else grads[slot, chunk] for slot in slots]
        own = [b[: len(xs[0])] for b in buffers]  # differences go where the gradient will be, if of this dtype
        work = [b if out is None or out.dtype != b.dtype else out for b, out in zip(own, [*outs, None], strict=True)]
        samples = Samples(xs, p, statistics[:, chunk], work)
        if not upstream:
            samples.measure(sums[:, chunk])
        if any(slot is not None for slot in slots):
            samples.gradients(factors, outs, measured=not upstream)
    if not upstream:
        distances = sums.sum(1) / (N * D)
        distances = distances if p == 1 else distances.sqrt()
        torch.stack([d * w if w else torch.zeros_like(d) for d, w in zip(distances, weights, strict=True)], out=terms)
        torch.sum(terms, 0, out=loss)


def _all_ones(learns: list[bool], loss_gradient: Tensor | None, terms_gradient: Tensor | None) -> bool:
    """Asked on the CPU only, where the answer costs nothing."""
    if (loss_gradient if terms_gradient is None else terms_gradient).device.type != "cpu":
        return False
    if terms_gradient is None:
        return loss_gradient.item() == 1
    given = terms_gradient if loss_gradient is None else terms_gradient + loss_gradient
    return all(g == 1 for g, learner in zip(given.tolist(), learns, strict=True) if learner)


def _factors(weights: list[float], p: int, elements: int, terms: Tensor, upstream) -> list:
    """What the gradients are multiplied by: weight / N_el, over the distance for p = 2, times what comes from above."""
    factors = [w / elements for w in weights]
    if upstream is None:
        return factors
    if p == 2:  # the distance is term / weight; at distance 0 the gradient is 0
        factors = [torch.where(term == 0, 0, w * f / term) for f, w, term in zip(factors, weights, terms, strict=True)]
    loss_gradient, terms_gradient = upstream
    given = terms_gradient if loss_gradient is None else loss_gradient.expand(len(weights))
    given = given + terms_gradient if loss_gradient is not None and terms_gradient is not None else given
    return [f * g for f, g in zip(factors, given, strict=True)]


class Samples:
    """Some samples: K parts and the teacher, each [n, D]; their statistics [2 K + 1, n] are written, or read."""

    def __init__(self, xs: list[Tensor], p: int, statistics: Tensor, work: list[Tensor]):
        *self.parts, self.teacher = xs
        self.p, self.work = p, work
        self.norms, self.dots = statistics[: len(xs)], statistics[len(xs) :]

    def _scales(self) -> None:
        """[K, n, 1]: 1 / ||x|| and ||x|| / ||t||, which is exactly 1 for equal norms."""
        clamped = self.norms.clamp(min=1e-12)[:, :, None]
        inverse = 1 / clamped
        self.inverse, self.ratio = inverse[:-1], clamped[:-1] / clamped[-1]

    def measure(self, sums: Tensor) -> None:
        """Writes the statistics, and sum |x^ - t^|^p of every sample into sums [K, n]."""
        for norm, x in zip(self.norms, (*self.parts, self.teacher), strict=True):
            norm.copy_(torch.linalg.vector_norm(x, dim=1))
        self._scales()
        spare = self.work[-1]
        for x, ratio, difference, total, dot in zip(self.parts, self.ratio, self.work, sums, self.dots, strict=False):
            torch.addcmul(x, self.teacher, ratio, value=-1, out=difference)
            if self.p == 1:  # torch's own 1-norm takes four times as long
                torch.sum(torch.abs(difference, out=spare), 1, out=total)
                difference.sign_()
            else:
                total.copy_(torch.linalg.vector_norm(difference, dim=1))
            torch.sum(torch.mul(difference, x, out=spare), 1, out=dot)
        inverse = self.inverse[:, :, 0]
        sums *= inverse
        self.dots *= inverse if self.p == 1 else inverse * inverse
        self.dots += 0 * sums  # the sign of NaN is 0 in torch, the distance of its sample is NaN
        if self.p == 2:
            sums *= sums

    def gradients(self, factors: list, outs: list[Tensor | None], measured: bool) -> None:
        """factor * (direction - x^ dot) / ||x||"""
        if not measured:
            self._scales()
        scales = torch.where(self.norms[:-1, :, None] <= 1e-12, 0, self.inverse)
        pulls = -self.inverse * self.dots[:, :, None]
        for k, (x, out, work) in enumerate(zip(self.parts, outs, self.work, strict=False)):
            if out is None:
                continue
            if self.p == 1:
                if not measured:
                    torch.addcmul(x, self.teacher, self.ratio[k], value=-1, out=work).sign_()
                work.addcmul_(x, pulls[k]).mul_(scales[k] * factors[k])
            else:
                scale = scales[k] * factors[k]
                torch.mul(x, scale * (self.inverse[k] + pulls[k]), out=work)
                work.addcmul_(self.teacher, scale * self.inverse[k] * self.ratio[k], value=-1)
            if work is not out:
                out.copy_(work)
