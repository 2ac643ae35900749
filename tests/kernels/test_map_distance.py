"""The distances of maps against formulations of our own in float64: per element, with the gradient by hand."""

import math

import pytest
import torch

from fastkd.kernels.gpu.map_distance import launch
from fastkd.kernels.map_distance import (
    Inputs,
    _map_distance,
    bn_margin,
    hint_distance,
    hint_distance_reference,
    overhaul_distance,
    overhaul_distance_reference,
)

LAST = torch.channels_last
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def independent(s, t, margin=None, weight=1.0):
    """Value and gradient in float64, by the four cases of the paper's figure."""
    s, t = s.detach().double(), t.detach().double()
    if margin is None:
        return weight * ((s - t) ** 2).mean(), 2 * weight * (s - t) / s.numel()
    t = t.maximum(margin.double().view(1, -1, 1, 1))
    error = torch.where(t > 0, s - t, (s - t).clamp(min=0))
    return weight * error.pow(2).sum() / len(s), 2 * weight * error / len(s)


def maps(shape, dtype=torch.float32, device="cpu", format=LAST, seed=0):
    g = torch.Generator().manual_seed(seed)
    s, t = (torch.randn(shape, generator=g).to(device, dtype).contiguous(memory_format=format) for _ in range(2))
    return s.requires_grad_(), t, -torch.rand(shape[1], generator=g).to(device)


def distance(s, t, margin, **weight):
    return hint_distance(s, t, **weight) if margin is None else overhaul_distance(s, t, margin, **weight)


def check(s, t, margin, weight=1.0, upstream=1.0):
    value = distance(s, t, margin, weight=weight)
    (upstream * value).backward()
    want, want_grad = independent(s, t, margin, weight)
    wide = torch.float64 in (s.dtype, t.dtype)
    assert value.dtype == (torch.float64 if wide else torch.float32) and s.grad.dtype == s.dtype
    torch.testing.assert_close(value.double(), want, rtol=1e-12 if wide else 1e-5, atol=0)
    eps = torch.finfo(s.dtype).eps if wide or s.dtype.itemsize == 2 else 1e-6
    tiny = 6e-8 if s.dtype == torch.float16 else 1e-12
    torch.testing.assert_close(s.grad.double(), upstream * want_grad, rtol=4 * eps, atol=tiny)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 8, 4, 3), (3, 5, 7, 1), (2, 16, 1, 1)])
@pytest.mark.parametrize("overhaul", [False, True])
def test_value_and_gradient(shape, dtype, overhaul, device):
    for format in (LAST, torch.contiguous_format):
        s, t, margin = maps(shape, dtype, device, format)
        check(s, t, margin if overhaul else None, weight=0.7)
        assert s.grad.is_contiguous(memory_format=format)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("overhaul", [False, True])
