"""Attention transfer against formulas of our own in float64, written sample by sample."""

import pytest
import torch

from fastkd.kernels.attention_transfer import (
    Inputs,
    _attention_transfer,
    attention_transfer,
    attention_transfer_reference,
)
from fastkd.kernels.gpu.attention_transfer import launch

GPU = pytest.param("cuda", marks=pytest.mark.gpu)
KERNEL = pytest.mark.parametrize("device", ["cpu", GPU])  # on the CPU the kernel runs in Triton's interpreter
LAYOUTS = {"channels_last": torch.channels_last, "NCHW": torch.contiguous_format}


def independent(student, teacher, weight):
    """(loss, gradient) with the derivative taken along the chain f -> q -> a, in float64."""
    student, teacher = student.double(), teacher.double()
    N, C, H, W = student.shape
    loss, gradient = 0.0, torch.zeros_like(student)
    for n in range(N):
        q_s, q_t = (f[n].square().mean(0).flatten() for f in (student, teacher))
        norm = q_s.norm()
        a, b = q_s / max(norm, 1e-12), q_t / max(q_t.norm(), 1e-12)
        loss += weight * (a - b).square().sum() / (N * H * W)
        if norm > 1e-12:
            jacobian = (torch.eye(H * W, dtype=torch.float64) - torch.outer(a, a)) / norm
            dq = jacobian @ (2 * weight * (a - b) / (N * H * W))
            gradient[n] = 2 * student[n] / C * dq.view(H, W)
    return loss, gradient


def maps(shape, teacher_channels, dtype=torch.float32, layouts=("channels_last",) * 2, device="cpu", scale=1.0):
    g = torch.Generator().manual_seed(0)
    sizes = shape, (shape[0], teacher_channels, *shape[2:])
    values = [torch.randn(size, generator=g, dtype=torch.float64) * scale for size in sizes]
    student, teacher = (
        value.to(device, dtype).contiguous(memory_format=LAYOUTS[to]) for value, to in zip(values, layouts, strict=True)
    )
    return student.requires_grad_(), teacher


