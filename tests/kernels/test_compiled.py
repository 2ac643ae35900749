"""Inside torch.compile on the CPU the compiler gets plain formulas, which it fuses: equal to the eager call."""

import pytest
import torch

from fastkd.kernels import (
    attention_transfer,
    dist_loss,
    dkd_loss,
    factor_distance,
    hint_distance,
    kd_loss,
    logit_loss,
    overhaul_distance,
)

N, C = 6, 10
MAP = (N, 8, 3, 5)
MARGIN = torch.linspace(-1, -0.1, 8)
LABELS = torch.arange(N) % C
SOFT = torch.rand(N, C, generator=torch.Generator().manual_seed(1)).softmax(1)
IGNORED = torch.tensor([-100, 1, 2, -100, 4, 5])
TABLE = [[0.0, 1.0, 0.0], [0.5, 0.0, 2.0], [0.0, 0.0, 0.0]]


def mutual(a, b, c, **options):
    return logit_loss([a, b, c], LABELS, [1.0, 0.0, 0.3], TABLE, **options)


def summed(terms):
    """One number that depends on every term, each with a gradient of its own."""
    return sum((k + 1) * term.sum() for k, term in enumerate(terms))


LOGITS = {  # of three sets of logits
    "kd": lambda s, t, _: kd_loss(s, t, LABELS).loss,
    "kd, terms": lambda s, t, _: summed(kd_loss(s, t, LABELS)[:3]),
    "kd, smoothing": lambda s, t, _: kd_loss(s, t, LABELS, label_smoothing=0.1).loss,
    "kd, soft target": lambda s, t, _: kd_loss(s, t, SOFT, temperature=1.0).loss,
    "kd, soft target and smoothing": lambda s, t, _: kd_loss(s, t, SOFT, label_smoothing=0.2).loss,
    "kd, ignored rows": lambda s, t, _: kd_loss(s, t, IGNORED, ignore_index=-100).loss,
    "kd, all rows ignored": lambda s, t, _: kd_loss(s, t, torch.full_like(LABELS, -1), ignore_index=-1).loss,
    "kd, standardised": lambda s, t, _: kd_loss(s, t, LABELS, standardize=True).loss,
    "kd, no labels": lambda s, t, _: kd_loss(s, t, LABELS, ce_weight=0.0).loss,
    "kd, no teacher": lambda s, t, _: kd_loss(s, t, LABELS, kd_weight=0.0).loss,
    "mutual": lambda *z: summed(mutual(*z)[:2]),
    "mutual, options": lambda *z: mutual(*z, temperature=3.0, label_smoothing=0.1, standardize=True).loss,
    "dkd": lambda s, t, _: dkd_loss(s, t, LABELS),
    "dkd, options": lambda s, t, _: dkd_loss(s, t, LABELS, alpha=0.5, beta=2.0, temperature=1.0),
    "dist": lambda s, t, _: dist_loss(s, t),
    "dist, options": lambda s, t, _: dist_loss(s, t, beta=0.5, gamma=2.0, temperature=3.0),
}
MAPS = {  # of three maps
    "factors": lambda a, b, t: summed(factor_distance([a, b], t, [1.0, -1.0])),
    "factors, p = 2": lambda a, b, t: factor_distance([a, b], t, [1.0, -0.5], p=2).loss,
    "factors, weight 0": lambda a, b, t: factor_distance([a, b], t, [0.0, 2.0]).loss,
    "attention": lambda s, t, _: attention_transfer(s, t, weight=100.0),
    "hint": lambda s, t, _: hint_distance(s, t, weight=3.0),
    "overhaul": lambda s, t, _: overhaul_distance(s, t, MARGIN.to(s.dtype)),
}
LOSSES = LOGITS | MAPS
each_loss = pytest.mark.parametrize("name", LOSSES)


