"""Errors against float64 are no larger than eager PyTorch's in the same dtype; those of logit_loss: in its tests."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fastkd.bench.losses import baselines as eager
from fastkd.kernels import attention_transfer, dist_loss, dkd_loss, factor_distance, hint_distance, overhaul_distance

SEEDS, ROUNDING = 12, 2e-7


def logits(scale: float, *shape: int) -> Callable[[torch.Generator], list[Tensor]]:
    def make(generator):
        s, t = (scale * torch.randn(shape, generator=generator) for _ in range(2))
        return [s, t, torch.randint(shape[1], shape[:1], generator=generator)]

    return make


def maps(count: int, *shape: int) -> Callable[[torch.Generator], list[Tensor]]:
    return lambda generator: [
        torch.randn(shape, generator=generator).contiguous(memory_format=torch.channels_last) for _ in range(count)
    ]


class Case(NamedTuple):
    ours: Callable[..., Tensor]
    eager: Callable[..., Tensor]
    make: Callable[[torch.Generator], list[Tensor]]
    learners: int = 1


def margin(s: Tensor) -> Tensor:
    return torch.full((s.shape[1],), -0.5, dtype=s.dtype)


CASES = {f"DKD {C}": Case(dkd_loss, eager.dkd, logits(3.0, 16, C)) for C in (2, 10, 1000)}
CASES |= {f"DIST {C}": Case(lambda s, t, y: dist_loss(s, t), lambda s, t, y: eager.dist(s, t), logits(3.0, 16, C))
          for C in (10, 1000)}  # fmt: skip
CASES |= {
    "IE-KD": Case(
        lambda a, b, t: factor_distance([a, b], t, [1.0, -1.0]).loss, eager.factor_pair, maps(3, 16, 8, 5, 5), 2
    ),
    "AT": Case(attention_transfer, eager.attention_transfer, maps(2, 16, 8, 5, 5)),
    "hint": Case(hint_distance, eager.hint, maps(2, 16, 8, 5, 5)),
    "overhaul": Case(
        lambda s, t: overhaul_distance(s, t, margin(s)), lambda s, t: eager.overhaul(s, t, margin(s)),
        maps(2, 16, 8, 5, 5),
    ),
}  # fmt: skip


def gradients(function, tensors: list[Tensor], learners: int) -> Tensor:
    leaves = [x.detach().clone().requires_grad_(place < learners) for place, x in enumerate(tensors)]
    found = torch.autograd.grad(function(*leaves), leaves[:learners])
    return torch.cat([gradient.flatten() for gradient in found]).double()


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_as_exact_as_eager(name):
    """Relative errors in the L2 norm, the mean over seeds; half as much again, and a rounding, are noise."""
    case, ours, theirs = CASES[name], 0.0, 0.0
    for seed in range(SEEDS):
        tensors = case.make(torch.Generator().manual_seed(seed))
        exact = [x.double() if x.is_floating_point() else x for x in tensors]
        want = gradients(case.eager, exact, case.learners)
        ours += (gradients(case.ours, tensors, case.learners) - want).norm() / want.norm() / SEEDS
        theirs += (gradients(case.eager, tensors, case.learners) - want).norm() / want.norm() / SEEDS
    assert ours <= 1.5 * theirs + ROUNDING, f"{ours:.2g}, eager {theirs:.2g}"
