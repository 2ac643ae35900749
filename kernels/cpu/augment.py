"""augment.py on the CPU, one image at a time: its crop stays in the cache; a gather of the whole batch is slower."""

import os
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def check_boxes(boxes: Tensor, H: int, W: int) -> None:
    """On the CPU, and with FASTKD_DEBUG=1 everywhere: ValueError if a box leaves the image. Else it is made to fit."""
    if boxes.device.type != "cpu" and os.environ.get("FASTKD_DEBUG") != "1":
        return
    begin, extent = boxes.double().split(2, 1)
    size = torch.tensor([H, W], dtype=torch.float64, device=boxes.device)
    # 1e-3 of a pixel: top + height = H is seldom exact in fp32. Said of what is right, so that NaN is wrong.
    right = ((begin >= 0) & (extent >= 1) & (begin + extent <= size + 1e-3)).all(1)
    if not right.all():
        rows = (~right).nonzero()[:, 0].tolist()
        raise ValueError(
            f"{len(rows)} box(es) (top, left, height, width) leave their images of {H} x {W} or are less than 1 pixel, "
            f"first in row {rows[0]}: {boxes[rows[0]].tolist()}"
        )


def closed_form(
    images: Tensor, boxes: Tensor, flips: Tensor, outputs: Sequence[Tensor], mean: Sequence[float], std: Sequence[float]
) -> None:
    """The same arguments as the kernel's `launch`."""
    size = outputs[0].shape[2], outputs[0].shape[3]
    shift = [-m / s for m, s in zip(mean, std, strict=True)]
    scales, shifts = torch.tensor([1 / (255 * s) for s in std]).split(3), torch.tensor(shift).split(3)
    outputs = [output.permute(0, 2, 3, 1) for output in outputs]
    for n, (box, flip) in enumerate(zip(boxes.tolist(), flips.tolist(), strict=True)):
        crop = resized_crop(images[n], box, size, torch.float32)
        if flip:
            crop = crop.flip(1)
        for output, scale, shift in zip(outputs, scales, shifts, strict=True):
            if output.dtype == torch.float32:
                torch.addcmul(shift, crop, scale, out=output[n])
            else:
                output[n] = torch.addcmul(shift, crop, scale)


def normalise_closed_form(images: Tensor, output: Tensor, mean: Sequence[float], std: Sequence[float]) -> None:
    """The same arguments as the kernel's `launch_normalise`."""
    scale, shift = (
        torch.tensor([1 / (255 * s) for s in std]),
        torch.tensor([-m / s for m, s in zip(mean, std, strict=True)]),
    )
    for image, out in zip(images, output.permute(0, 2, 3, 1), strict=True):
        out.copy_(torch.addcmul(shift, image.float(), scale))


def resized_crop(image: Tensor, box: list[float], size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """[h, w, 3], 0 to 255: torch's interpolation of a whole box; else rows first, then columns."""
    if all(float(edge).is_integer() for edge in box):
        top, left, height, width = map(int, box)
        crop = image[top : top + height, left : left + width].to(dtype).permute(2, 0, 1)[None]
        return F.interpolate(crop, size, mode="bilinear")[0].permute(1, 2, 0)
    for axis in range(2):
        extent, limit = box[axis + 2], image.shape[axis]
        begin = min(box[axis], limit - extent)
        place = (torch.arange(size[axis], dtype=torch.float64) + 0.5) * (extent / size[axis]) - 0.5
        place = begin + place.clamp(0, extent - 1)
        first = place.floor().clamp(0, limit - 1)
        a, b = (image.index_select(axis, i).to(dtype) for i in (first.long(), (first.long() + 1).clamp(max=limit - 1)))
        weight = (place - first).to(dtype)
        image = torch.lerp(a, b, weight[:, None] if axis else weight[:, None, None])
    return image
