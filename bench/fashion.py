"""Fashion-MNIST in memory: 28x28 pictures of clothes, padded to 32x32, three equal channels.

H. Xiao, K. Rasul, R. Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms",
arXiv:1708.07747, licence MIT. The four IDX files, gzipped or not, are read from a folder; Debian's package
dataset-fashion-mnist installs them. 60,000 images to train and 10,000 to evaluate, ten classes of equal size.

The subset is fixed and stratified: the first images of each class, in the order of the files. Training shifts each
image by up to 4 pixels and mirrors every second one; both depend on (seed, epoch) and the image.
"""

import gzip
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from fastkd.data.base import Shard, derived_seed
from fastkd.data.digits import SHIFT, DigitsLoader
from fastkd.errors import UserError

FOLDER = Path("/usr/share/datasets/fashion-mnist")
CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


def read_idx(path: Path) -> np.ndarray:
    """The uint8 array of an IDX file, or of `path`.gz. Raises UserError if there is none."""
    zipped = path.with_name(f"{path.name}.gz")
    if not (path.is_file() or zipped.is_file()):
        raise UserError(f"{path} is not there, gzipped or not: apt install dataset-fashion-mnist, or give --folder DIR")
    raw = path.read_bytes() if path.is_file() else gzip.decompress(zipped.read_bytes())
    if raw[:3] != b"\0\0\x08":  # two zeros, then the code of uint8
        raise UserError(f"{path} is no IDX file of bytes: it begins with {raw[:3]!r}")
    shape = np.frombuffer(raw, ">i4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def read_part(part: str, images: int, folder: Path = FOLDER) -> tuple[Tensor, Tensor]:
    """Images [N, 32, 32] float32 in [0, 1] and target [N] int64 of "train" or "t10k"; N = `images`, 0: all."""
    pictures = torch.from_numpy(read_idx(folder / f"{part}-images-idx3-ubyte").copy())
    target = torch.from_numpy(read_idx(folder / f"{part}-labels-idx1-ubyte").copy()).long()
    if images:
        position = one_hot(target).cumsum(0).gather(1, target[:, None]).squeeze(1)  # 1, 2, 3, ... within the class
        chosen = position <= images // len(CLASSES)
        pictures, target = pictures[chosen], target[chosen]
    return pad(pictures, (2,) * 4).float().div(255), target  # 28 pixels a side become 32


def create_fashion(
    batch_size: int, device: torch.device, shard: Shard, images: tuple[int, int], folder: Path = FOLDER
) -> tuple["FashionLoader", "FashionLoader"]:
    """The training and the evaluation loader, of `images` images each; 0: all."""
    parts = [read_part(part, count, folder) for part, count in zip(("train", "t10k"), images, strict=True)]
    std, mean = torch.std_mean(parts[0][0])

    def loader(pictures: Tensor, target: Tensor, train: bool) -> FashionLoader:
        # padded before normalising: what a shift brings in is background
        pictures = pad(pictures, (SHIFT,) * 4).sub(mean).div(std).to(device, shard.dtype)
        return FashionLoader(pictures, target.to(device), batch_size, shard, train=train)

    return loader(*parts[0], train=True), loader(*parts[1], train=False)


class FashionLoader(DigitsLoader):
    """A loader like that of the digits, which also mirrors every second training image."""

    name = "fashion"
    labels = CLASSES

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        if not self.train:
            yield from super().batches(epoch)
            return
        random = torch.Generator().manual_seed(derived_seed(self.seed, epoch, SHIFT))
        torch.randint(2 * SHIFT + 1, (self.samples, 2), generator=random)  # the shifts come before
        is_mirrored = torch.rand(self.samples, generator=random) < 0.5
        chosen = is_mirrored[self.order(epoch), None, None, None].to(self.images.device)
        for (images, target), (start, stop) in zip(super().batches(epoch), self.slices, strict=True):
            yield torch.where(chosen[start:stop], images.flip(3), images), target
