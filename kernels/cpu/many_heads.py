"""The closed form for any number of heads with integer labels: half the calls of cpu/logit_loss.py.

With z the logits over T and L their log-sums, log p = z - L, and for all pairs of heads at once

    sum_c p_j log p_i = cross[j, i] - L_i,    KL(p_j || p_i) = (L_i - cross[j, i]) - (L_j - cross[j, j])

The price of the one product for all pairs: the divergence is a difference of sums as large as the logits, so that its
error is some 1e-7 of E[z] whatever its value. Of heads that agree to 0.01 (KL about 5e-5 at T = 1) it is off by
0.1 to 0.2 %, up to 15 times what torch's own log_softmax and kl_div are off by. Gradients come from p_i - p_j and are
not concerned. Subtracting one head from all before the product would be one more pass over the logits.
"""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..op import acc_dtype
from .scratch import scratch
from .student_teacher import WIDEST


def many_heads(
    heads: Sequence[Tensor],
    target: Tensor,
    weights: Sequence[float],
    temperature: float,
    needs_grad: Sequence[bool],
    grads: Tensor,
) -> Tensor | None:
    """The weighted terms [H, 1 + H], means over the batch, in fp64; the gradients go into grads [learners, N, C].

    None where this would not be exact, as in student_teacher.py.
    """
    H, (N, C), dtype = len(heads), heads[0].shape, acc_dtype(heads)
    scale, towards, from_label = _constants(tuple(weights), tuple(needs_grad), temperature, N, dtype)
    z = torch.stack(list(heads), out=scratch("z", (H, N, C), scale.to(dtype)))
    if temperature != 1:
        z.mul_(1 / temperature)
    p = torch.softmax(z, 2, out=scratch("p", z.shape, z))
    label = target.view(1, N, 1).expand(H, N, 1)
    log_p = p.gather(2, label).double().log_()
    log_sum = z.gather(2, label).double().sub_(log_p)
    if not torch.maximum(log_sum.abs(), -log_p).amax() <= WIDEST:
        return None
    cross = torch.bmm(p.transpose(0, 1), z.permute(1, 2, 0)).sum(0, dtype=torch.float64)
    divergence = log_sum.sum(1, dtype=torch.float64) - cross.T
    divergence = divergence - divergence.diagonal()
    gradient = grads if grads.dtype == dtype else scratch("gradient", grads.shape, z)
    torch.mm(towards, p.view(H, N * C), out=gradient.view(len(grads), N * C))
    if temperature != 1:
        _labelled(heads, label[0], weights, needs_grad, z, log_p, gradient)
        if not log_p.amin() >= -WIDEST:
            return None
    gradient.scatter_add_(2, label[: len(grads)], from_label.expand(-1, N, 1))
    if gradient is not grads:
        grads.copy_(gradient)
    ce = -log_p.sum(1, dtype=torch.float64)
    terms = torch.cat([ce, divergence], 1).mul_(scale)
    return terms if math.isfinite(terms.sum()) else None


def _labelled(
    heads: Sequence[Tensor],
    label: Tensor,
    weights: Sequence[float],
    needs_grad: Sequence[bool],
    room: Tensor,
    log_p: Tensor,
    gradient: Tensor,
) -> None:
    """The cross-entropies' part where their softmax, at temperature 1, is not that of the divergences."""
    N, rows = len(label), iter(gradient)
    for i, learner in enumerate(needs_grad):
        mine, weight = next(rows) if learner else None, weights[i * (len(heads) + 1)]
        if weight:
            p = torch.softmax(heads[i].to(room.dtype), 1, out=room[i])
            log_p[i] = p.gather(1, label).double().log_()
            if mine is not None:
                mine.add_(p, alpha=weight / N)


@functools.lru_cache(maxsize=64)
def _constants(
    weights: tuple[float, ...], needs_grad: tuple[bool, ...], temperature: float, N: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """[H, 1 + H] factors of the terms; [learners, H] from softmax to gradients; [learners, 1, 1] what labels add."""
    H, learners = len(needs_grad), [i for i, learner in enumerate(needs_grad) if learner]
    scale = torch.tensor(weights, dtype=torch.float64, device="cpu").view(H, H + 1) / N
    ce, pulls = scale[:, 0], scale[:, 1:]
    towards = (pulls.sum(1).diag() - pulls) * temperature
    if temperature == 1:
        towards += ce.diag()
    from_label = -ce[learners, None, None].to(dtype)
    pulls *= temperature**2
    return scale, towards[learners].to(dtype), from_label
