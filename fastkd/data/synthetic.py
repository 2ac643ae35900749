"""Random images that are on the device from the start, to measure a run without the cost of loading data.

The images are random and not zero: multiplications by zero use less power, so clocks would be higher than in training.
A few batches with fixed targets are made once and given in turn, without a copy. An epoch has the length of a real one.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .base import EpochCounter, Shard, derived_seed

if TYPE_CHECKING:
    from . import DataOptions

HELD = 4  # batches


def create_synthetic(
    options: "DataOptions", device: torch.device, shard: Shard
) -> tuple["SyntheticLoader", "SyntheticLoader"]:
    """The training loader, and an evaluation loader with a tenth of the images. Both use the same batches."""
    random = torch.Generator(device).manual_seed(derived_seed(shard.seed, shard.rank))
    most = options.batch_size + 2  # see base.training_steps
    shape = (HELD, most, options.image_size, options.image_size, 3)
    images = torch.randn(shape, generator=random, device=device, dtype=shard.dtype).permute(0, 1, 4, 2, 3)
    target = torch.randint(options.synthetic_classes, (HELD, most), generator=random, device=device)

    def loader(samples: int, train: bool) -> SyntheticLoader:
        slices = shard.slices(samples, options.batch_size, train=train)
        sizes = [stop - start for start, stop in slices]
        return SyntheticLoader(images, target, sizes, samples, options.synthetic_classes, train=train)

    return loader(options.synthetic_samples, True), loader(-(-options.synthetic_samples // 10), False)


class SyntheticLoader(EpochCounter):
    """A Loader (see base.py): batch i of an epoch is the first `sizes[i]` images of held batch i % HELD."""

    name = "synthetic"

    def __init__(self, images: Tensor, target: Tensor, sizes: list[int], samples: int, classes: int, *, train: bool):
        self.images, self.target, self.sizes, self.samples, self.train = images, target, sizes, samples, train
        self.classes = tuple(str(label) for label in range(classes))
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch = self.epoch
        for step, size in enumerate(self.sizes):
            if step == len(self) - 1:
                self.epoch = epoch + 1
            yield self.images[step % HELD, :size], self.target[step % HELD, :size]
