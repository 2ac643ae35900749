"""Crop, resize, flip, normalise and cast a batch of uint8 images in one kernel, into buffers that are given.

    out[n, c, i, j] = (bilinear(image[n], y_i, x_j)[c] / 255 - mean_c) / std_c
    y_i = top + min(max((i + 0.5) height / h - 0.5, 0), height - 1),   x_j alike with w - 1 - j for j in a flipped image

Half-pixel centres and no antialiasing: F.interpolate(mode="bilinear", align_corners=False) of the crop. Boxes may have
fractions; then a crop's last sample may blend with the pixel beyond, never beyond the image.
Shapes: images [N, H, W, 3] uint8; boxes [N, 4], (top, left, height, width) in pixels; flips [N] bool or uint8; outputs
[N, 3, h, w] in channels-last memory, fp16, bf16 or fp32: one for each normalisation, of which there is more than one
where teacher and student expect different ones. Computed in fp32. One launch, no host sync, nothing allocated. Bytes
per output pixel: 3 of the image at least (it is read once for all outputs), and 6 per output in bf16.

`normalise` is for images that have been cropped already: the same without boxes and flips, 3 + 6 bytes per pixel.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .cpu.augment import check_boxes, closed_form, normalise_closed_form, resized_crop


def augment_reference(
    images_NHWC: Tensor,
    boxes: Tensor,
    flips: Tensor,
    outputs: list[Tensor],
    mean: list[Sequence[float]],
    std: list[Sequence[float]],
) -> None:
    """The specification: one image at a time, in float64."""
    size = outputs[0].shape[2], outputs[0].shape[3]
    for n, (box, flip) in enumerate(zip(boxes.tolist(), flips.tolist(), strict=True)):
        crop = resized_crop(images_NHWC[n], box, size, torch.float64).permute(2, 0, 1) / 255
        crop = crop.flip(2) if flip else crop
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
    _check_images(images_NHWC)
    N = len(images_NHWC)
    if boxes.shape != (N, 4) or boxes.dtype == torch.bool or boxes.is_complex():
        raise ValueError(f"boxes must be numbers [{N}, 4] for {N} images, got {boxes.dtype} {list(boxes.shape)}")
    if flips.shape != (N,) or flips.dtype not in (torch.bool, torch.uint8):
        raise ValueError(f"flips must be bool or uint8 [{N}] for {N} images, got {flips.dtype} {list(flips.shape)}")
    if not outputs:
        raise ValueError("no output given")
    devices = [tensor.device for tensor in (images_NHWC, boxes, flips, *outputs)]
    if len(set(devices)) > 1:
        raise ValueError(f"images, boxes, flips and outputs must be on one device, got {[str(d) for d in devices]}")
    for output in outputs:
        if output.dim() != 4 or output.shape[:2] != (N, 3) or output.shape != outputs[0].shape or 0 in output.shape[2:]:
            raise ValueError(
                f"outputs must all be [{N}, 3, h, w] of one size, got {list(output.shape)} and {list(outputs[0].shape)}"
            )
        check_output(output)
    # the operator under torch.compile on the CPU, too: 2.2 times as fast as a compiled grid_sample of the batch
    _augment(images_NHWC, boxes, flips, outputs, flat_numbers("mean", mean, outputs), flat_numbers("std", std, outputs))


def normalise_reference(images_NHWC: Tensor, output: Tensor, mean: Sequence[float], std: Sequence[float]) -> None:
    """The specification, in float64."""
    m, s = (torch.tensor(three, dtype=torch.float64, device=output.device)[:, None, None] for three in (mean, std))
    output.copy_((images_NHWC.permute(0, 3, 1, 2).double() / 255 - m) / s)


def normalise(images_NHWC: Tensor, output: Tensor, mean: Sequence[float], std: Sequence[float]) -> None:
    """Write output = (images_NHWC / 255 - mean) / std, without a crop.

    images_NHWC: uint8 [N, H, W, 3] on the output's device (on a GPU contiguous, else it is copied first); output: as
    in `augment`, [N, 3, H, W]; mean, std: 3 numbers each. No gradient. ValueError for what does not fit.
    """
    _check_images(images_NHWC)
    N, H, W, _ = images_NHWC.shape
    if output.shape != (N, 3, H, W) or output.device != images_NHWC.device:
        raise ValueError(
            f"output must be {[N, 3, H, W]} on {images_NHWC.device}, got {list(output.shape)} on {output.device}"
        )
    check_output(output)
    _normalise(images_NHWC, output, flat_numbers("mean", [mean], [output]), flat_numbers("std", [std], [output]))


def _check_images(images: Tensor) -> None:
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[3] != 3 or 0 in images.shape[1:]:
        raise ValueError(f"images must be uint8 [N, H, W, 3], got {images.dtype} {list(images.shape)}")


def check_output(output: Tensor) -> None:
    if output.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"outputs must be float16, bfloat16 or float32, got {output.dtype}")
    if not output.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(
            f"outputs must be channels-last in memory, got {list(output.shape)} with strides "
            f"{list(output.stride())}; make them with torch.empty(..., memory_format=torch.channels_last)"
        )
    if output.requires_grad:
        raise ValueError("an output requires a gradient, which this operation does not give")


def flat_numbers(name: str, values: list[Sequence[float]], outputs: list[Tensor]) -> list[float]:
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


@torch.library.custom_op("fastkd::normalise", mutates_args=("output",))
def _normalise(images: Tensor, output: Tensor, mean: Sequence[float], std: Sequence[float]) -> None:
    if len(images) == 0:
        return
    if images.device.type == "cuda":
        from .gpu.augment import launch_normalise as compute
    else:
        compute = normalise_closed_form
    compute(images, output, mean, std)


@_normalise.register_fake
def _(*_inputs: object) -> None:
    return None
