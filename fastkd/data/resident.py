"""A data set of small images that lies on the device as uint8. Batches are cropped, mirrored and normalised there.

What is drawn for image i in epoch e depends only on (seed, e, i), see augment.py: neither the batch size nor the number
of processes nor the device changes an image. The draws of an epoch are made at its start. On a GPU a batch is then one
launch ("rrc": two), and its target a view of the epoch's.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..kernels import augment, pad_crop
from .augment import crops_and_flips, resized_boxes
from .base import EpochLoader
from .fingerprint import of_tensors
from .order import Shard


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

    Memory on the device: 1 byte a channel of every pixel, 154 MB for the training images of CIFAR.
    """

    name = "resident"
    follows_train_size = True  # with "rrc"

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
        self.images, self.target = images.images.to(device).contiguous(), images.target.to(device)
        self.augmentation = augmentation if train else Augmentation("none")
        self.image_size, self.mean, self.std, self.dtype = image_size, mean, std, shard.dtype
        self.fingerprint = partial(of_tensors, images.images, images.target)

    def batches(self, epoch: int, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        kind, device = self.augmentation, self.images.device
        slices, view = self.slices[first:], self.shard.view(epoch)
        begin, end = (slices[0][0], slices[-1][1]) if slices else (0, 0)
        order = self.order(epoch)[begin:end]  # of this process
        boxes = None
        if kind.kind == "rrc":
            boxes = resized_boxes(self.seed, view, order, (self.images.shape[1], self.images.shape[2])).to(device)
        order = order.to(device)
        target = self.target[order]
        corners, flips = crops_and_flips(self.seed, view, order, kind.pad, kind.flip)
        for start, stop in slices:
            part = slice(start - begin, stop - begin)
            out = self._memory(stop - start, self.size_of(epoch))
            if boxes is None:
                drawn = order[part], corners[part], flips[part]
                reflect = kind.pad_mode == "reflect"
                pad_crop(self.images, *drawn, out, self.mean, self.std, pad=kind.pad, reflect=reflect)
            else:
                images = self.images[order[part]].expand(-1, -1, -1, 3).contiguous()
                augment(images, boxes[part], flips[part], [out], [self.mean], [self.std])
            yield out, target[part]

    def _memory(self, count: int, side: int) -> Tensor:
        """Each batch has memory of its own, so that it may be kept."""
        shape = (count, 3, *((side, side) if self.augmentation.kind == "rrc" else self.images.shape[1:3]))
        return torch.empty(shape, dtype=self.dtype, device=self.images.device, memory_format=torch.channels_last)
