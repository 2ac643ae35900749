"""Fused convolutions of cuDNN on memory full of NaN: none of it may reach a result.

Green on a GPU for `torch.cudnn_convolution_relu` too: set CUDNN_RELU_IS_PROVEN in fastkd/engine/fuse_conv_bn.py.
"""

import pytest
import torch
from torch import nn

from fastkd.engine import fuse_conv_bn
from fastkd.engine.fuse_conv_bn import FusedConvolution

pytestmark = pytest.mark.gpu
LAST = torch.channels_last
LAYERS = [  # N, C, size, channels out, kernel, stride, groups
    (8, 3, 64, 64, 7, 2, 1),
    (8, 16, 32, 16, 3, 1, 1),
    (8, 16, 32, 32, 3, 2, 1),
    (4, 64, 56, 256, 1, 1, 1),
    (4, 256, 14, 64, 1, 1, 1),
    (2, 512, 7, 512, 3, 1, 1),
    (4, 32, 14, 32, 3, 1, 32),
    (3, 24, 9, 40, 3, 1, 1),
]
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 3e-3}  # fp32: TF32


def poison(megabytes: int = 512) -> None:
    """Fill the allocator's free blocks of all sizes with NaN, and leave them free."""
    sizes = [2**power for power in range(9, 25)]
    blocks = [torch.full((size // 4,), torch.nan, device="cuda") for size in sizes for _ in range(8)]
    blocks.append(torch.full((megabytes << 18,), torch.nan, device="cuda"))
    torch.cuda.synchronize()
    del blocks


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("variant", ["cudnn relu", "one call", "epilogue"])
@pytest.mark.parametrize("residual", [False, True])
@torch.no_grad()
def test_no_nan_comes_through(monkeypatch, variant, layer, dtype, residual):
    N, C, size, out, kernel, stride, groups = layer
    monkeypatch.setattr(fuse_conv_bn, "CUDNN_RELU_IS_PROVEN", variant == "cudnn relu")
    torch.manual_seed(0)
    convolution = nn.Conv2d(C, out, kernel, stride, kernel // 2, groups=groups).cuda().to(dtype, memory_format=LAST)
    x = torch.randn(N, C, size, size, device="cuda").to(dtype, memory_format=LAST)
    fused = FusedConvolution(convolution)
    exact = torch.nn.functional.conv2d(
        x.double(), convolution.weight.double(), convolution.bias.double(), stride, kernel // 2, groups=groups
    )
    z = torch.randn_like(exact).to(dtype, memory_format=LAST) if residual else None
    fused.variant = "one call" if variant == "cudnn relu" else variant
    if fused.variant not in fused.variants(x, z):
        pytest.skip("there is no z that holds numbers")
    want = (exact if z is None else exact + z.double()).relu()
    for _ in range(20):
        poison()
        found = fused(x, z)
        assert found.isfinite().all(), f"{found.isnan().sum().item()} of {found.numel()} are NaN"
        torch.testing.assert_close(found.double(), want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
