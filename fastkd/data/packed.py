"""Packed images: read by number from shards, cropped, resized, flipped and normalised. Nothing is decoded.

The crop is that of the other loaders: drawn for the picture's own size, then scaled to the packed square and rounded to
its pixels. On a GPU, the whole squares go there in pinned memory, one batch ahead of the step, and one launch makes the
batch (kernels/augment.py, without antialiasing). On the CPU, each thread reads the rows of a crop, resizes them
in bytes and antialiased, as torchvision does, and normalises them while they are in its cache. For 224 pixels on one
core: 0.12 to 0.16 ms to resize a crop, 0.08 ms to normalise it; kernels/cpu/augment.py takes 0.7 ms.

Images are read with pread and not through a memory map: a shard that was cut off is then an error and not a SIGBUS, and
the GIL is free. The operating system keeps in memory what it can. One image is a run of 197 kB at 256 pixels, so a
random order costs a local disk no more than one seek per image.
"""

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from ..kernels import augment
from .augment import crops_and_flips, resized_boxes
from .base import EpochLoader
from .fingerprint import of_file
from .normalise import Normalise
from .order import ONE_PROCESS, Shard
from .pack_format import HEADER, MANIFEST, PackedPart
from .prefetch import Prefetch
from .stored import OpenFiles

if TYPE_CHECKING:
    from .options import DataOptions

AHEAD = 1  # batches that are made while one is used
CHUNK = 8  # images of one call of a thread
SERIAL = 32767  # numbers for which torch starts no threads of its own: the loader's threads are enough

Batch = tuple[Tensor, ...]  # (float32 [B, s, s, 3], int64 [B]), or (uint8 [B, S, S, 3], boxes, flips, int64 [B])


