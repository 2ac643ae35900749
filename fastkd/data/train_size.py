"""The size of the training crops in each epoch: `--train-size 160:224` grows, `--train-size 160` does not.

Small crops cost less and the network sees them as zoomed out, so that it may be evaluated at a larger size: H. Touvron
et al., "Fixing the train-test resolution discrepancy", arXiv:1906.06423. Growing sizes: J. Howard's fast.ai entry to
DAWNBench (2018) and ffcv-imagenet, whose schedule this is: linear over the epochs, rounded to a multiple of the step.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..errors import UserError, check_side, count_of

if TYPE_CHECKING:
    from .base import EpochLoader
    from .options import DataOptions

STEP = 32  # pixels: what most networks divide the side of an image by
SMALLEST = 8  # pixels


@dataclass(frozen=True)
class TrainSizes:
    """Sides of the training crops in pixels, from `first` to `last` in multiples of `step`, over `epochs`."""

    first: int
    last: int
    step: int
    epochs: int = 1

    @classmethod
    def parse(cls, text: str) -> "TrainSizes | None":
        """Of "160", "160:224" or "160:224:16"; None for "". Raises UserError for anything else."""
        if not text:
            return None
        words = text.split(":")
        if len(words) > 3 or not all(word.isascii() and word.isdigit() for word in words):
            raise UserError(f"--train-size {text}: give a size such as 160, or first and last such as 160:224")
        first, last, step = [*map(int, words), *(int(words[0]), STEP)[len(words) - 1 :]]
        if not SMALLEST <= first <= last or not step:
            raise UserError(
                f"--train-size {text}: sizes begin at {SMALLEST} pixels and grow, in steps of 1 or more; give such as "
                "160:224, or 160:224:16"
            )
        check_side("--train-size", last)
        if first < last and (first % step or last % step):
            near = ":".join(str(max(1, round(side / step)) * step) for side in (first, last))
            raise UserError(
                f"--train-size {text}: a growing size goes in multiples of {step} pixels; give {near}, or the step "
                "as a third number"
            )
        return cls(first, last, step)

    def size_of(self, epoch: int) -> int:
        """The side in an epoch, counted from 0: `first` in the first, `last` in the last one and after it."""
        if epoch >= self.epochs - 1:
            return self.last
        steps = (self.last - self.first) * epoch / (self.epochs - 1) / self.step
        return self.first + self.step * int(steps + 0.5)

    def all(self) -> list[int]:
        """Every size of the run, in order."""
        return sorted({self.size_of(epoch) for epoch in range(self.epochs)})


def sized_loader(
    loader: "EpochLoader", options: "DataOptions", epochs: int, log: Callable[[str], None]
) -> "EpochLoader":
    """The training loader, with the sizes of `options.train_size`. Raises UserError if it cannot follow them."""
    sizes = TrainSizes.parse(options.train_size)
    if sizes is None:
        return loader
    if not loader.follows_train_size:
        raise UserError(
            f"--train-size {options.train_size} is for images that are cropped, and the loader is {loader.name!r}: "
            "drop it"
        )
    kind = getattr(getattr(loader, "augmentation", None), "kind", "rrc")
    if kind != "rrc":
        raise UserError(
            f"--train-size {options.train_size} is for random resized crops, and images in memory have "
            f"--augment {kind}: give --augment rrc, or drop it"
        )
    loader.train_sizes = sizes = replace(sizes, epochs=epochs)
    views = options.views
    if views and any(sizes.size_of(epoch) != sizes.size_of(epoch % views) for epoch in range(epochs)):
        raise UserError(
            f"--train-size {options.train_size} and --views {views}: a view comes back at another size within {epochs} "
            f"epochs, and kept answers of the teacher would be of the first one; give --views {epochs}, or one size"
        )
    shown = ", ".join(map(str, sizes.all()))
    length = count_of(epochs, "epoch")
    log(f"data: training crops of {shown} pixels over {length} (train_size); evaluation has {loader.image_size}")
    return loader


def batches_of_all_sizes(loader: object, batch: tuple[Tensor, Tensor]) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """(what errors begin with, the batch at a size) for the size of evaluation and then for every size of the run.

    batch: images [N, 3, H, W] and target; the images are resized, which is enough to see if a network takes them.
    Without sizes: "" and the batch itself.
    """
    sizes: TrainSizes | None = getattr(loader, "train_sizes", None)
    usual: int = getattr(loader, "image_size", 0)
    for side in dict.fromkeys([usual, *sizes.all()]) if sizes else ():
        images = interpolate(batch[0], (side, side), mode="bilinear", antialias=True)
        note = "" if side == usual else f"train_size does not fit, drop it: at {side} pixels, "
        yield note, (images.to(memory_format=torch.channels_last), batch[1])
    if sizes is None:
        yield "", batch
