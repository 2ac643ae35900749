"""The same as test_mutations.py for the other operations: each is compared with the eager formulation in float64."""

import importlib
import shutil

import pytest
import torch
import torch.nn.functional as F
from mutants import KERNELS, load, mutant

from fastkd.bench.losses import baselines as eager

N, C = 5, 10
attention_transfer, dist_loss, dkd_loss, factor_distance, map_distance = (
    importlib.import_module(f"fastkd.kernels.{name}")  # the package has functions of the same names
    for name in ("attention_transfer", "dist_loss", "dkd_loss", "factor_distance", "map_distance")
)
NAN = torch.nan


def wanted(formula, learners, *tensors):
    """(value, gradients of the first `learners`) in float64"""
    copies = [x.double() if x.is_floating_point() else x for x in tensors]
    copies = [x.requires_grad_(place < learners) for place, x in enumerate(copies)]
    value = formula(*copies)
    return [value.detach(), *torch.autograd.grad(value, copies[:learners])]


def logits(count):
    generator = torch.Generator().manual_seed(0)
    wide = [torch.randn(N, C + 6, generator=generator) * 3 for _ in range(count)]
    return [x[:, :C] for x in wide]  # padded rows


def maps(count, *shape):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).contiguous(memory_format=torch.channels_last) for _ in range(count)]


def dkd(modules):
    s, t = logits(2)
    y, want = torch.arange(N), wanted(eager.dkd, 1, s, t, torch.arange(N))
    for compute in (modules["gpu/dkd_loss"].launch, modules["cpu/dkd_loss"].closed_form):
        (grads, again), value = torch.full((2, N, C), NAN), torch.full((), NAN)
        inputs = dkd_loss.Inputs(s, t, y, 1.0, 8.0, 4.0)
        compute(inputs, (value,), grads)
        compute(inputs, (None,), again, (torch.tensor(0.5),))
        yield from zip((value, grads, 2 * again), (*want, want[1]), strict=True)


def factors(modules):
    maps_3 = maps(3, N, 3, 2, 2)
    for p, formula in ((1, eager.factor_pair), (2, factor_pair_of_squares)):
        want, inputs = (
            wanted(formula, 2, *maps_3),
            factor_distance.Inputs(maps_3[:2], maps_3[2], [1.0, -1.0], p, [True] * 2),
        )
        for compute in (modules["gpu/factor_distance"].launch, modules["cpu/factor_distance"].closed_form):
            loss, terms, statistics = (torch.full(shape, NAN) for shape in ((), (2,), (5, N)))
            grads = torch.full((2, N, 2, 2, 3), NAN).movedim(-1, -3)
            compute(inputs, (loss, terms, statistics), grads if p == 1 else grads[:0])
            yield from ((loss, want[0]), (terms.sum(), want[0]))
            yield from zip(grads, want[1:], strict=True) if p == 1 else ()
            grads.fill_(NAN)
            compute(inputs, (None, terms, statistics), grads, (torch.tensor(0.5), None))
            yield from zip(2 * grads, want[1:], strict=True)


def factor_pair_of_squares(near, far, teacher):
    near, far, t = (F.normalize(x.flatten(1)) for x in (near, far, teacher))
    return (near - t).square().mean().sqrt() - (far - t).square().mean().sqrt()


def residuals(modules):
    s, t = maps(2, N, 8, 3, 3)
    margin = -torch.rand(8, generator=torch.Generator().manual_seed(1))
    for compute in (modules["gpu/map_distance"].launch, modules["cpu/map_distance"].closed_form):
        for floor in (None, margin):
            grad, again, value = torch.full_like(s, NAN), torch.full_like(s, NAN), torch.full((), NAN)
            inputs = map_distance.Inputs(s, t, floor, 1.0)
            compute(inputs, (value,), grad)
            compute(inputs, (None,), again, (torch.tensor(0.5),))
            want = wanted(eager.hint, 1, s, t) if floor is None else wanted(eager.overhaul, 1, s, t, floor)
            yield from zip((value, grad, 2 * again), (*want, want[1]), strict=True)


def correlations(modules):
    s, t = (x.contiguous() for x in logits(2))
    want = wanted(eager.dist, 1, s, t)
    inputs = dist_loss.Inputs(s, t, 1.0, 1.0, 1.0)
    for compute in (modules["gpu/dist_loss"].launch, modules["cpu/dist_loss"].closed_form):
        value, rows, columns, grads = (torch.full(shape, NAN) for shape in ((), (6, N), (4, C), (N, C)))
        compute(inputs, (value, rows, columns), None)
        compute(inputs, (None, rows, columns), grads, (torch.tensor(0.5),))
        yield from zip((value, 2 * grads), want, strict=True)


def attention(modules):
    s, t = maps(2, N, 8, 3, 3)
    want = wanted(eager.attention_transfer, 1, s, t)
    value, k, grad = torch.full((), NAN), torch.full((N, 9), NAN), torch.full_like(s, NAN)
    launch = modules["gpu/attention_transfer"].launch
    launch(attention_transfer.Inputs(s, t, 1.0), (value, k), None)
    launch(attention_transfer.Inputs(s, None, 1.0), (None, k), grad, (torch.tensor(0.5),))
    yield from zip((value, 2 * grad), want, strict=True)


