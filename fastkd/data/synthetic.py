"""Random images that are on the device from the start, to measure a run without the cost of loading data.

The images are random and not zero: multiplications by zero use less power, so clocks would be higher than in training.
A few batches with fixed targets are made once and given in turn, without a copy. An epoch has the length of a real one.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .base import EpochLoader
from .order import Shard, derived_seed

if TYPE_CHECKING:
    from . import DataOptions

HELD = 4  # batches


def create_synthetic(options: "DataOptions", device: torch.device, shard: Shard) -> tuple[EpochLoader, EpochLoader]:
    """The training loader, and an evaluation loader with a tenth of the images. Both use the same batches."""
    random = torch.Generator(device).manual_seed(derived_seed(shard.seed, shard.rank))
    most = options.batch_size + 3  # see order.training_slices
    shape = (HELD, most, options.image_size, options.image_size, 3)
    images = torch.randn(shape, generator=random, device=device, dtype=shard.dtype).permute(0, 1, 4, 2, 3)
    held = images, torch.randint(options.synthetic_classes, (HELD, most), generator=random, device=device)
    samples = options.synthetic_samples
    train = SyntheticLoader(held, samples, options, shard, train=True)
    return train, SyntheticLoader(held, -(-samples // 10), options, shard, train=False)


class SyntheticLoader(EpochLoader):
    """A Loader (see base.py): batch i of an epoch is the beginning of held batch i % HELD."""

    name = "synthetic"

    def __init__(self, held: tuple[Tensor, Tensor], samples: int, options: "DataOptions", shard: Shard, *, train: bool):
        classes = tuple(str(label) for label in range(options.synthetic_classes))
        super().__init__(classes, samples, options.batch_size, shard, train=train)
        self.images, self.target = held
        self.image_size, self.mean, self.std = options.image_size, options.mean, options.std

    def batches(self, epoch: int, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        for step, (start, stop) in enumerate(self.slices[first:], first):
            yield self.images[step % HELD, : stop - start], self.target[step % HELD, : stop - start]
