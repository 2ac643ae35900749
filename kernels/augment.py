"""Crop, resize, flip, normalise and cast a batch of uint8 images in one kernel, into buffers that are given.

    out[n, c, i, j] = (bilinear(image[n], y_i, x_j)[c] / 255 - mean_c) / std_c
    y_i = top + min(max((i + 0.5) height / h - 0.5, 0), height - 1),   x_j alike with w - 1 - j for j in a flipped image

Half-pixel centres and no antialiasing: F.interpolate(mode="bilinear", align_corners=False) of the crop. Boxes may have
fractions; then a crop's last sample may blend with the pixel beyond, never beyond the image.

Shapes: images [N, H, W, 3] uint8; boxes [N, 4], (top, left, height, width) in pixels; flips [N] bool or uint8; outputs
[N, 3, h, w] in channels-last memory, fp16, bf16 or fp32: one for each normalisation, of which there is more than one
where teacher and student expect different ones. Computed in fp32. One launch, no host sync, nothing allocated. Bytes
per output pixel: 3 of the image at least (it is read once for all outputs), and 6 per output in bf16.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .cpu.augment import check_boxes, closed_form


def augment_reference(
    images_NHWC: Tensor,
    boxes: Tensor,
    flips: Tensor,
    outputs: list[Tensor],
    mean: list[Sequence[float]],
    std: list[Sequence[float]],
) -> None:
    """The specification: one image at a time, in float64."""
    for n, (top, left, height, width) in enumerate(boxes.tolist()):
        h, w = outputs[0].shape[2:]
        image = images_NHWC[n].permute(2, 0, 1)[None].double() / 255
        if all(float(edge).is_integer() for edge in (top, left, height, width)):
            y, x, height, width = int(top), int(left), int(height), int(width)
            crop = F.interpolate(image[:, :, y : y + height, x : x + width], (h, w), mode="bilinear")
        else:
            y, x = ((torch.arange(size, dtype=torch.float64, device=image.device) + 0.5) * extent / size - 0.5
                    for size, extent in ((h, height), (w, width)))  # fmt: skip
            y, x = top + y.clamp(0, height - 1), left + x.clamp(0, width - 1)
            y, x = (2 * (at + 0.5) / size - 1 for at, size in zip((y, x), image.shape[2:], strict=True))
            grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)[None]
            crop = F.grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=False)
        crop = crop[0].flip(2) if flips[n] else crop[0]
        for output, m, s in zip(outputs, mean, std, strict=True):
            output[n] = (crop - crop.new_tensor(m)[:, None, None]) / crop.new_tensor(s)[:, None, None]


def augment(
    images_NHWC: Tensor,
    boxes: Tensor,
    flips: Tensor,
    outputs: list[Tensor],
    mean: list[Sequence[float]],
    std: list[Sequence[float]],
) -> None:
    """Write outputs[k][n] = (resized crop boxes[n] of images_NHWC[n], flipped if flips[n], - mean[k]) / std[k].

    images_NHWC: uint8 [N, H, W, 3], any strides; boxes: [N, 4], top, left, height, width, integers or floats, height
    and width at least 1; flips: [N] bool or uint8; outputs: [N, 3, h, w] each, channels-last memory, fp16, bf16 or
    fp32; mean, std: for each output 3 numbers, of images from 0 to 1. All tensors on one device. An empty batch writes
    nothing. No gradient. On the CPU, and with FASTKD_DEBUG=1 everywhere, a box that leaves its image is a ValueError;
    else it is moved and cut until it fits. ValueError for shapes, dtypes, devices or memory formats that do not fit.
    """
    _check(images_NHWC, boxes, flips, outputs)
    _augment(images_NHWC, boxes, flips, outputs, _flat("mean", mean, outputs), _flat("std", std, outputs))


def _check(images: Tensor, boxes: Tensor, flips: Tensor, outputs: list[Tensor]) -> None:
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[3] != 3 or 0 in images.shape[1:]:
        raise ValueError(f"images must be uint8 [N, H, W, 3], got {images.dtype} {list(images.shape)}")
    N = len(images)
    if boxes.shape != (N, 4) or boxes.dtype == torch.bool or boxes.is_complex():
        raise ValueError(f"boxes must be numbers [{N}, 4] for {N} images, got {boxes.dtype} {list(boxes.shape)}")
    if flips.shape != (N,) or flips.dtype not in (torch.bool, torch.uint8):
        raise ValueError(f"flips must be bool or uint8 [{N}] for {N} images, got {flips.dtype} {list(flips.shape)}")
    if not outputs:
        raise ValueError("no output given")
    devices = [tensor.device for tensor in (images, boxes, flips, *outputs)]
    if len(set(devices)) > 1:
        raise ValueError(f"images, boxes, flips and outputs must be on one device, got {[str(d) for d in devices]}")
    for output in outputs:
        _check_output(output, N, outputs[0].shape)


def _check_output(output: Tensor, N: int, shape: torch.Size) -> None:
    if output.dim() != 4 or output.shape[:2] != (N, 3) or output.shape != shape or 0 in output.shape[2:]:
        raise ValueError(f"outputs must all be [{N}, 3, h, w] of one size, got {list(output.shape)} and {list(shape)}")
    if output.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"outputs must be float16, bfloat16 or float32, got {output.dtype}")
    if not output.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(
            f"outputs must be channels-last in memory, got {list(output.shape)} with strides {list(output.stride())}; "
            "make them with torch.empty(..., memory_format=torch.channels_last)"
        )
    if output.requires_grad:
        raise ValueError("an output requires a gradient, which this operation does not give")


def _flat(name: str, values: list[Sequence[float]], outputs: list[Tensor]) -> list[float]:
    if len(values) != len(outputs) or any(len(three) != 3 for three in values):
        raise ValueError(f"{name} must hold 3 numbers for each of {len(outputs)} output(s), got {values}")
    if any(isinstance(three, Tensor) and three.device.type != "cpu" for three in values):
        raise ValueError(f"{name} must be given as numbers: a tensor on the GPU would have to be fetched first")
    flat = [float(value) for three in values for value in three]
    if name == "std" and not all(value > 0 for value in flat):
        raise ValueError(f"std must be above 0, got {values}")
    return flat


@torch.library.custom_op("fastkd::augment", mutates_args=("outputs",))
def _augment(
    images: Tensor, boxes: Tensor, flips: Tensor, outputs: Sequence[Tensor], mean: Sequence[float], std: Sequence[float]
) -> None:
    check_boxes(boxes, images.shape[1], images.shape[2])
    if len(images) == 0:
        return
    if images.device.type == "cuda":
        from .gpu.augment import launch as compute
    else:
        compute = closed_form
    compute(images, boxes, flips, outputs, mean, std)


@_augment.register_fake
def _(*_inputs: object) -> None:
    return None
