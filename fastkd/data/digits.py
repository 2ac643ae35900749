"""The UCI handwritten digits: 1,797 real 8x8 images, inside the package, so that a run needs no download.

E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998,
https://doi.org/10.24432/C50P49, licence CC BY 4.0. digits.npz holds its test part (13 of the 43 writers) as
scikit-learn's `load_digits` gives it: images uint8 [1797, 8, 8] with values 0 to 16, target uint8 [1797]. Changed here:
enlarged to 32x32.

Every fifth image of each class is for evaluation: 1,442 to train, 355 to evaluate.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from .base import EpochLoader, Shard, derived_seed
from .resident import ResidentSet

SIDE = 32  # pixels
SHIFT = 4  # pixels


def read_digits() -> tuple[Tensor, Tensor]:
    """Images [1797, 32, 32] float32 in [0, 1] and target [1797] int64, on the CPU."""
    with np.load(Path(__file__).with_name("digits.npz")) as file:
        images = torch.from_numpy(file["images"]).float().div(16)
        target = torch.from_numpy(file["target"]).long()
    return interpolate(images[:, None], (SIDE, SIDE), mode="bilinear", align_corners=False).squeeze(1), target


def is_for_evaluation(target: Tensor) -> Tensor:
    """bool [N]: every fifth image of each class, in the file's order."""
    ones = torch.nn.functional.one_hot(target)
    position = ones.cumsum(0).gather(1, target[:, None]).squeeze(1)  # 1, 2, 3, ... within the class
    return position % 5 == 0


def digits_set(train: bool) -> ResidentSet:
    """The images to train on or those to evaluate, uint8 [N, 32, 32, 1], rounded."""
    images, target = read_digits()
    chosen = is_for_evaluation(target) != train
    pixels = images[chosen].mul(255).round().to(torch.uint8)
    return ResidentSet(tuple("0123456789"), pixels[..., None], target[chosen])


class DigitsLoader(EpochLoader):
    """A Loader (see base.py) over images [N, 40, 40] and target [N] on the device."""

    name = "digits"
    labels: tuple[str, ...] = tuple("0123456789")
    image_size = SIDE
    mean: tuple[float, ...]  # of each channel, before normalising
    std: tuple[float, ...]

    def __init__(self, images_NHW: Tensor, target: Tensor, batch_size: int, shard: Shard, *, train: bool):
        super().__init__(self.labels, len(images_NHW), batch_size, shard, train=train)
        self.images, self.target = images_NHW, target

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        corners = torch.full((self.samples, 2), SHIFT)  # top left corner of each image's crop
        if self.train:
            random = torch.Generator().manual_seed(derived_seed(self.seed, epoch, SHIFT))
            corners = torch.randint(2 * SHIFT + 1, (self.samples, 2), generator=random)
        order, corners = self.order(epoch).to(self.images.device), corners.to(self.images.device)
        for start, stop in self.slices:
            chosen = order[start:stop]
            yield shifted(self.images, chosen, corners[chosen]), self.target[chosen]


def shifted(images_NHW: Tensor, chosen: Tensor, corner_B2: Tensor) -> Tensor:
    """Crops at `corner_B2` of the `chosen` [B] images, channels-last [B, 3, SIDE, SIDE], with one gather."""
    side = torch.arange(SIDE, device=images_NHW.device)
    rows, columns = (corner_B2[:, axis, None] + side for axis in (0, 1))
    crops_BHW = images_NHW[chosen[:, None, None], rows[:, :, None], columns[:, None, :]]
    return crops_BHW[..., None].expand(-1, -1, -1, 3).contiguous().permute(0, 3, 1, 2)
