"""What DALI gets for each batch: names of files, labels, crops and flips, a few kilobytes.

Nothing here refers to a pipeline or a loader. With such a cycle of references, Python's garbage collector would end a
pipeline at any time, even in a decoding process that was forked from this one, which killed that process.
"""

import os
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from .augment import crops_and_flips, resized_boxes
from .dali_files import FirstPass, Place
from .order import Shard
from .scan import Split

Inputs = list[np.ndarray]  # names uint8 [B, length], labels [B]; in training corners, sides int32 [B, 2], flips [B]


class Source:
    """The batches of a process.

    slices: (start, stop) of each batch in the order of an epoch. sizes: (height, width) of the images, int64 [N, 2], in
    training; None in evaluation, where images are neither shuffled nor cropped at random.
    """

    def __init__(
        self,
        split: Split,
        slices: list[tuple[int, int]],
        shard: Shard,
        sizes: Tensor | None,
        first_pass: FirstPass,
        flip: bool = True,
    ):
        self.files, self.labels = split.files, torch.tensor(split.labels, dtype=torch.int64)
        self.slices, self.shard, self.sizes, self.first_pass, self.flip = slices, shard, sizes, first_pass, flip

    def batches(self, epoch: int, step: int) -> Iterator[Inputs]:
        """From a step on, without an end. DALI asks for a few batches ahead."""
        for place in self.first_pass.ahead(self._places(epoch, step)):
            yield self.inputs(place.numbers, self.shard.view(place.epoch))

    def _places(self, epoch: int, first: int) -> Iterator[Place]:
        """The batches of this process, epoch after epoch, from a step on."""
        samples, trains = len(self.files), self.sizes is not None
        while True:
            order = self.shard.order(samples, epoch) if trains else torch.arange(samples)
            for step, (start, stop) in enumerate(self.slices[first:], first):
                yield Place(epoch, step, order[start:stop])
            epoch, first = epoch + trains, 0

    def inputs(self, numbers: Tensor, view: int) -> Inputs:
        """Of the images with these numbers, int64 [B]."""
        names = np.array([os.fsencode(self.files[number]) for number in numbers.tolist()])
        inputs = [names.view(np.uint8).reshape(len(names), -1), self.labels[numbers].numpy()]  # zeros end a name
        if self.sizes is None:
            return inputs
        boxes = resized_boxes(self.shard.seed, view, numbers, self.sizes[numbers]).int()
        flips = crops_and_flips(self.shard.seed, view, numbers, 0, self.flip)[1].int()
        return [*inputs, boxes[:, :2].contiguous().numpy(), boxes[:, 2:].contiguous().numpy(), flips.numpy()]
