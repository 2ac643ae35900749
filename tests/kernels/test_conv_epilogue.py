"""Bias, residual addition and ReLU in place: the closed form and the kernel against the formula in float64."""

import pytest
import torch
from capture import Capture

from fastkd.kernels.conv_epilogue import _conv_epilogue, conv_epilogue, conv_epilogue_reference
from fastkd.kernels.gpu.conv_epilogue import launch

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
LAST = torch.channels_last


def kernel(y, bias, z=None, relu=True):
    launch(y, bias, z, relu)
    return y


PATHS = [conv_epilogue, kernel]


def tensors(*shape, dtype=torch.float32, device="cpu", format=LAST):
    """y, bias, z"""
    generator = torch.Generator().manual_seed(0)
    y, z = (torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=format) for _ in range(2))
    return y.to(device), torch.randn(shape[1], generator=generator).to(device, dtype), z.to(device)


def formula(y, bias, z, relu):
    """In float64, without the code under test."""
    total = y.double() + (0 if bias is None else bias.double().view(1, -1, 1, 1)) + (0 if z is None else z.double())
    return total.clamp(min=0) if relu else total


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("function", PATHS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(2, 16, 5, 7), (3, 64, 9, 9), (2, 10, 3, 5), (1, 1, 1, 1), (3, 7, 13, 17)])
@pytest.mark.parametrize("format", [LAST, torch.contiguous_format])
def test_values(function, dtype, shape, format, device):
    for keep_z in (True, False):
        for keep_bias in (True, False):
            for relu in (True, False):
                y, bias, z = tensors(*shape, dtype=dtype, device=device, format=format)
                bias, z = bias if keep_bias else None, z if keep_z else None
                want = formula(y, bias, z, relu)
                assert function(y, bias, z, relu=relu) is y and y.is_contiguous(memory_format=format)
                torch.testing.assert_close(y.double(), want, rtol=TOLERANCE[dtype], atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("function", PATHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_sum_is_rounded_once(function, dtype, device):
    """1 + e - 1 = e, where e is too small to be added to 1 in 16 bits."""
    y, z = torch.ones(1, 8, 2, 2, dtype=dtype, device=device), -torch.ones(1, 8, 2, 2, dtype=dtype, device=device)
    bias = torch.full((8,), 2.0**-12, dtype=dtype, device=device)
    assert (function(y, bias, z) == 2.0**-12).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("function", PATHS)
def test_any_strides_of_z_and_of_the_bias(function, device):
    y, bias, z = tensors(2, 16, 6, 4, device=device)
    want = formula(y, bias, z, True)
    wide = torch.zeros(2, 16, 12, 8, device=device)
    wide[:, :, ::2, ::2] = z
    double = torch.zeros(32, device=device)
    double[::2] = bias
    for other in (z.contiguous(), wide[:, :, ::2, ::2], z.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)):
        mine = y.clone()
        function(mine, double[::2], other)
        torch.testing.assert_close(mine.double(), want, rtol=1e-6, atol=1e-6)
    assert torch.equal(other, z)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("function", PATHS)
@pytest.mark.parametrize("place", ["y", "bias", "z"])
def test_nan_and_inf_come_through(function, place, device):
    given = dict(zip(("y", "bias", "z"), tensors(2, 16, 3, 3, device=device), strict=True))
    where = given[place] if place == "bias" else given[place][0, 0, 0]
    where[:3] = torch.tensor([torch.nan, torch.inf, -torch.inf], device=device)
    want = formula(given["y"], given["bias"], given["z"], True)
    function(given["y"], given["bias"], given["z"])
    torch.testing.assert_close(given["y"].double(), want, rtol=1e-6, atol=1e-6, equal_nan=True)
    assert given["y"].isnan().any()


def test_the_kernel_leaves_its_neighbours_alone():
    """A part of a larger buffer: nothing before it, and nothing after it, is written."""
    memory = torch.full((40 + 2 * 10 * 7 * 9 + 40,), 7.0)
    y = memory[40:-40].as_strided((2, 10, 7, 9), (630, 1, 90, 10), 40)
    kernel(y, torch.ones(10))
    assert (memory[:40] == 7).all() and (memory[-40:] == 7).all() and (y == 8).all()


def test_an_empty_batch():
    y, bias, z = tensors(0, 16, 3, 3)
    assert conv_epilogue(y, bias, z) is y and y.shape == (0, 16, 3, 3)


def test_the_reference_is_the_formula():
    y, bias, z = tensors(2, 16, 3, 3, dtype=torch.bfloat16)
    for relu in (True, False):
        want = formula(y, bias, z, relu).bfloat16()
        assert torch.equal(conv_epilogue_reference(y, bias, z, relu=relu), want)
        assert torch.equal(conv_epilogue(y.clone(), bias, z, relu=relu), want)


def test_float64():
    y, bias, z = tensors(2, 10, 3, 3, dtype=torch.float64)
    want = formula(y, bias, z, True)
    torch.testing.assert_close(conv_epilogue(y, bias, z), want, rtol=1e-15, atol=1e-15)


def test_it_replays_as_a_graph():
    y, bias, z = tensors(2, 16, 3, 3)
    result = torch.zeros_like(y)
    with Capture() as graph:
        work = y.clone()
        result.copy_(conv_epilogue(work, bias, z))
    y.copy_(torch.randn_like(y))
    graph.replay()
    torch.testing.assert_close(result.double(), formula(y, bias, z, True), rtol=1e-6, atol=1e-6)
    assert sum("conv_epilogue" in name for name in graph.names) == 1


@pytest.mark.parametrize("keep", [True, False])
def test_opcheck(keep):
    y, bias, z = tensors(2, 16, 3, 3)
    torch.library.opcheck(_conv_epilogue, (y, bias if keep else None, z if keep else None, keep))


def test_under_torch_compile():
    y, bias, z = tensors(2, 16, 3, 3)
    want = formula(2 * y, bias, z, True)
    found = torch.compile(lambda y, bias, z: conv_epilogue(2 * y, bias, z) + 0, backend="aot_eager")(y, bias, z)
    torch.testing.assert_close(found.double(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda y, bias, z: (y[0], bias, None), "y must be .N, C, H, W"),
        (lambda y, bias, z: (y, bias[:3], z), r"bias must be .16. for y .*, got .3."),
        (lambda y, bias, z: (y, bias, z[:1]), "z must have the shape of y"),
        (lambda y, bias, z: (y[:, ::2], bias[::2], None), "dense in memory"),
        (lambda y, bias, z: (y.requires_grad_(), bias, z), "requires a gradient"),
        (lambda y, bias, z: (y.int(), bias, z), "int32"),
    ],
)
def test_what_does_not_fit(change, words):
    y, bias, z = change(*tensors(2, 16, 3, 3))
    with pytest.raises(ValueError, match=words):
        conv_epilogue(y, bias, z)
