"""Gather, pad, crop, flip, normalise and cast small images in one kernel, from a data set that lies on the device.

    out[n, c, i, j] = (padded image[chosen[n], top_n + i, left_n + x_j, c] / 255 - mean_c) / std_c
    x_j = j, or W - 1 - j if flips[n];   the image is padded by `pad` pixels on each side, mirrored or black

As torchvision's RandomCrop(padding=pad, padding_mode="reflect" or "constant") and horizontal flip, for given offsets.
Shapes: images [M, H, W, 3 or 1] uint8; chosen [N] int64; corners [N, 2] int64, (top, left) from 0 to 2 pad; flips [N]
bool; output [N, 3, H, W] in channels-last memory, fp16, bf16 or fp32. Computed in fp32 with two divisions, so that an
image without padding has the bits of torch's (x / 255 - mean) / std. One launch, no host sync, nothing allocated on a
GPU. Bytes per output pixel: 3 (1 for gray images) and 6 of the output in bf16.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .augment import check_output, flat_numbers
from .cpu.pad_crop import closed_form


def pad_crop_reference(
    images_NHWC: Tensor,
    chosen: Tensor,
    corners: Tensor,
    flips: Tensor,
    output: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    pad: int = 0,
    reflect: bool = False,
) -> None:
    """The specification: one image at a time, in float64."""
    mode = "reflect" if reflect else "constant"
    m, s = (torch.tensor(three, dtype=torch.float64, device=output.device)[:, None, None] for three in (mean, std))
    for n, (index, (top, left), flip) in enumerate(zip(chosen.tolist(), corners.tolist(), flips.tolist(), strict=True)):
        image = images_NHWC[index].permute(2, 0, 1).double()
        padded = torch.nn.functional.pad(image, [pad] * 4, mode=mode) if pad else image
        crop = padded[:, top : top + image.shape[1], left : left + image.shape[2]]
        output[n] = ((crop.flip(2) if flip else crop) / 255 - m) / s


def pad_crop(
    images_NHWC: Tensor,
    chosen: Tensor,
    corners: Tensor,
    flips: Tensor,
    output: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    pad: int = 0,
    reflect: bool = False,
) -> None:
    """Write output[n] = crop `corners[n]` of image `chosen[n]`, padded by `pad`, flipped if `flips[n]`, normalised.

    Shapes and dtypes as above, all on one device; mean, std: 3 numbers each, of images from 0 to 1. `reflect`: pad with
    the mirrored image, else with 0. No gradient. ValueError for what does not fit, and on the CPU for an index or a
    corner that leaves the images; on a GPU they are not checked, since the check would synchronise, but moved to fit.
    """
    if images_NHWC.dtype != torch.uint8 or images_NHWC.dim() != 4 or images_NHWC.shape[3] not in (1, 3):
        raise ValueError(f"images must be uint8 [M, H, W, 3 or 1], got {images_NHWC.dtype} {list(images_NHWC.shape)}")
    (_, H, W, _), N = images_NHWC.shape, len(chosen)
    for name, tensor, shape, dtype in (
        ("chosen", chosen, (N,), torch.int64),
        ("corners", corners, (N, 2), torch.int64),
        ("flips", flips, (N,), torch.bool),
    ):
        if tensor.shape != shape or tensor.dtype != dtype:
            raise ValueError(f"{name} must be {dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}")
    if output.shape != (N, 3, H, W):
        raise ValueError(f"output must be {[N, 3, H, W]}, got {list(output.shape)}")
    check_output(output)
    if len({tensor.device for tensor in (images_NHWC, chosen, corners, flips, output)}) > 1:
        raise ValueError("images, chosen, corners, flips and output must be on one device")
    if not 0 <= pad < (min(H, W) if reflect else 2**15):
        raise ValueError(f"pad must be from 0 to below {min(H, W)} to reflect images of {H} x {W}, got {pad}")
    numbers = flat_numbers("mean", [mean], [output]), flat_numbers("std", [std], [output])
    _pad_crop(images_NHWC, chosen, corners, flips, output, *numbers, pad, reflect)


@torch.library.custom_op("fastkd::pad_crop", mutates_args=("output",))
def _pad_crop(
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
    if len(chosen) == 0:
        return
    if images.device.type == "cuda":
        from .gpu.pad_crop import launch as compute
    else:
        compute = closed_form
    compute(images, chosen, corners, flips, output, mean, std, pad, reflect)


@_pad_crop.register_fake
def _(*_inputs: object) -> None:
    return None
