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
        whole = all(float(edge).is_integer() for edge in box)
        crop = _resize_whole(images[n], box, size) if whole else _resize(images[n], box, size)
        if flip:
            crop = crop.flip(1)
        for output, scale, shift in zip(outputs, scales, shifts, strict=True):
            if output.dtype == torch.float32:
                torch.addcmul(shift, crop, scale, out=output[n])
            else:
                output[n] = torch.addcmul(shift, crop, scale)


def _resize_whole(image: Tensor, box: list[float], size: tuple[int, int]) -> Tensor:
    """[h, w, 3], 0 to 255, of a box without fractions."""
    top, left, height, width = map(int, box)
    crop = image[top : top + height, left : left + width].float().permute(2, 0, 1)[None]
    return F.interpolate(crop, size, mode="bilinear")[0].permute(1, 2, 0)


def _resize(image: Tensor, box: list[float], size: tuple[int, int]) -> Tensor:
    """[h, w, 3], 0 to 255, of any box: rows first, then columns."""
    for axis in range(2):
        first, second, weight = _taps(size[axis], box[axis], box[axis + 2], image.shape[axis])
        a, b = (image.index_select(axis, index).float() for index in (first, second))
        image = torch.lerp(a, b, weight[:, None] if axis else weight[:, None, None])
    return image


def _taps(size: int, begin: float, extent: float, limit: int) -> tuple[Tensor, Tensor, Tensor]:
    """(index of the first pixel, of the second, weight of the second) for each of an output's rows or columns."""
    begin = min(begin, limit - extent)
    place = (torch.arange(size, dtype=torch.float64) + 0.5) * (extent / size) - 0.5
    place = begin + place.clamp(0, extent - 1)
    first = place.floor().clamp(0, limit - 1)
    return first.long(), (first.long() + 1).clamp(max=limit - 1), (place - first).float()
