"""Distances of normalised factors against formulas of our own in float64, written sample by sample."""

import math

import pytest
import torch
import torch._functorch.config

from fastkd.kernels.factor_distance import Inputs, _factor_distance, factor_distance, factor_distance_reference
from fastkd.kernels.gpu.factor_distance import launch

GPU = pytest.param("cuda", marks=pytest.mark.gpu)
KERNEL = pytest.mark.parametrize("device", ["cpu", GPU])  # on the CPU the kernel runs in Triton's interpreter
PAIR = [50.0, -30.0]


def independent(parts, teacher, weights, p):
    """(terms, gradients) from the closed forms, in float64."""
    t_hat = [row / max(row.norm(), 1e-12) for row in teacher.double().flatten(1)]
    terms, gradients = [], []
    for x, w in zip(parts, weights, strict=True):
        rows = x.double().flatten(1)
        hats = [row / max(row.norm(), 1e-12) for row in rows]
        total = sum(((a - b).abs() ** p).sum() for a, b in zip(hats, t_hat, strict=True))
        distance = (total / teacher.numel()) ** (1 / p)
        terms.append(w * distance)
        each = []
        for row, a, b in zip(rows, hats, t_hat, strict=True):
            g = (a - b).sign() if p == 1 else (a - b) / (distance or 1)
            g = w * g / teacher.numel()
            each.append((g - a * (a @ g)) / row.norm() if row.norm() > 1e-12 else torch.zeros_like(row))
        gradients.append(torch.stack(each).view(x.shape))
    return torch.stack(terms), gradients


def factors(shape, dtype=torch.float32, parts=2, layout=torch.channels_last, device="cpu", scale=1.0):
    g = torch.Generator().manual_seed(0)
    maps = [torch.randn(shape, generator=g, dtype=torch.float64) * scale for _ in range(parts + 1)]
    *parts, teacher = (x.to(device, dtype).contiguous(memory_format=layout) for x in maps)
    return [x.requires_grad_() for x in parts], teacher


def close(got, want, dtype, scale=1.0):
    """Within the rounding of the gradient's own dtype; a sign may not flip, so ties are kept out of the data."""
    tolerance = {torch.float64: 1e-11, torch.float32: 3e-5}.get(dtype, 2 * torch.finfo(dtype).eps)
    smallest = 1e-7 if dtype == torch.float16 else 0  # half a step of its subnormal numbers, and more
    largest = max(want.abs().max().item(), 1e-300)
    torch.testing.assert_close(got.cpu().double(), want.cpu(), rtol=tolerance, atol=tolerance * largest + smallest)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 5, 3, 2), (4, 16, 4, 4), (2, 7, 1, 1)])
@pytest.mark.parametrize("device", ["cpu", GPU])
def test_value_and_gradient(device, shape, dtype, p):
    parts, teacher = factors(shape, dtype, device=device)
    got = factor_distance(parts, teacher, PAIR, p)
    terms, gradients = independent([x.detach().cpu() for x in parts], teacher.cpu(), PAIR, p)
    assert got.loss.dtype == got.terms.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for value, want in ((got.loss, terms.sum()), (got.terms, terms)):
        torch.testing.assert_close(value.cpu().double(), want, rtol=2e-5, atol=1e-5)
    got.loss.backward()
    if shape == (1, 1, 1, 1):  # x^ is 1 or -1: no gradient, and for p = 2 a rounding error over a rounding error
        assert all(x.grad.isfinite().all() and (p == 2 or x.grad.abs().max() < 1e-4) for x in parts)
        return
    for x, want in zip(parts, gradients, strict=True):
        assert x.grad.dtype == dtype and x.grad.stride() == x.stride()
        close(x.grad, want, dtype)


@pytest.mark.parametrize("p", [1, 2])
def test_reference(p):
    parts, teacher = factors((3, 4, 2, 3), torch.float64)
    got = factor_distance_reference(parts, teacher, PAIR, p)
    terms, gradients = independent([x.detach() for x in parts], teacher, PAIR, p)
    torch.testing.assert_close(got.terms, terms)
    torch.testing.assert_close(torch.autograd.grad(got.loss, parts), tuple(gradients))