def close(got, want, dtype):
    tolerance = {torch.float64: 1e-11, torch.float32: 2e-5}.get(dtype, 2 * torch.finfo(dtype).eps)
    smallest = 1e-7 if dtype == torch.float16 else 0  # half a step of its subnormal numbers, and more
    torch.testing.assert_close(
        got.cpu().double(), want.cpu(), rtol=tolerance, atol=tolerance * want.abs().max().item() + smallest
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape, teacher_channels", [((3, 5, 3, 2), 7), ((2, 16, 4, 4), 8), ((4, 1, 2, 5), 3)])
@pytest.mark.parametrize("student_layout", LAYOUTS)
@pytest.mark.parametrize("teacher_layout", LAYOUTS)
@KERNEL
def test_value_and_gradient(device, student_layout, teacher_layout, shape, teacher_channels, dtype):
    student, teacher = maps(shape, teacher_channels, dtype, (student_layout, teacher_layout), device)
    got = attention_transfer(student, teacher, 1000.0)
    loss, gradient = independent(student.detach().cpu(), teacher.cpu(), 1000.0)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and got.shape == ()
    torch.testing.assert_close(got.cpu().double(), loss, rtol=2e-5, atol=0)
    got.backward()
    assert student.grad.dtype == dtype and student.grad.stride() == student.stride()
    close(student.grad, gradient, dtype)


def test_reference():
    student, teacher = maps((3, 4, 2, 3), 6, torch.float64)
    loss, gradient = independent(student.detach(), teacher, 5.0)
    got = attention_transfer_reference(student, teacher, 5.0)
    torch.testing.assert_close(got, loss)
    torch.testing.assert_close(torch.autograd.grad(got, student)[0], gradient)


@KERNEL
def test_places_without_channels_in_order(device):
    """Slices of the batch, the channels, rows and columns, and transposed maps."""
    student, teacher = maps((4, 6, 3, 5), 8, device=device)
    _, gradient = independent(student.detach().cpu(), teacher.cpu(), 10.0)
    value = student.detach()
    wide, tall, gaps = (torch.zeros(size, device=device) for size in ((4, 9, 3, 5), (8, 6, 3, 5), (4, 6, 6, 7)))
    wide[:, 2:8], tall[::2], gaps[:, :, ::2, 1:6] = value, value, value
    last = torch.zeros(4, 3, 5, 9, device=device).permute(0, 3, 1, 2)
    last[:, 1:7] = value
    turned = value.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    for view in (wide[:, 2:8], tall[::2], gaps[:, :, ::2, 1:6], last[:, 1:7], turned):
        student = view.detach().requires_grad_()
        attention_transfer(student, teacher, 10.0).backward()
        close(student.grad, gradient, torch.float32)
        other = attention_transfer(teacher, view.detach(), 10.0)
        torch.testing.assert_close(other, attention_transfer(teacher, value, 10.0))


@pytest.mark.parametrize("scale", [1e-4, 1e4])
@KERNEL
def test_extreme_values(device, scale):
    student, teacher = maps((2, 8, 3, 3), 4, device=device, scale=scale)
    got = attention_transfer(student, teacher, 10.0)
    got.backward()
    loss, gradient = independent(student.detach().cpu(), teacher.cpu(), 10.0)
    torch.testing.assert_close(got.cpu().double(), loss, rtol=2e-5, atol=0)
    close(student.grad, gradient, torch.float32)


@KERNEL
def test_zeros_equal_maps_and_nan(device):
    student, teacher = maps((3, 4, 2, 2), 4, device=device)
    with torch.no_grad():
        student[1] = 0
    attention_transfer(student, teacher).backward()
    assert student.grad[1].abs().max() == 0 and student.grad[0].abs().max() > 0
    assert attention_transfer(torch.zeros_like(teacher), torch.zeros_like(teacher)) == 0
    equal = teacher.clone().requires_grad_()
    got = attention_transfer(equal, teacher, 1000.0)
    got.backward()
    assert got == 0 and equal.grad.abs().max() == 0
    for which in (0, 1):
        student, teacher = maps((3, 4, 2, 2), 4, device=device)
        with torch.no_grad():
            (student, teacher)[which][1, 0, 0, 0] = torch.nan
        got = attention_transfer(student, teacher)
        got.backward()
        assert got.isnan() and student.grad[1].isnan().all() and student.grad[0].isfinite().all()


@KERNEL
def test_upstream_gradients_and_second_backward(device):
    student, teacher = maps((3, 4, 3, 3), 2, device=device)
    got = attention_transfer(student, teacher, 100.0)
    _, gradient = independent(student.detach().cpu(), teacher.cpu(), 100.0)
    for factor in (1.0, -2.5, 0.0, 3.0):
        close(torch.autograd.grad(got * factor, student, retain_graph=True)[0], factor * gradient, torch.float32)


def test_who_gets_a_gradient():
    student, teacher = maps((3, 4, 2, 2), 5)
    teacher.requires_grad_()
    attention_transfer(student, teacher).backward()
    assert teacher.grad is None and student.grad is not None
    assert not attention_transfer(student.detach(), teacher).requires_grad
    with torch.no_grad():
        assert not attention_transfer(student, teacher).requires_grad
    half = student.detach().bfloat16().requires_grad_()
    attention_transfer(half, teacher.double()).backward()
    assert half.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(0, 4, 2, 2), (2, 4, 0, 3)])
def test_empty(shape):
    student, teacher = maps(shape, 5)
    got = attention_transfer(student, teacher)
    got.backward()
    assert got == 0 and student.grad.shape == shape


def test_errors():
    student, teacher = maps((2, 4, 3, 3), 5)
    for arguments, message in [
        ((student, teacher[:, :, :2]), r"\[2, 4, 3, 3\], teacher \[2, 5, 2, 3\]|student \[2, 4, 3, 3\]"),
        ((student, teacher[:1]), r"teacher \[1, 5, 3, 3\]"),
        ((student.flatten(1), teacher.flatten(1)), "N, C, H, W"),
        ((student[:, :0], teacher), "without channels"),
        ((student, teacher.long()), "int64"),
        ((student, teacher.to("meta")), "meta"),
    ]:
        with pytest.raises(ValueError, match=message):
            attention_transfer(*arguments)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(attention_transfer(student, teacher), student, create_graph=True)


