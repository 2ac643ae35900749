"""A data set of small images that lies on the device as uint8. Batches are cropped, mirrored and normalised there.

What is drawn for image i in epoch e depends only on (seed, e, i), so that neither the batch size nor the number of
processes nor the device changes an image.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..kernels import augment, pad_crop
from . import draws
from .base import EpochLoader, Shard


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
    """A Loader (see base.py) over a ResidentSet. Evaluation gives (image / 255 - mean) / std, computed in fp32.

    Device memory: one byte for each number of the set (CIFAR: 154 MB, its test set 31 MB; Fashion-MNIST: 47 and 8), 8
    for each label, and about 50 for each image while an epoch runs. Draws for this process's images are made at the
    start of an epoch. On a GPU a batch then costs one launch (two for "rrc").
    """

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
        self.images = images.images.to(device).expand(-1, -1, -1, 3)  # grey: the same bytes three times
        self.target = images.target.to(device)
        self.augmentation = augmentation if train else Augmentation("none")
        self.image_size, self.mean, self.std, self.dtype = image_size, mean, std, shard.dtype

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        if not self.slices:
            return
        first, last = self.slices[0][0], self.slices[-1][1]
        ids = self.order(epoch)[first:last].to(self.images.device)
        drawn, target = [ids, *self._draw(epoch, ids)], self.target[ids]
        create = self._resized if self.augmentation.kind == "rrc" else self._cropped
        for start, stop in self.slices:
            part = slice(start - first, stop - first)
            yield create(*(each[part] for each in drawn)), target[part]

    def _draw(self, epoch: int, ids: Tensor) -> tuple[Tensor, Tensor]:
        """For each of `ids` [B]: the corner of its crop [B, 2], or its box [B, 4]; and whether it is mirrored [B]."""
        kind, (height, width) = self.augmentation.kind, self.images.shape[1:3]
        if kind == "none":
            return ids.new_zeros(len(ids), 2), torch.zeros_like(ids, dtype=torch.bool)
        flips = draws.flips(self.seed, epoch, ids) & self.augmentation.flip
        if kind == "rrc":
            return draws.resized_boxes(self.seed, epoch, ids, height, width), flips
        return draws.crop_corners(self.seed, epoch, ids, self.augmentation.pad), flips

    def _cropped(self, ids: Tensor, corners: Tensor, flips: Tensor) -> Tensor:
        out = self._empty(len(ids), *self.images.shape[1:3])
        reflect = self.augmentation.pad_mode == "reflect"
        pad_crop(self.images, ids, corners, flips, out, self.mean, self.std, reflect=reflect)
        return out

    def _resized(self, ids: Tensor, boxes: Tensor, flips: Tensor) -> Tensor:
        out = self._empty(len(ids), self.image_size, self.image_size)
        augment(self.images[ids], boxes, flips, [out], [self.mean], [self.std])
        return out

    def _empty(self, count: int, height: int, width: int) -> Tensor:
        shape, device = (count, 3, height, width), self.images.device
        return torch.empty(shape, dtype=self.dtype, device=device, memory_format=torch.channels_last)
