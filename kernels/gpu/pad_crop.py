"""The kernel of pad_crop.py: one program computes a block of pixels of an image, all channels."""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .host import on_device

_BLOCK = 256  # pixels


@triton.jit
def _inside(at, size, reflect: tl.constexpr):
    """The place in the image of a place in the padded one, which may be outside if it is not mirrored."""
    if reflect:
        at = (size - 1) - tl.abs((size - 1) - tl.abs(at))
    return at


@triton.jit(do_not_specialize=["M", "H", "W", "blocks"])
def _kernel(
    images, chosen, corners, flips, output, mean, std, M, H, W, blocks,
    pad: tl.constexpr, reflect: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0) // blocks
    pixel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = pixel < H * W
    index = tl.minimum(tl.maximum(tl.load(chosen + image), 0), M - 1)
    top = tl.minimum(tl.maximum(tl.load(corners + image * 2).to(tl.int32), 0), 2 * pad) - pad
    left = tl.minimum(tl.maximum(tl.load(corners + image * 2 + 1).to(tl.int32), 0), 2 * pad) - pad
    x = pixel % W
    x = tl.where(tl.load(flips + image) != 0, W - 1 - x, x) + left
    y = pixel // W + top
    y, x = _inside(y, H, reflect), _inside(x, W, reflect)
    seen = mask & (y >= 0) & (y < H) & (x >= 0) & (x < W)
    source = images + index.to(tl.int64) * H * W * C + (y * W + x) * C
    place = output + (image.to(tl.int64) * H * W + pixel) * 3
    for c in tl.static_range(3):
        value = tl.load(source + (c if C == 3 else 0), mask=seen, other=0).to(tl.float32)
        value = tl.div_rn(tl.div_rn(value, 255.0) - mean[c], std[c])
        tl.store(place + c, value, mask=mask)


def launch(
    images: Tensor,
    chosen: Tensor,
    corners: Tensor,
    flips: Tensor,
    output: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    pad: int,
    reflect: bool,
) -> None:
    """Run the kernel, which writes the output."""
    images, (M, H, W, C) = images.contiguous(), images.shape
    blocks = math.ceil(H * W / _BLOCK)
    with on_device(images.device):
        _kernel[(len(chosen) * blocks,)](
            images, chosen.contiguous(), corners.contiguous(), flips.contiguous().view(torch.uint8), output,
            tuple(mean), tuple(std), M, H, W, blocks, pad=pad, reflect=reflect, C=C, BLOCK=_BLOCK,
            enable_fp_fusion=False, num_warps=4,
        )  # fmt: skip