@pytest.mark.parametrize("p", [1, 2])
def test_exploration_is_inheritance_with_the_other_sign(p):
    parts, teacher = factors((4, 6, 3, 3))
    pair = [parts[0], parts[0].detach().clone().requires_grad_()]
    got = factor_distance(pair, teacher, [7.0, -7.0], p)
    got.loss.backward()
    assert got.loss == 0 and got.terms[0] == -got.terms[1] > 0
    assert torch.equal(pair[0].grad, -pair[1].grad) and pair[0].grad.abs().sum() > 0


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e6])
def test_bounds_and_scale_invariance(scale):
    parts, teacher = factors((4, 6, 3, 3), scale=scale)
    got = factor_distance(parts, teacher, [1.0, 1.0])
    got.loss.backward()
    D = teacher[0].numel()
    for x, term in zip(parts, got.terms, strict=True):
        assert 0 <= term <= 2 / math.sqrt(D)
        along = (x.detach() * x.grad).flatten(1).double().sum(1)
        assert along.abs().max() < 1e-5 * (x.norm() * x.grad.norm())
    rescaled = [x.detach() * torch.tensor([0.5, 3.0, 10.0, 1.7])[:, None, None, None] for x in parts]
    torch.testing.assert_close(factor_distance(rescaled, teacher, [1.0, 1.0]).terms, got.terms)
    opposite = factor_distance([-teacher], teacher, [1.0], 2).loss  # the largest distance for p = 2
    torch.testing.assert_close(opposite, torch.tensor(2 / math.sqrt(D)))


@pytest.mark.parametrize("p", [1, 2])
@KERNEL
def test_equal_factors_and_zeros(device, p):
    parts, teacher = factors((4, 3, 5, 5), parts=1, device=device)
    equal = teacher.clone().requires_grad_()
    got = factor_distance([equal], teacher, [3.0], p)
    got.loss.backward()
    assert got.loss == 0 and equal.grad.abs().max() == 0
    with torch.no_grad():
        parts[0][1] = 0
    factor_distance(parts, teacher, [3.0], p).loss.backward()
    assert parts[0].grad[1].abs().max() == 0 and parts[0].grad[0].abs().max() > 0
    assert factor_distance([torch.zeros_like(teacher)], torch.zeros_like(teacher), [1.0], p).loss == 0
    torch.testing.assert_close(
        factor_distance(parts, torch.zeros_like(teacher), [3.0], p).loss,
        factor_distance_reference(parts, torch.zeros_like(teacher), [3.0], p).loss,
    )


@pytest.mark.parametrize("p", [1, 2])
def test_layouts(p):
    """Channels-last, NCHW, slices of the batch and of the channels, and mixtures give the same."""
    parts, teacher = factors((4, 6, 3, 5))
    leaves = [x.detach().clone().requires_grad_() for x in parts]
    want = torch.autograd.grad(factor_distance(leaves, teacher, PAIR, p).loss, leaves)
    wide, tall = torch.zeros(4, 9, 3, 5), torch.zeros(8, 6, 3, 5)
    wide[:, 2:8], tall[::2] = parts[0].detach(), parts[0].detach()
    for first in (
        parts[0].detach().contiguous(),
        wide[:, 2:8],
        tall[::2],
        parts[0].detach().permute(2, 3, 0, 1).clone().permute(2, 3, 0, 1),
    ):
        for second in (parts[1].detach(), parts[1].detach().contiguous()):
            for t in (teacher, teacher.contiguous()):
                now = [first.requires_grad_(), second.requires_grad_()]
                got = torch.autograd.grad(factor_distance(now, t, PAIR, p).loss, now)
                torch.testing.assert_close(got, want)
                first, second = first.detach(), second.detach()


