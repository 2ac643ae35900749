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
def _mirrored(at, last):
    """Places beyond the first or the last pixel, mirrored there once."""
    return last - tl.abs(last - tl.abs(at))


@triton.jit(do_not_specialize=["N", "H", "W", "blocks"])
def _kernel(
    images, strides, index, corners, flips, output, mean, std, N, H, W, blocks,
    REFLECT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0) // blocks
    pixel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = pixel < H * W
    x = pixel % W
    x = tl.where(tl.load(flips + sample) != 0, W - 1 - x, x) + tl.load(corners + 2 * sample + 1).to(tl.int32)
    y = pixel // W + tl.load(corners + 2 * sample).to(tl.int32)
    if REFLECT:
        x, y = _mirrored(x, W - 1), _mirrored(y, H - 1)
        inside = mask
    else:
        inside = mask & (x >= 0) & (x < W) & (y >= 0) & (y < H)
    x = tl.minimum(tl.maximum(x, 0), W - 1)  # no address may leave the memory
    y = tl.minimum(tl.maximum(y, 0), H - 1)
    image = tl.minimum(tl.maximum(tl.load(index + sample), 0), N - 1).to(tl.int64)
    source = images + image * strides[0] + y * strides[1] + x * strides[2]
    place = output + (sample.to(tl.int64) * H * W + pixel) * 3
    for c in tl.static_range(3):
        value = tl.load(source + c * strides[3], mask=inside, other=0).to(tl.float32)
        # divisions as torch's on the CPU, bit for bit; the kernel waits for memory
        value = tl.div_rn(value, tl.full([BLOCK], 255.0, tl.float32)) - mean[c]
        tl.store(place + c, tl.div_rn(value, tl.zeros([BLOCK], tl.float32) + std[c]), mask=mask)


def launch(
    images: Tensor,
    index: Tensor,
    corners: Tensor,
    flips: Tensor,
    output: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    reflect: bool,
) -> None:
    """Run the kernel, which writes the output."""
    (N, H, W, _), B = images.shape, len(index)
    blocks = math.ceil(H * W / _BLOCK)
    with on_device(images.device):
        _kernel[(B * blocks,)](
            images, images.stride(), index.contiguous(), corners.contiguous(), flips.contiguous().view(torch.uint8),
            output, tuple(mean), tuple(std), N, H, W, blocks, REFLECT=reflect, BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip
