"""The kernels of augment.py.

`augment`: one program computes a block of pixels of an image, all channels and normalisations. `normalise`: one program
takes a block of bytes of the whole batch, which lie in the same order as the output's numbers.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .host import on_device

_BLOCK = 256  # pixels
_BYTES = 1024  # 8 a thread: loads of 64 bits, and stores of 128 in 16-bit dtypes


@triton.jit
def _fit(begin, extent, limit):
    """(begin, extent) of a box, moved and cut to fit into the image. NaN fits too: no address may leave the memory."""
    extent = tl.minimum(tl.maximum(extent.to(tl.float32), 1.0), limit)
    return tl.minimum(tl.maximum(begin.to(tl.float32), 0.0), limit - extent), extent


@triton.jit
def _taps(i, size, begin, extent, limit):
    """(index of the first pixel, of the second, weight of the second) for the output's rows or columns i."""
    # whole pixels of `begin` are added as integers, so that a box of integers has the weights of its crop
    whole = tl.floor(begin)
    place = (i.to(tl.float32) + 0.5) * tl.div_rn(extent, size.to(tl.float32)) - 0.5
    place = tl.minimum(tl.maximum(place, 0.0), extent - 1) + (begin - whole)
    below = tl.floor(place)
    first = tl.minimum((whole + below).to(tl.int32), limit - 1)
    return first, tl.minimum(first + 1, limit - 1), place - below


@triton.jit(do_not_specialize=["H", "W", "h", "w", "blocks"])
def _kernel(images, strides, boxes, flips, outputs, scales, shifts, H, W, h, w, blocks, BLOCK: tl.constexpr):
    image = tl.program_id(0) // blocks
    pixel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = pixel < h * w
    box = boxes + image * 4
    top, height = _fit(tl.load(box), tl.load(box + 2), H.to(tl.float32))
    left, width = _fit(tl.load(box + 1), tl.load(box + 3), W.to(tl.float32))
    x = pixel % w
    x = tl.where(tl.load(flips + image) != 0, w - 1 - x, x)
    y0, y1, down = _taps(pixel // w, h, top, height, H)
    x0, x1, right = _taps(x, w, left, width, W)
    source = images + image.to(tl.int64) * strides[0]
    place = (image.to(tl.int64) * h * w + pixel) * 3
    for c in tl.static_range(3):
        channel = source + c * strides[3]
        a = tl.load(channel + y0 * strides[1] + x0 * strides[2], mask=mask, other=0).to(tl.float32)
        b = tl.load(channel + y0 * strides[1] + x1 * strides[2], mask=mask, other=0).to(tl.float32)
        d = tl.load(channel + y1 * strides[1] + x0 * strides[2], mask=mask, other=0).to(tl.float32)
        e = tl.load(channel + y1 * strides[1] + x1 * strides[2], mask=mask, other=0).to(tl.float32)
        value = (1 - down) * ((1 - right) * a + right * b) + down * ((1 - right) * d + right * e)
        for k in tl.static_range(len(outputs)):
            tl.store(outputs[k] + place + c, value * scales[3 * k + c] + shifts[3 * k + c], mask=mask)


def launch(
    images: Tensor,
    boxes: Tensor,
    flips: Tensor,
    outputs: Sequence[Tensor],
    mean: Sequence[float],
    std: Sequence[float],
) -> None:
    """Run the kernel, which writes the outputs. mean and std: 3 numbers for each output, one after another."""
    (N, H, W, _), (h, w), device = images.shape, outputs[0].shape[2:], images.device
    if sum((size - 1) * stride for size, stride in zip(images.shape[1:], images.stride()[1:], strict=True)) >= 2**31:
        images = images.contiguous()  # places within an image are counted in 32 bits
    blocks = math.ceil(h * w / _BLOCK)
    with on_device(device):
        _kernel[(N * blocks,)](
            images, images.stride(), boxes.contiguous(), flips.contiguous().view(torch.uint8), tuple(outputs),
            tuple(1 / (255 * s) for s in std), tuple(-m / s for m, s in zip(mean, std, strict=True)),
            H, W, h, w, blocks, BLOCK=_BLOCK, enable_fp_fusion=True, num_warps=4,
        )  # fmt: skip


@triton.jit
def _normalise_kernel(images, output, scales, shifts, total, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    inner = tl.arange(0, BLOCK)
    place = block.to(tl.int64) * BLOCK + inner
    channel = (block % 3 * (BLOCK % 3) + inner) % 3
    scale = tl.where(channel == 0, scales[0], tl.where(channel == 1, scales[1], scales[2]))
    shift = tl.where(channel == 0, shifts[0], tl.where(channel == 1, shifts[1], shifts[2]))
    value = tl.load(images + place, mask=place < total, other=0).to(tl.float32)
    tl.store(output + place, value * scale + shift, mask=place < total)


def launch_normalise(images: Tensor, output: Tensor, mean: Sequence[float], std: Sequence[float]) -> None:
    """Run the kernel, which writes the output. Triton specialises `total`: a multiple of 16 widens the accesses."""
    images, total, device = images.contiguous(), images.numel(), images.device
    with on_device(device):
        _normalise_kernel[(math.ceil(total / _BYTES),)](
            images, output, tuple(1 / (255 * s) for s in std), tuple(-m / s for m, s in zip(mean, std, strict=True)),
            total, BLOCK=_BYTES, enable_fp_fusion=True, num_warps=4,
        )  # fmt: skip