@pytest.mark.parametrize("p", [1, 2])
def test_upstream_gradients_and_second_backward(p):
    parts, teacher = factors((3, 4, 3, 3))
    (one,) = [torch.autograd.grad(factor_distance(parts, teacher, PAIR, p).loss, parts)]
    got = factor_distance(parts, teacher, PAIR, p)
    for factor in (1.0, -2.5, 1.0, 3.0):
        scaled = torch.autograd.grad(got.loss * factor, parts, retain_graph=True)
        torch.testing.assert_close(scaled, tuple(g * factor for g in one))
    both = torch.autograd.grad(2 * got.loss + got.terms @ torch.tensor([3.0, -1.0]), parts, retain_graph=True)
    torch.testing.assert_close(both, (5 * one[0], one[1]))
    (first,) = torch.autograd.grad(got.terms[0], parts[:1], retain_graph=True)
    torch.testing.assert_close(first, one[0])
    assert all(torch.isfinite(g).all() and g.abs().sum() == 0 for g in torch.autograd.grad(0 * got.loss, parts))


def test_loss_scaling_saves_half_precision_from_underflow():
    """Gradients below the smallest fp16 number: the loss is scaled before they are rounded."""
    parts, teacher = factors((2, 4, 3, 3), torch.float16, scale=1e4)
    (got,) = torch.autograd.grad(factor_distance(parts[:1], teacher, [1.0]).loss * 65536.0, parts[:1])
    _, (want,) = independent([parts[0].detach()], teacher, [1.0], 1)
    assert want.abs().max() < 1e-6
    torch.testing.assert_close(got.double(), want * 65536, rtol=2e-3, atol=1e-5)


def test_who_gets_a_gradient():
    parts, teacher = factors((3, 4, 2, 2))
    teacher.requires_grad_()
    parts[1].requires_grad_(False)
    factor_distance(parts, teacher, PAIR).loss.backward()
    assert teacher.grad is None and parts[1].grad is None and parts[0].grad is not None
    off = parts[0].detach().mul(torch.nan).requires_grad_()
    got = factor_distance([off, parts[0]], teacher, [0.0, 2.0])  # weight 0: off, whatever it holds
    got.loss.backward()
    assert got.loss == got.terms[1] and got.terms[0] == 0 and off.grad is None
    with torch.no_grad():
        assert not factor_distance(parts, teacher, PAIR).loss.requires_grad
    mixed = [parts[0].detach().bfloat16().requires_grad_(), parts[1].detach().requires_grad_()]
    factor_distance(mixed, teacher, PAIR).loss.backward()
    assert mixed[0].grad.dtype == torch.bfloat16 and mixed[1].grad.dtype == torch.float32


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("which", ["part", "teacher"])
@KERNEL
def test_nan_shows(device, which, p):
    parts, teacher = factors((3, 4, 2, 2), parts=1, device=device)
    with torch.no_grad():
        (parts[0] if which == "part" else teacher)[1, 0, 0, 0] = torch.nan
    got = factor_distance(parts, teacher, [1.0], p)
    got.loss.backward()
    assert got.loss.isnan() and parts[0].grad[1].isnan().all()


@pytest.mark.parametrize("p", [1, 2])
def test_empty_batch(p):
    parts, teacher = factors((0, 4, 2, 2))
    got = factor_distance(parts, teacher, PAIR, p)
    got.loss.backward()
    assert got.loss == 0 and got.terms.tolist() == [0, 0] and parts[0].grad.shape == (0, 4, 2, 2)


def check_anything(shape, weights, scale, p, layout, kernel):
    if math.prod(shape[1:]) == 1:  # of one number x^ is its sign, and there is no gradient
        return
    device = "cuda" if kernel and torch.cuda.is_available() else "cpu"
    parts, teacher = factors(shape, torch.float32, len(weights), layout, device, scale)
    terms, gradients = independent([x.detach().cpu() for x in parts], teacher.cpu(), weights, p)
    with pytest.MonkeyPatch.context() as patch:
        if kernel:
            patch.setattr("fastkd.kernels.op.runs_on_gpu", lambda device, dtype: True)
        got = factor_distance(parts, teacher, weights, p)
        got.loss.backward() if any(weights) else None
    torch.testing.assert_close(got.terms.cpu().double(), terms, rtol=2e-5, atol=1e-5)
    for x, w, want in zip(parts, weights, gradients, strict=True):
        close(x.grad, want, torch.float32) if w else None


def test_anything():
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    given = hypothesis.given(
        shape=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3)),
        weights=st.lists(st.sampled_from([-2.0, 0.0, 0.5, 30.0]), min_size=1, max_size=3),
        scale=st.sampled_from([1e-3, 1.0, 1e3]),
        p=st.sampled_from([1, 2]),
        layout=st.sampled_from([torch.channels_last, torch.contiguous_format]),
        kernel=st.booleans(),
    )
    hypothesis.settings(max_examples=15, deadline=None, derandomize=True)(given(check_anything))()


def test_errors():
    parts, teacher = factors((2, 4, 3, 3))
    for arguments, message in [
        (([], teacher, []), "1 or more"),
        ((parts, teacher, [1.0]), "2 factors"),
        ((parts, teacher, PAIR, 3), "got 3"),
        ((parts, teacher[:, :2], PAIR), r"\[2, 4, 3, 3\] and \[2, 2, 3, 3\]"),
        (([x.flatten(1) for x in parts], teacher.flatten(1), PAIR), "N, C, H, W"),
        ((parts, teacher.int(), PAIR), "int32"),
        ((parts, teacher.to("meta"), PAIR), "meta"),
    ]:
        with pytest.raises(ValueError, match=message):
            factor_distance(*arguments)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(factor_distance(parts, teacher, PAIR).loss, parts, create_graph=True)


@pytest.mark.parametrize("p", [1, 2])
def test_gradcheck(p):
    parts, teacher = factors((2, 3, 2, 2), torch.float64)
    torch.autograd.gradcheck(lambda *x: factor_distance(list(x), teacher, PAIR, p).terms, parts)


