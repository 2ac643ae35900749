"""Gather images of a uint8 set, pad, crop, flip, normalise and cast them in one kernel, into a buffer that is given.

    out[n, c, i, j] = (pixel(image[index_n], top_n + i, left_n + j')[c] / 255 - mean_c) / std_c
    j' = W - 1 - j in a flipped image, else j;   pixel beyond an edge: 0, or the one mirrored at the edge pixel

The padding is index arithmetic; no padded image exists. A crop has its image's size. Zeros are black pixels, padded
before normalising, as torchvision's RandomCrop does before ToTensor and Normalize.
Shapes: images [N, H, W, 3] uint8; index [B] int64; corners [B, 2] int64, (top, left) relative to the image before
padding; flips [B] bool; output [B, 3, H, W] in channels-last memory, fp16, bf16 or fp32. Computed in fp32, by the same
three operations as torch on the CPU: fp32 output has the same bits everywhere. One launch, no host sync, nothing
allocated on a GPU. Bytes per pixel: 3 of the image, and 6 (16 bits) or 12 (fp32) of the output.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .augment import _check_images, _check_output, _flat
from .cpu.pad_crop import check_corners, closed_form


def pad_crop_reference(
    images_NHWC: Tensor,
    index: Tensor,
    corners: Tensor,
    flips: Tensor,
    output: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    reflect: bool,
) -> None:
    """The specification: one image at a time, in float64, padded as far as its corner needs."""
    H, W = images_NHWC.shape[1:3]
    m, s = (torch.tensor(three, dtype=torch.float64, device=output.device)[:, None, None] for three in (mean, std))
    for n, (i, (top, left), flip) in enumerate(zip(index.tolist(), corners.tolist(), flips.tolist(), strict=True)):
        image = images_NHWC[i].permute(2, 0, 1).double()
        y, x = abs(top), abs(left)
        padded = F.pad(image[None], (x, x, y, y), "reflect" if reflect else "constant")[0]
        crop = padded[:, y + top : y + top + H, x + left : x + left + W]
        output[n] = ((crop.flip(2) if flip else crop) / 255 - m) / s


def pad_crop(
    images_NHWC: Tensor,
    index: Tensor,
    corners: Tensor,
    flips: Tensor,
    output: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    reflect: bool,
) -> None:
    """Write output[n] = (crop at corners[n] of the padded images_NHWC[index[n]], flipped if flips[n], - mean) / std.

    images_NHWC: uint8 [N, H, W, 3], any strides; a stride of 0 makes three channels of a grey one. reflect: mirror at
    the edges, else zeros. mean, std: 3 numbers each, of images from 0 to 1. An empty batch writes nothing. No gradient.
    On the CPU, and with FASTKD_DEBUG=1 everywhere, an index outside the set, or a corner that mirroring cannot reach
    (beyond H - 1 or W - 1), is a ValueError; else the nearest pixel is read. ValueError for shapes, dtypes, devices or
    memory formats that do not fit.
    """
    _check_images(images_NHWC)
    B, (_, H, W, _) = len(index), images_NHWC.shape
    for name, given, shape, dtype in (
        ("index", index, (B,), torch.int64),
        ("corners", corners, (B, 2), torch.int64),
        ("flips", flips, (B,), torch.bool),
    ):
        if given.shape != shape or given.dtype != dtype:
            raise ValueError(f"{name} must be {dtype} {list(shape)}, got {given.dtype} {list(given.shape)}")
    if output.shape != (B, 3, H, W):
        raise ValueError(f"output must be {[B, 3, H, W]} for {B} images, got {list(output.shape)}")
    _check_output(output)
    devices = [str(tensor.device) for tensor in (images_NHWC, index, corners, flips, output)]
    if len(set(devices)) > 1:
        raise ValueError(f"images, index, corners, flips and output must be on one device, got {devices}")
    flat = _flat("mean", [mean], [output]), _flat("std", [std], [output])
    _pad_crop(images_NHWC, index, corners, flips, output, *flat, reflect)


@torch.library.custom_op("fastkd::pad_crop", mutates_args=("output",))
def _pad_crop(
    images: Tensor,
    index: Tensor,
    corners: Tensor,
    flips: Tensor,
    output: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    reflect: bool,
) -> None:
    if len(index) == 0:
        return
    check_corners(images, index, corners, reflect)
    if images.device.type == "cuda":
        from .gpu.pad_crop import launch as compute
    else:
        compute = closed_form
    compute(images, index, corners, flips, output, mean, std, reflect)