def test_upstream_gradient_and_mixed_dtypes(overhaul, device):
    for dtype, other in [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float16),
        (torch.float32, torch.double),
    ]:
        s, t, margin = maps((2, 8, 3, 4), dtype, device)
        check(s, t.to(other), margin if overhaul else None, upstream=3.0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("overhaul", [False, True])
def test_strides(overhaul, device):
    s, t, margin = maps((2, 8, 4, 6), device=device)
    margin = margin if overhaul else None
    for student in (s.detach().contiguous(), s.detach()):
        for teacher in (t.contiguous(), t, t[:1].expand_as(t), t[..., :1].expand_as(t)):
            check(student.clone().requires_grad_(), teacher, margin)
    wide = torch.randn(2, 16, 4, 12, device=device).contiguous(memory_format=LAST)
    for student in (wide[:, 1::2, :, ::2], wide[:, :8, :, :6], wide.contiguous()[:, :8, :, 3:9]):
        student = student.detach().requires_grad_()
        check(student, t, margin)
        check(t.clone().requires_grad_(), student.detach(), margin)


@pytest.mark.parametrize("device", DEVICES)
def test_a_loss_scale_saves_what_fp16_cannot_hold(device):
    s, t, _ = maps((8, 64, 16, 16), torch.float16, device)
    (65536.0 * hint_distance(s, t, weight=1e-3)).backward()
    torch.testing.assert_close(s.grad.double(), 65536 * independent(s, t, weight=1e-3)[1], rtol=2e-3, atol=6e-8)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("overhaul", [False, True])
def test_second_backward(overhaul, device):
    s, t, margin = maps((2, 4, 3, 3), device=device)
    value = distance(s, t, margin if overhaul else None)
    want = independent(s, t, margin if overhaul else None)[1].float()
    first = torch.autograd.grad(value, s, retain_graph=True)[0]
    second = torch.autograd.grad(2 * value, s, retain_graph=True)[0]
    third = torch.autograd.grad(value, s)[0]
    for got, factor in ((first, 1), (second, 2), (third, 1)):
        torch.testing.assert_close(got, factor * want, rtol=1e-5, atol=1e-7)


def test_only_the_student_learns():
    s, t, margin = maps((2, 4, 3, 3))
    t.requires_grad_()
    margin.requires_grad_()
    overhaul_distance(s, t, margin).backward()
    assert t.grad is None and margin.grad is None
    with torch.no_grad():
        assert not hint_distance(s, t).requires_grad
    assert not hint_distance(s.detach(), t).requires_grad
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(hint_distance(s, t), s, create_graph=True)


@pytest.mark.parametrize("device", DEVICES)
def test_infinity_nan_and_large_values(device):
    margin = torch.tensor([-1.0], device=device)

    def one(s, t, function=overhaul_distance):
        s = torch.full((1, 1, 1, 1), s, device=device, requires_grad=True)
        t = torch.full((1, 1, 1, 1), t, device=device)
        value = function(s, t, margin) if function == overhaul_distance else function(s, t)
        value.backward()
        return value.item(), s.grad.item()

    assert one(-math.inf, -math.inf) == (0, 0) and one(-math.inf, -0.5) == (0, 0)
    assert one(0.5, -math.inf) == (2.25, 3.0)
    assert one(math.inf, -2.0) == (math.inf, math.inf)
    assert one(1e4, -1e4, hint_distance) == pytest.approx((4e8, 4e4))
    for s, t in ((math.nan, -1.0), (math.nan, 1.0), (-2.0, math.nan), (2.0, math.nan)):
        for function in (overhaul_distance, hint_distance):
            assert all(math.isnan(x) for x in one(s, t, function))
    margin.fill_(math.nan)
    assert all(math.isnan(x) for x in one(-2.0, -3.0))


def test_gradcheck():
    s, t, margin = maps((2, 3, 2, 2), torch.float64)
    assert torch.autograd.gradcheck(hint_distance, (s, t))
    assert torch.autograd.gradcheck(lambda x: overhaul_distance(x, t, margin, weight=0.3), (s,))


def test_references():
    s, t, margin = maps((2, 3, 4, 5), torch.float64)
    for got, want in [
        (hint_distance_reference(s, t, weight=0.2), independent(s, t, weight=0.2)),
        (overhaul_distance_reference(s, t, margin, weight=0.2), independent(s, t, margin, weight=0.2)),
    ]:
        torch.testing.assert_close(got.detach(), want[0], rtol=1e-12, atol=0)
        torch.testing.assert_close(torch.autograd.grad(got, s)[0], want[1], rtol=1e-12, atol=0)
    s.data[0, 0, 0, 0] = math.nan
    assert overhaul_distance_reference(s, t, margin).isnan()


@pytest.mark.parametrize("shape", [(0, 3, 2, 2), (2, 3, 0, 2)])
def test_empty_maps_give_0(shape):
    s, t, margin = maps(shape)
    value = hint_distance(s, t) + 2 * overhaul_distance(s, t, margin)
    value.backward()
    assert value == 0 and s.grad.shape == shape


def test_closed_form_in_several_pieces():
    s, t, margin = maps((5, 8, 128, 130), torch.float32)  # 133,120 elements a sample
    check(s, t, margin)
    s, t, margin = maps((5, 8, 64, 66), torch.bfloat16, format=torch.contiguous_format)
    check(s, t, margin, upstream=2.0)


@pytest.mark.parametrize("overhaul", [False, True])
def test_opcheck(overhaul):
    for dtype, format in ((torch.float32, LAST), (torch.bfloat16, torch.contiguous_format)):
        s, t, margin = maps((2, 4, 3, 3), dtype, format=format)
        margin = margin if overhaul else None
        torch.library.opcheck(torch.ops.fastkd.map_distance.default, (s, t, margin, 0.5, True))
        torch.library.opcheck(torch.ops.fastkd.map_distance.default, (s.detach(), t, margin, 0.5, False))
        arguments = (s.detach(), t, margin, 0.5, torch.tensor(2.0))
        torch.library.opcheck(torch.ops.fastkd.map_distance_backward.default, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_break(dynamic):
    loss = torch.compile(
        lambda s, t, m: 2 * hint_distance(s, t) + overhaul_distance(s, t, m), fullgraph=True, dynamic=dynamic
    )
    for n in (2, 3) if dynamic else (2,):
        s, t, margin = maps((n, 4, 3, 3))
        value = loss(s, t, margin)
        value.backward()
        want = [2 * a + b for a, b in zip(independent(s, t), independent(s, t, margin), strict=True)]
        torch.testing.assert_close((value.detach(), s.grad), tuple(x.float() for x in want), rtol=1e-5, atol=1e-6)


KERNEL_CASES = [
    (shape, dtype, format, margin)
    for shape in [(2, 8, 4, 4), (3, 5, 3, 1), (2, 24, 20, 16), (1, 16, 1, 1), (2, 9, 23, 12)]
    for dtype, format in [(torch.float32, LAST), (torch.bfloat16, LAST), (torch.float16, torch.contiguous_format)]
    for margin in (False, True)
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape, dtype, format, overhaul", KERNEL_CASES)
def test_kernel(shape, dtype, format, overhaul, device):
    s, t, margin = maps(shape, dtype, device, format)
    s, margin = s.detach(), margin if overhaul else None
    grad = torch.full_like(s, torch.nan)
    inputs, value, again = (
        Inputs(s, t, margin, 0.5),
        torch.full((), torch.nan, device=device),
        torch.zeros((), device=device),
    )
    launch(inputs, (value,), grad)
    want, want_grad = independent(s, t, margin, weight=0.5)
    torch.testing.assert_close(value.double(), want, rtol=1e-5, atol=0)
    rtol, atol = (4 * torch.finfo(dtype).eps, 6e-8 if dtype == torch.float16 else 1e-12)
    torch.testing.assert_close(grad.double(), want_grad, rtol=rtol, atol=atol)
    launch(inputs, (again,), None)
    assert again == value  # without a gradient; and the same in every run
    kept, above = grad.clone(), torch.ones((), device=device)
    launch(inputs, (None,), grad.fill_(7), (above,), True)
    assert (grad == 7).all()
    launch(inputs, (None,), grad, (above,), False)
    assert torch.equal(grad, kept)
    launch(inputs, (None,), grad.fill_(torch.nan), (-3 * above,), True)
    torch.testing.assert_close(grad.double(), -3 * want_grad, rtol=rtol, atol=atol)


@pytest.mark.parametrize("device", DEVICES)
def test_kernel_keeps_nan_and_masks_infinity(device):
    s = torch.tensor([math.nan, -2.0, -math.inf, -1.0, 0.5, math.inf, -math.inf, 3.0], device=device).view(1, 8, 1, 1)
    t = torch.tensor([-1.0, math.nan, -math.inf, -2.0, -math.inf, -3.0, 2.0, -3.0], device=device).view(1, 8, 1, 1)
    margin = -torch.ones(8, device=device)
    margin[7] = math.nan
    grad, value = torch.zeros_like(s), torch.zeros((), device=device)
    launch(Inputs(s, t, margin, 1.0), (value,), grad)
    assert value.isnan()
    want = torch.tensor([math.nan, math.nan, 0.0, 0.0, 3.0, math.inf, -math.inf, math.nan], device=device)
    torch.testing.assert_close(grad.view(-1), want, equal_nan=True)


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    s = torch.zeros(2**15 + 1, 64, 32, 32, dtype=torch.bfloat16, device="cuda").contiguous(memory_format=LAST)
    s[-1] = 2
    s.requires_grad_()
    margin = -torch.ones(64, device="cuda")
    value = overhaul_distance(s, torch.zeros_like(s), margin, weight=len(s))
    value.backward()
    assert value == 4 * 2**16 and (s.grad[-1] == 4).all() and s.grad[:-1].count_nonzero() == 0


def test_margin_is_the_mean_below_zero():
    weight = torch.tensor([1.0, -0.5, 2.0, 1.0, 0.0, 0.0, 0.0, 1e-3])
    bias = torch.tensor([0.0, 0.3, -1.0, 4.0, 0.0, 1.0, -2.0, -5.0])
    got = bn_margin(weight.requires_grad_(), bias)
    for margin, w, b in zip(got[:4].tolist(), weight.abs().tolist(), bias.tolist(), strict=False):
        chance = 0.5 * math.erfc(b / w / math.sqrt(2))
        density = math.exp(-((b / w) ** 2) / 2) / math.sqrt(2 * math.pi)
        assert margin == pytest.approx(b - w * density / chance if chance > 0.001 else -3 * w, rel=1e-6)
    samples = torch.randn(400_000, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.3
    assert got[1].item() == pytest.approx(samples[samples < 0].mean().item(), rel=1e-2)
    assert got[3:6].tolist() == [-3.0, 0.0, 0.0] and got[6:].tolist() == pytest.approx([-2.0, -5.0])
    assert got.dtype == torch.float32 and not got.requires_grad
    assert bn_margin(weight.bfloat16(), bias.bfloat16()).dtype == torch.float32
    assert bn_margin(weight.double(), bias.double()).dtype == torch.float64
    assert bn_margin(torch.tensor([math.nan, 0.0]), torch.tensor([1.0, math.nan])).isnan().all()


@pytest.mark.parametrize(
    "student, teacher, margin, words",
    [
        (torch.ones(2, 3, 4, 4), torch.ones(2, 3, 4, 5), torch.ones(3), r"\[2, 3, 4, 4\] and teacher \[2, 3, 4, 5\]"),
        (torch.ones(2, 3), torch.ones(2, 3), torch.ones(3), r"\[N, C, H, W\], got \[2, 3\]"),
        (torch.ones(2, 3, 4, 4).long(), torch.ones(2, 3, 4, 4), torch.ones(3), "int64"),
        (torch.ones(2, 3, 4, 4), torch.ones(2, 3, 4, 4), torch.ones(4), r"\[4\]"),
        (torch.ones(2, 3, 4, 4), torch.ones(2, 3, 4, 4), torch.ones(3, 1, 1), r"\[3, 1, 1\]"),
        (torch.ones(2, 3, 4, 4), torch.ones(2, 3, 4, 4, device="meta"), torch.ones(3), "meta"),
        (torch.ones(2, 3, 4, 4), torch.ones(2, 3, 4, 4), torch.ones(3).int(), "int32"),
    ],
)
def test_bad_input_names_shapes(student, teacher, margin, words):
    with pytest.raises(ValueError, match=words):
        overhaul_distance(student, teacher, margin)
    if margin.shape == (3,) and margin.is_floating_point():
        with pytest.raises(ValueError, match=words):
            hint_distance(student, teacher)


def test_bad_batchnorm():
    with pytest.raises(ValueError, match=r"\[3\].*\[4\]"):
        bn_margin(torch.ones(3), torch.ones(4))


def test_the_plain_operation_leaves_its_outputs_alone():
    s, t, margin = maps((2, 4, 3, 3))
    value, left = torch.ops.fastkd.map_distance(s, t, margin, 1.0, True)
    kept = left.clone()
    (5 * value).backward()
    torch.testing.assert_close(s.grad, 5 * kept)
    assert torch.equal(left, kept)


def test_one_launch_serves_both(monkeypatch):
    """Both distances go through the same operation and differ by the margin alone."""
    seen = []
    run = _map_distance.closed_form
    monkeypatch.setattr(_map_distance, "closed_form", lambda *a: seen.append(a[0].margin) or run(*a))
    s, t, margin = maps((2, 4, 3, 3))
    assert hint_distance(s, t) > 0 and overhaul_distance(s, t, margin) > 0
    assert seen[0] is None and torch.equal(seen[1], margin)