def test_gradcheck_and_opcheck():
    student, teacher = maps((2, 3, 2, 2), 4, torch.float64)
    torch.autograd.gradcheck(lambda f: attention_transfer(f, teacher, 10.0), student)
    student, teacher = maps((2, 3, 2, 2), 4)
    torch.library.opcheck(_attention_transfer.op, (student, teacher, 10.0, True))
    _, k, _ = _attention_transfer.op(student.detach(), teacher, 10.0, True)
    backward = torch.ops.fastkd.attention_transfer_backward.default
    torch.library.opcheck(backward, (student.detach(), None, 10.0, k, torch.tensor(2.0)))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_break(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(lambda s, t: attention_transfer(s * 2, t, 10.0) * 3, fullgraph=True, dynamic=dynamic)
    for batch in (3, 5):
        student, teacher = maps((batch, 4, 3, 3), 6)
        got, want = compiled(student, teacher), attention_transfer(student * 2, teacher, 10.0) * 3
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.autograd.grad(got, student), torch.autograd.grad(want, student))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layouts", [(a, b) for a in LAYOUTS for b in LAYOUTS])
@pytest.mark.parametrize(
    "shape, teacher_channels", [((3, 5, 3, 3), 8), ((2, 8, 4, 4), 24), ((1, 600, 1, 3), 1), ((2, 1, 1, 1), 2)]
)
@KERNEL
def test_kernel(device, shape, teacher_channels, layouts, dtype):
    """Outputs are full of NaN beforehand; more channels than a tile holds, more tiles than programs."""
    student, teacher = maps(shape, teacher_channels, dtype, layouts, device)
    student, (N, _, H, W) = student.detach(), shape
    want, gradient = independent(student.cpu(), teacher.cpu(), 100.0)
    loss = torch.full((), torch.nan, device=device)
    k = torch.full((N, H * W), torch.nan, device=device)
    launch(Inputs(student, teacher, 100.0), (loss, k), None)
    torch.testing.assert_close(loss.cpu().double(), torch.as_tensor(want), rtol=2e-5, atol=1e-9)
    for upstream in (1.0, -3.0):
        got = torch.full_like(student, torch.nan)
        launch(Inputs(student, None, 100.0), (None, k), got, (torch.tensor(upstream, device=device),))
        if H * W > 1:
            close(got, upstream * gradient, dtype)
        else:
            assert got.abs().max() < 1e-3  # attention is 1 whatever the map: what is left is rounding


@KERNEL
def test_kernel_of_large_maps(device):
    """More places than the loss kernel takes at once, and a gradient whose layout is not the student's."""
    student, teacher = maps((2, 2, 48, 47), 1, device=device)
    student = student.detach()
    loss, k = torch.full((), torch.nan, device=device), torch.full((2, 48 * 47), torch.nan, device=device)
    launch(Inputs(student, teacher, 1e4), (loss, k), None)
    leaf = student.clone().double().requires_grad_()
    reference = attention_transfer_reference(leaf, teacher.double(), 1e4)
    torch.testing.assert_close(loss.double(), reference.detach(), rtol=2e-5, atol=0)
    got = torch.full((2, 2, 48, 47), torch.nan, device=device)
    launch(Inputs(student, None, 1e4), (None, k), got, (torch.ones((), device=device),))
    close(got, torch.autograd.grad(reference, leaf)[0], torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernels_behind_the_public_function(monkeypatch, layout):
    monkeypatch.setattr("fastkd.kernels.op.runs_on_gpu", lambda device, dtype: True)
    student, teacher = maps((3, 4, 3, 3), 5, layouts=(layout, "channels_last"))
    loss, gradient = independent(student.detach(), teacher, 100.0)
    got = attention_transfer(student, teacher, 100.0)
    torch.testing.assert_close(got.double(), loss, rtol=2e-5, atol=0)
    close(torch.autograd.grad(got * 2, student)[0], 2 * gradient, torch.float32)
    sliced = student.detach().repeat(1, 1, 2, 2)[:, :, ::2, 1:4].requires_grad_()  # read through a copy
    _, gradient = independent(sliced.detach(), teacher[:, :, :, :3], 100.0)
    close(torch.autograd.grad(attention_transfer(sliced, teacher, 100.0), sliced)[0], gradient, torch.float32)
    equal = teacher.clone().requires_grad_()
    same = attention_transfer(equal, teacher, 1000.0)
    assert same == 0 and torch.autograd.grad(same, equal)[0].abs().max() == 0
