"""A data set of small images that lies on the device as uint8. Batches are cropped, mirrored and normalised there.

What is drawn for image i in epoch e depends only on (seed, e, i), so that neither the batch size nor the number of
processes nor the device changes an image.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..kernels import augment
from .base import EpochLoader, Shard, derived_seed

TRIES = 10  # boxes drawn for a random resized crop, of which the first that fits counts; as in torchvision


class ResidentSet(NamedTuple):
    """Images uint8 [N, H, W, 3] or [N, H, W, 1] and target int64 [N]; `classes` are the names in label order."""

    classes: tuple[str, ...]
    images: Tensor
    target: Tensor


@dataclass(frozen=True)
class Augmentation:
    """What is done to training images; `pad` and `pad_mode` count for pad-crop alone."""

    kind: Literal["rrc", "pad-crop", "none"]
    pad: int = 0
    pad_mode: Literal["reflect", "zeros"] = "zeros"
    flip: bool = False


class ResidentLoader(EpochLoader):
    """A Loader (see base.py) over a ResidentSet. Evaluation gives (image / 255 - mean) / std, computed in fp32."""

    name = "resident"

    def __init__(
        self,
        images: ResidentSet,
        augmentation: Augmentation,
        batch_size: int,
        device: torch.device,
        shard: Shard,
        *,
        train: bool,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        image_size: int,
    ):
        super().__init__(images.classes, len(images.images), batch_size, shard, train=train)
        self.images, self.target = images.images.to(device), images.target.to(device)
        self.augmentation = augmentation if train else Augmentation("none")
        self.image_size, self.mean, self.std, self.dtype = image_size, mean, std, shard.dtype
        self.scale = torch.tensor(mean, device=device), torch.tensor(std, device=device)

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        kind, device = self.augmentation.kind, self.images.device
        random = torch.Generator().manual_seed(derived_seed(self.seed, epoch, 1))
        flips = (torch.rand(self.samples, generator=random) < 0.5 * self.augmentation.flip).to(device)
        side = tuple(self.images.shape[1:3])
        boxes = random_boxes(self.samples, side, random).to(device) if kind == "rrc" else None
        pad = self.augmentation.pad
        corners = torch.randint(2 * pad + 1, (self.samples, 2), generator=random).to(device) - pad
        order = self.order(epoch).to(device)
        for start, stop in self.slices:
            chosen = order[start:stop]
            if boxes is not None:
                images = self._resized(chosen, boxes[chosen], flips[chosen])
            elif kind == "pad-crop":
                mode = self.augmentation.pad_mode
                images = self._normalised(cropped(self.images, chosen, corners[chosen], flips[chosen], mode))
            else:
                images = self._normalised(self.images[chosen])
            yield images, self.target[chosen]

    def _normalised(self, images_NHWC: Tensor) -> Tensor:
        """[N, 3, H, W] in channels-last memory, from [N, H, W, 3 or 1]."""
        mean, std = self.scale
        return images_NHWC.float().div_(255).sub(mean).div_(std).to(self.dtype).permute(0, 3, 1, 2)

    def _resized(self, chosen: Tensor, boxes: Tensor, flips: Tensor) -> Tensor:
        images = self.images[chosen].expand(-1, -1, -1, 3).contiguous()
        shape = (len(chosen), 3, self.image_size, self.image_size)
        out = torch.empty(shape, dtype=self.dtype, device=images.device, memory_format=torch.channels_last)
        augment(images, boxes, flips, [out], [self.mean], [self.std])
        return out


def cropped(images_NHWC: Tensor, chosen: Tensor, corner_B2: Tensor, flips: Tensor, pad_mode: str) -> Tensor:
    """Crops, of the images' size, of the `chosen` [B] images after padding; with one gather.

    corner_B2: the top left corner of each crop, relative to the image before padding. flips [B]: mirror the crop.
    """
    height, width = images_NHWC.shape[1:3]
    rows = corner_B2[:, :1] + torch.arange(height, device=images_NHWC.device)
    columns = corner_B2[:, 1:] + torch.arange(width, device=images_NHWC.device)
    columns = torch.where(flips[:, None], columns.flip(1), columns)
    if pad_mode == "reflect":
        rows, columns = (edge - (edge - at.abs()).abs() for at, edge in ((rows, height - 1), (columns, width - 1)))
        return images_NHWC[chosen[:, None, None], rows[:, :, None], columns[:, None]]
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None]
    rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
    return images_NHWC[chosen[:, None, None], rows[:, :, None], columns[:, None]] * inside[..., None]


def random_boxes(count: int, side: tuple[int, ...], random: torch.Generator) -> Tensor:
    """(top, left, height, width) [count, 4] in pixels, as torchvision's RandomResizedCrop draws them.

    An area of 0.08 to 1 of the image and an aspect of 3/4 to 4/3; the whole image if none of TRIES boxes fits.
    """
    height, width = side
    area = torch.empty(count, TRIES).uniform_(0.08, 1, generator=random) * height * width
    aspect = (torch.rand(count, TRIES, generator=random) * 2 - 1).mul(torch.log(torch.tensor(4 / 3))).exp()
    sizes = torch.stack([(area / aspect).sqrt().round(), (area * aspect).sqrt().round()], -1)  # height, width
    limits = torch.tensor([height, width])
    fits = ((sizes >= 1) & (sizes <= limits)).all(-1)
    first = fits.int().argmax(1)
    chosen = torch.where(fits.any(1)[:, None], sizes[torch.arange(count), first], limits.float())
    place = (torch.rand(count, 2, generator=random) * (limits - chosen + 1)).floor()
    return torch.cat([place, chosen], 1)