class PackedLoader(EpochLoader):
    """A Loader (see base.py) over one part of a packed folder."""

    name = "packed"
    follows_train_size = True

    def __init__(
        self, part: PackedPart, options: "DataOptions", device: torch.device, shard: Shard = ONE_PROCESS, *, train: bool
    ):
        super().__init__(part.classes, len(part.labels), options.batch_size, shard, train=train)
        options = options.for_large_images()
        self.part, self.device, self.resize_side = part, device, options.resize_side
        self.image_size, self.mean, self.std = options.image_size, options.mean, options.std
        self.threads, self.opened, self.flip = max(1, options.workers), OpenFiles(), options.flip != "off"
        self.fingerprint = partial(of_file, os.path.join(part.folder, MANIFEST))
        self.prefetch = Prefetch(self._augment, device) if device.type == "cuda" else None
        self.memory = Normalise(self.mean, self.std, torch.device("cpu"), torch.float32)  # reuses that of past batches
        self._take_size(self.image_size)

    def batches(self, epoch: int, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        self._take_size(self.size_of(epoch))
        if self.prefetch is not None:
            yield from self.prefetch(self._made(epoch, first))
            return
        for images, target in self._made(epoch, first):
            yield images.permute(0, 3, 1, 2).to(self.device, self.shard.dtype), target.to(self.device)

    def _take_size(self, side: int) -> None:
        """From now on, images have this side."""
        self.side, scale = side, 1 / (255 * torch.tensor(self.std)).repeat(side)  # of a line of pixels
        self.scale, self.shift = scale, -255 * torch.tensor(self.mean).repeat(side) * scale
        self.lines = max(1, SERIAL // (3 * side))

    def boxes(self, epoch: int, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """(top, left, height, width) int64 [N, 4] in pixels of the packed squares, and flips bool [N]."""
        sizes, side = self.part.sizes[numbers], self.part.side
        if self.train:
            view = self.shard.view(epoch)
            boxes = resized_boxes(self.seed, view, numbers, sizes).double()
            flips = crops_and_flips(self.seed, view, numbers, pad=0, flip=self.flip)[1]
        else:
            boxes = centred(sizes, self.image_size, self.resize_side)
            flips = torch.zeros(len(numbers), dtype=torch.bool)
        return scaled(boxes, sizes, side), flips

    def _made(self, epoch: int, first: int) -> Iterator[Batch]:
        """The batches of an epoch; threads make AHEAD of them while one is used."""
        waiting: deque[tuple[Batch, list[Future]]] = deque()
        with ThreadPoolExecutor(self.threads) as pool:
            for step in range(first, len(self)):
                waiting.append(self._begun(pool, epoch, step))
                if len(waiting) > AHEAD:
                    yield _finished(*waiting.popleft())
            while waiting:
                yield _finished(*waiting.popleft())

    def _begun(self, pool: ThreadPoolExecutor, epoch: int, step: int) -> tuple[Batch, list[Future]]:
        """A batch whose images threads are about to fill in."""
        numbers = self.samples_of(epoch, step)
        boxes, flips = self.boxes(epoch, numbers)
        target, count = self.part.labels[numbers], len(numbers)
        if self.prefetch is None:
            images = self.memory.empty((count, self.side, self.side, 3))
            batch: Batch = images, target
            make = self._crops
        else:
            images = torch.empty(count, self.part.side, self.part.side, 3, dtype=torch.uint8, pin_memory=True)
            batch = images, *(tensor.pin_memory() for tensor in (boxes.float(), flips, target))
            make = self._squares
        rows = zip(images.split(CHUNK), numbers.split(CHUNK), boxes.split(CHUNK), flips.split(CHUNK), strict=True)
        return batch, [pool.submit(make, *row) for row in rows]

    def _squares(self, images: Tensor, numbers: Tensor, boxes: Tensor, flips: Tensor) -> None:
        """Read whole squares into `images`, uint8 [n, S, S, 3]; the boxes are for the kernel."""
        for out, number in zip(images.numpy(), numbers.tolist(), strict=True):
            self._read(out, number, 0)

    def _crops(self, images: Tensor, numbers: Tensor, boxes: Tensor, flips: Tensor) -> None:
        """Read, crop, resize, flip and normalise into `images`, float32 [n, s, s, 3]."""
        size = self.side
        rows = zip(images.view(len(images), size, -1), numbers.tolist(), boxes.tolist(), flips.tolist(), strict=True)
        memory = np.empty((self.part.side, self.part.side, 3), np.uint8)
        for out, number, (top, left, height, width), flip in rows:
            read = memory[:height]
            self._read(read, number, top)
            crop = np.ascontiguousarray(read[:, left : left + width])  # in another layout it takes twice the time
            crop_NCHW = torch.from_numpy(crop)[None].permute(0, 3, 1, 2)
            resized = F.interpolate(crop_NCHW, (size, size), mode="bilinear", antialias=True)[0].permute(1, 2, 0)
            for first in range(0, size, self.lines):
                pixels = resized[first : first + self.lines]
                pixels = (pixels.flip(1) if flip else pixels).reshape(len(pixels), -1).float()
                torch.addcmul(self.shift, pixels, self.scale, out=out[first : first + self.lines])

    def _read(self, out: np.ndarray, number: int, top: int) -> None:
        """Fill `out`, uint8 [rows, S, 3], with the rows of an image from `top` on. Raises UserError if it cannot."""
        shard, row = divmod(number, self.part.per_shard)
        path, line = self.part.shards[shard], self.part.side * 3
        try:
            place = HEADER + (row * self.part.side + top) * line
            if os.preadv(self.opened(path).descriptor, [out.data.cast("B")], place) == out.nbytes:
                return
            problem = "it was cut off"
        except OSError as error:
            problem = str(error.strerror)
        raise UserError(f"packed images: {path!r} cannot be read at image {row} ({problem}): see `fastkd pack --help`")

    def _augment(self, squares: Tensor, boxes: Tensor, flips: Tensor) -> Tensor:
        """The batch on the GPU, in one launch."""
        shape = len(squares), 3, self.side, self.side
        out = torch.empty(shape, dtype=self.shard.dtype, device=squares.device, memory_format=torch.channels_last)
        augment(squares, boxes, flips, [out], [self.mean], [self.std])
        return out


def _finished(batch: Batch, futures: list[Future]) -> Batch:
    for future in futures:
        future.result()
    return batch


def centred(sizes: Tensor, image_size: int, side: int) -> Tensor:
    """The centre crops of evaluation as boxes, float64 [N, 4], in pixels of pictures of `sizes` int64 [N, 2].

    As torchvision's Resize and CenterCrop round: the shorter side becomes `side`, and the middle of what results is cut
    out.
    """
    sizes = sizes.double()
    resized = (side * sizes / sizes.min(1, keepdim=True).values).floor()
    begin = ((resized - image_size) / 2).round()
    return torch.cat([begin, torch.full_like(begin, image_size)], 1) * (sizes / resized).repeat(1, 2)


def scaled(boxes: Tensor, sizes: Tensor, side: int) -> Tensor:
    """Boxes of pictures of `sizes` as boxes of the square of `side` pixels, rounded to whole pixels, int64 [N, 4]."""
    begin, extent = (boxes.double() * (side / sizes.double()).repeat(1, 2)).split(2, 1)
    first = begin.round().long().clamp(0, side - 1)
    last = (begin + extent).round().long().clamp(max=side)
    return torch.cat([first, torch.maximum(last - first, torch.ones_like(first))], 1)
