"""Random images that are on the device from the start: a run on them measures everything but the data.

Random, never zeros: multiplications by zero draw less power, so the clocks stay higher than in training. A few batches
are made once and handed out in turn, uncopied; their targets are fixed. An epoch has the length of a real one.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .base import derived_seed, epoch_of, evaluation_slices, training_slices

HELD = 4  # batches


def create_synthetic(options, device, *, seed, rank, world_size, dtype) -> tuple["SyntheticLoader", "SyntheticLoader"]:
    """The training loader, and an evaluation loader of a tenth of its images; they share the batches they hold."""
    random = torch.Generator(device).manual_seed(derived_seed(seed, rank))
    most = options.batch_size + 2  # see base.training_steps
    shape = (HELD, most, options.image_size, options.image_size, 3)
    images = torch.randn(shape, generator=random, device=device, dtype=dtype).permute(0, 1, 4, 2, 3)
    target = torch.randint(options.synthetic_classes, (HELD, most), generator=random, device=device)
    loaders = []
    for train, samples in ((True, options.synthetic_samples), (False, -(-options.synthetic_samples // 10))):
        slices = (training_slices if train else evaluation_slices)(samples, options.batch_size, rank, world_size)
        sizes = [stop - start for start, stop in slices]
        loaders.append(SyntheticLoader(images, target, sizes, samples, options.synthetic_classes, train=train))
    return tuple(loaders)


class SyntheticLoader:
    """A Loader (see base.py): batch i of an epoch is the first `sizes[i]` images of held batch i % HELD."""

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

    def state_dict(self) -> dict:
        return {"loader": "synthetic", "epoch": self.epoch} if self.train else {}

    def load_state_dict(self, state: dict) -> None:
        if self.train:
            self.epoch = epoch_of(state, "synthetic")