@pytest.mark.parametrize("p", [1, 2])
def test_opcheck(p):
    parts, teacher = factors((3, 4, 2, 2))
    maps = [x.detach().requires_grad_() for x in parts]
    torch.library.opcheck(_factor_distance.op, (maps, teacher, PAIR, p, [True, True], True))
    maps = [x.detach() for x in maps]
    _, terms, statistics, _ = _factor_distance.op(maps, teacher, PAIR, p, [True, False], True)
    arguments = (maps, teacher, PAIR, p, [True, False], terms, statistics, torch.tensor(2.0), None)
    torch.library.opcheck(torch.ops.fastkd.factor_distance_backward.default, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
@torch._functorch.config.patch(donated_buffer=False)  # else a compiled function refuses a second backward
def test_compiles_without_a_break(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, y, t: factor_distance([x * 2, y], t, PAIR).loss * 3, fullgraph=True, dynamic=dynamic
    )
    for batch in (3, 5):
        parts, teacher = factors((batch, 4, 3, 3))
        got, want = compiled(*parts, teacher), factor_distance(parts, teacher, PAIR).loss * 3
        torch.testing.assert_close(got, want)
        want = torch.autograd.grad(want, parts)
        for factor in (2.0, 1.0 / 3):  # upstream gradients of 6, then of 1
            again = torch.autograd.grad(got, parts, torch.tensor(factor), retain_graph=True)
            torch.testing.assert_close(again, tuple(g * factor for g in want))


def as_maps(rows):
    """[..., D] -> [..., D, 1, 1]"""
    return [x[..., None, None] for x in rows] if isinstance(rows, list) else rows[..., None, None]


def poisoned(parts, p, device):
    """Outputs full of NaN: loss, terms, statistics, gradients."""
    K, (N, D) = len(parts), parts[0].shape
    nan = torch.full((), torch.nan, device=device)
    gradients = nan.to(parts[0].dtype).repeat(K if p == 1 else 0, N, D)
    return nan.clone(), nan.repeat(K), nan.repeat(2 * K + 1, N), gradients


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parts, D", [(1, 24), (2, 37), (2, 64), (1, 8200), (2, 8193)])
@KERNEL
def test_kernel(device, parts, D, dtype, p):
    """In registers and in pieces; sizes that are multiples of 8 and not; rows with gaps."""
    N = 5 if D < 8000 else 2
    maps, teacher = factors((N, D + 8, 1, 1), dtype, parts=parts, layout=torch.contiguous_format, device=device)
    rows = [x.detach().flatten(1)[:, :D] for x in maps]
    teacher, weights = teacher.flatten(1)[:, :D], PAIR[:parts]
    terms, gradients = independent(rows, teacher, weights, p)
    loss, got_terms, statistics, grads = poisoned(rows, p, device)
    inputs = Inputs(as_maps(rows), as_maps(teacher), weights, p, [True] * parts)
    launch(inputs, (loss, got_terms, statistics), as_maps(grads))
    torch.testing.assert_close(got_terms.cpu().double(), terms.cpu(), rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(loss.cpu(), got_terms.sum().cpu())
    for got, want in zip(grads, gradients, strict=p == 1):
        close(got, want, dtype)
    ones, twos = torch.ones((), device=device), torch.full((parts,), 2.0, device=device)
    for g_loss, g_terms, factor in ((ones, None, 1), (ones, twos, 3), (None, twos, 2)):
        again = torch.full((parts, N, D), torch.nan, dtype=dtype, device=device)
        launch(inputs, (None, got_terms, statistics), as_maps(again), (g_loss, g_terms))
        for got, want in zip(again, gradients, strict=True):
            close(got, factor * want, dtype)


@KERNEL
def test_kernel_skips_upstream_gradients_of_one(device):
    maps, teacher = factors((3, 8, 2, 2), device=device)
    rows = [x.detach().flatten(1) for x in maps]
    _, gradients = independent(rows, teacher.flatten(1), PAIR, 1)
    results = poisoned(rows, 1, device)
    inputs = Inputs(as_maps(rows), as_maps(teacher.flatten(1)), PAIR, 1, [False, True])
    launch(inputs, results[:3], as_maps(results[3][:1]))
    close(results[3][0], gradients[1], torch.float32)
    mark = torch.full((1, 3, 32), 7.0, device=device)
    one, zero_one = torch.ones((), device=device), torch.tensor([5.0, 0.0], device=device)
    launch(inputs, (None, *results[1:3]), as_maps(mark), (one, None), True)
    launch(inputs, (None, *results[1:3]), as_maps(mark), (one, zero_one), True)  # 5: of a part without a gradient
    assert (mark == 7).all()
    launch(inputs, (None, *results[1:3]), as_maps(mark), (one * 2, None), True)
    close(mark[0], 2 * gradients[1], torch.float32)


@pytest.mark.parametrize("case", ["equal", "zero", "nan"])
@KERNEL
def test_kernel_special_rows(device, case):
    maps, teacher = factors((2, 40, 1, 1), parts=1, device=device)
    row, t = maps[0].detach().flatten(1), teacher.flatten(1)
    row[0] = {"equal": t[0], "zero": torch.zeros_like(t[0]), "nan": torch.full_like(t[0], torch.nan)}[case]
    loss, terms, statistics, grads = poisoned([row], 1, device)
    inputs = Inputs(as_maps([row]), as_maps(t), [2.0], 1, [True])
    launch(inputs, (loss, terms, statistics), as_maps(grads))
    assert grads[0, 0].isnan().all() if case == "nan" else (grads[0, 0] == 0).all()
    assert grads[0, 1].isfinite().all() and loss.isnan() == (case == "nan")


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", ["chunks", "kernel"])
def test_other_paths_of_the_operation(monkeypatch, path, dtype, p):
    """On the CPU: the closed form a few samples at a time; the kernels behind the public function."""
    if path == "chunks":
        monkeypatch.setattr("fastkd.kernels.cpu.factor_distance.CHUNK", 100)
    else:
        monkeypatch.setattr("fastkd.kernels.op.runs_on_gpu", lambda device, dtype: True)
    parts, teacher = factors((5, 4, 3, 3), dtype)
    got = factor_distance(parts, teacher, PAIR, p)
    terms, gradients = independent([x.detach() for x in parts], teacher, PAIR, p)
    torch.testing.assert_close(got.terms.double(), terms, rtol=2e-5, atol=1e-6)
    for factor in (2.0, 1.0):
        for x, want in zip(torch.autograd.grad(got.loss * factor, parts, retain_graph=True), gradients, strict=True):
            close(x, factor * want, dtype)