OPERATIONS = {
    "dkd_loss": (dkd, ("gpu", "cpu")),
    "factor_distance": (factors, ("gpu", "cpu")),
    "map_distance": (residuals, ("gpu", "cpu")),
    "dist_loss": (correlations, ("gpu", "cpu")),
    "attention_transfer": (attention, ("gpu",)),
}
MUTATIONS = [
    ("gpu/dkd_loss", "beta * (r_s - r_t)", "beta * (r_s + r_t)"),
    ("gpu/dkd_loss", "scale * tl.where(cols == label, alpha * gap, others)", "scale * others"),  # no label
    ("gpu/dkd_loss", "scale *= tl.load(grad_output).to(tl.float32)", "scale *= 1.0"),
    ("gpu/dkd_loss", "inverse, scale = 1 / temperature, temperature / N", "inverse, scale = 1 / temperature, 1 / N"),
    ("gpu/dkd_loss", "row * (student_stride * UNIT)", "row * C"),
    ("gpu/dkd_loss", "row += tl.num_programs(0)", "row += N"),
    ("cpu/dkd_loss", "addcmul_(r[0], -alpha * scale * gap)", "addcmul_(r[0], alpha * scale * gap)"),
    ("cpu/dkd_loss", "(grad_outputs[0] if grad_outputs else 1)", "1"),
    ("cpu/dkd_loss", "temperature**2 / N", "temperature / N"),
    ("gpu/factor_distance", "_direction(x - t, P) - x * dots[k]", "_direction(x - t, P)"),  # the length counts
    ("gpu/factor_distance", "factors[k] * _inverse(norms[k])", "factors[k]"),
    ("gpu/factor_distance", "(weights[k] * inverse_elements,)", "(inverse_elements,)"),
    ("cpu/factor_distance", "self.x, self.dot / self.norm", "self.x, 0 * self.norm"),
    ("cpu/factor_distance", "self.x, self.dot, value=-1", "self.x, self.dot"),
    ("cpu/factor_distance", "self.x, self.t, self.ratio", "self.x, self.t, 1 / self.ratio"),
    ("cpu/factor_distance", "mul_(scale / self.norm)", "mul_(scale)"),
    ("cpu/factor_distance", "self.norm if p == 1 else self.norm * self.norm", "self.norm"),
    ("cpu/factor_distance", "factors = w / (N * D)", "factors = w / N"),
    ("cpu/factor_distance", "sum(0) / (N * D)", "sum(0) / N"),
    ("cpu/factor_distance", "pow_(p)", "pow_(1)"),
    ("gpu/map_distance", "(t <= 0) & (residual <= 0)", "residual <= 0"),
    ("gpu/map_distance", "factor = 2 * scale", "factor = scale"),
    ("gpu/map_distance", "factor *= given", "factor *= 1.0"),
    ("gpu/map_distance", "tl.where((t < floor) | (floor != floor), floor, t)", "t"),
    ("cpu/map_distance", "torch.maximum(t.to(dtype), margin)", "t.to(dtype)"),
    ("cpu/map_distance", "2 * scale * grad_outputs[0]", "2 * scale"),
    ("gpu/dist_loss", "a * (gamma / C)", "a * gamma"),
    ("gpu/dist_loss", "gamma * (1 - tl.sum(everything, 0) / C)", "gamma * (1 - tl.sum(everything, 0))"),
    ("gpu/attention_transfer", "scale * (e - a * pull)", "scale * e"),
    ("gpu/attention_transfer", "tl.sum(everything, 0) * loss_scale", "tl.sum(everything, 0)"),
    ("gpu/attention_transfer", "factor = scale * tl.load(k", "factor = tl.load(k"),
    ("cpu/dist_loss", "gamma * (1 - r_columns.mean())", "gamma * (1 - r_rows.mean())"),
    ("cpu/dist_loss", "-temperature * gamma / C", "-temperature * gamma / N"),
    ("cpu/dist_loss", "addcmul_(p_s, beta * a)", "addcmul_(p_s, a)"),
]


def right(op: str, modules: dict) -> bool:
    pairs = OPERATIONS[op][0](modules)
    return all(torch.allclose(x.double(), y, rtol=1e-4, atol=1e-4 * max(y.abs().max().item(), 1e-30)) for x, y in pairs)


def files(op: str) -> list[str]:
    return [f"{path}/{op}" for path in OPERATIONS[op][1]]


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(KERNELS, tmp_path / "mutant")
    return tmp_path / "mutant"


@pytest.mark.parametrize("op", OPERATIONS)
def test_the_comparison_accepts_the_operation(copy, op):
    assert right(op, load(copy, f"unchanged_{op}", *files(op)))


@pytest.mark.parametrize("file, before, after", MUTATIONS)
def test_a_mutation_is_caught(copy, file, before, after):
    op = file.rpartition("/")[2]
    assert not right(op, mutant(copy, file, before, after, *files(op)))