def tensors(name, dtype=torch.float32, batch=N, channels_last=False):
    """Three, of which the last is the same for all dtypes."""
    shape = (batch, C) if name in LOGITS else (batch, *MAP[1:])
    made = 3 * torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    if channels_last:
        return [x.clone().contiguous(memory_format=torch.channels_last).requires_grad_() for x in made]
    return [x.clone().requires_grad_() for x in made]


def results(loss, inputs):
    """[value, gradients], 0 for what gets none"""
    value = loss(*inputs)
    gradients = torch.autograd.grad(value, inputs, allow_unused=True)
    return [value.detach(), *(torch.zeros_like(x) if g is None else g for x, g in zip(inputs, gradients, strict=True))]


def compiled(loss, backend="aot_eager", **options):
    torch._dynamo.reset()
    return torch.compile(loss, fullgraph=True, backend=backend, **options)


EACH_FORMULA = ["kd, terms", "kd, soft target", "mutual, options", "dkd", "dist", *MAPS]


@pytest.mark.parametrize(
    "name, dtype",
    [
        *((name, torch.float32) for name in LOSSES),
        *((name, dtype) for name in EACH_FORMULA for dtype in (torch.bfloat16, torch.float64)),
    ],
)
def test_value_and_gradients_equal_the_eager_ones(name, dtype):
    loss, inputs = LOSSES[name], tensors(name, dtype)
    got, want = results(compiled(loss), inputs), results(loss, inputs)
    for x, y in zip(got, want, strict=True):
        assert x.dtype == y.dtype
    torch.testing.assert_close(got, want, rtol=1e-2 if dtype == torch.bfloat16 else 2e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["kd, ignored rows", "mutual", "dkd", "dist", "factors", "attention", "overhaul"])
def test_inductor(name):
    loss, inputs = LOSSES[name], tensors(name)
    torch.testing.assert_close(results(compiled(loss, "inductor"), inputs), results(loss, inputs))


@pytest.mark.parametrize("name", MAPS)
def test_channels_last(name):
    inputs = tensors(name, channels_last=True)
    torch.testing.assert_close(results(compiled(LOSSES[name]), inputs), results(LOSSES[name], inputs))


@pytest.mark.parametrize("name", EACH_FORMULA)
def test_autocast_changes_nothing(name):
    loss, inputs = LOSSES[name], tensors(name)

    def under_autocast(*x):
        with torch.autocast("cpu", torch.bfloat16):
            return loss(*x)

    torch.testing.assert_close(results(compiled(under_autocast), inputs), results(loss, inputs))


@pytest.mark.parametrize("name", ["dist", *MAPS])
def test_batches_of_any_size(name):
    function = compiled(LOSSES[name], dynamic=True)
    for batch in (2, 5):
        inputs = tensors(name, batch=batch)
        torch.testing.assert_close(results(function, inputs), results(LOSSES[name], inputs))


@pytest.mark.parametrize("name", ["dist", *MAPS])
def test_an_empty_batch_gives_0(name):
    assert compiled(LOSSES[name])(*tensors(name, batch=0)) == 0


@pytest.mark.parametrize("loss", [dkd_loss, lambda *z: kd_loss(*z).loss])
def test_a_label_that_is_no_class_gives_nan(loss):
    s, t, _ = tensors("kd")
    value, gradient, _ = results(compiled(lambda s, t: loss(s, t, LABELS + C)), [s, t])
    assert value.isnan() and gradient.isnan().all()


@pytest.mark.parametrize("standardize", [False, True])
def test_classes_that_are_ruled_out(standardize):
    def loss(s, t, _):
        s, t = (z.index_fill(1, torch.tensor([7, 9]), -torch.inf) for z in (s, t))
        return kd_loss(s, t, LABELS, standardize=standardize).loss

    inputs = tensors("kd")
    torch.testing.assert_close(results(compiled(loss), inputs), results(loss, inputs))


@each_loss
def test_the_compiler_sees_no_operator_of_ours(name):
    seen = []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    torch.compile(LOSSES[name], backend=backend, fullgraph=True)(*tensors(name))
    assert seen and not [target for target in seen if "fastkd" in target]
