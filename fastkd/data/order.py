"""The order of an epoch, and how it is split into batches and over processes.

With `paired`, positions 2k and 2k + 1 of the order are partners, which mixup and CutMix mix. Partners depend on the
seed and the view, and are always in one batch, whatever its size and the number of processes.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError


@dataclass(frozen=True)
class Shard:
    """The share of an epoch that a process gets, the dtype of its images, and which views of the images there are."""

    seed: int = 0
    rank: int = 0
    world_size: int = 1
    dtype: torch.dtype = torch.float32
    views: int = 0
    """Augmented forms of each image; 0: another one in every epoch."""
    paired: bool = False
    """The images of a batch are pairs, for mixup or CutMix."""
    repeats: int = 0
    """Crops of each image that an epoch has; 0: one. Copy c of image i then has the number i + (c << COPY)."""

    def view(self, epoch: int) -> int:
        return epoch % self.views if self.views else epoch

    def order(self, samples: int, epoch: int) -> Tensor:
        """The permutation of an epoch, [samples] int64 on the CPU, the same on every process."""
        if self.repeats > 1:
            return repeated(epoch_order(samples, self.seed, epoch), self.repeats, self.paired)
        if not self.paired:
            return epoch_order(samples, self.seed, epoch)
        partners = epoch_order(samples, self.seed, self.view(epoch), PARTNERS)
        pairs = partners[: samples // 2 * 2].view(-1, 2)
        return torch.cat([pairs[epoch_order(len(pairs), self.seed, epoch)].flatten(), partners[samples // 2 * 2 :]])


ONE_PROCESS = Shard()
PARTNERS = 1
COPY = 40  # bits of an image's number, below those of its copy
IMAGE = (1 << COPY) - 1


def repeated(order: Tensor, repeats: int, paired: bool) -> Tensor:
    """The first images of `order` int64 [N], each `repeats` times, int64 [N] (Hoffer et al., arXiv:1901.09335).

    The copies of an image are near one another, and so mostly in one batch. timm's RepeatAugSampler takes the same
    images, and gives the copies to different processes. `paired`: no image is its own partner, and each of its copies
    has another one.
    """
    samples = len(order)
    copies = torch.arange(repeats) << COPY
    count = -(-samples // repeats)
    if not paired:
        return (order[:count, None] + copies).flatten()[:samples]
    images = order[: min(count + count % 2, samples // 2 * 2)]
    return torch.cat([_paired_copies(block, copies) for block in images.split(2 * repeats)])[:samples]


def _paired_copies(images: Tensor, copies: Tensor) -> Tensor:
    """Copy c of every second image, followed by that of the image 2c + 1 places later, for each c. [K] -> [R * K]"""
    first = torch.arange(0, len(images), 2)
    second = (first + 2 * torch.arange(len(copies))[:, None] + 1) % len(images)
    pairs = torch.stack([images[first].expand(len(copies), -1), images[second]], 2)
    return (pairs + copies[:, None, None]).flatten()


def epoch_order(samples: int, seed: int, epoch: int, *more: int) -> Tensor:
    return torch.randperm(samples, generator=torch.Generator().manual_seed(derived_seed(seed, epoch, *more)))


def derived_seed(*numbers: int) -> int:
    """One seed in [0, 2**31) from several numbers: DALI takes signed 32-bit integers."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") >> 1


def shard_bounds(samples: int, rank: int, world_size: int, unit: int = 1) -> tuple[int, int]:
    """First and one-past-last position of this process's share of an epoch.

    Shares differ by at most `unit` samples, which stay together; what is over at the end is the last process's too.
    """
    units = samples // unit
    last = samples if rank == world_size - 1 else units * (rank + 1) // world_size * unit
    return units * rank // world_size * unit, last


def training_slices(
    samples: int, batch_size: int, rank: int, world_size: int, paired: bool = False
) -> list[tuple[int, int]]:
    """(start, stop) of each training batch of this process in the epoch's order, as many on every process.

    Every sample is used once. Each batch but the last has `batch_size` images; the last takes the rest of this
    process's share. A rest of fewer than two images joins the batch before it (batch normalisation cannot train on one
    image), so the last batch has 2 to `batch_size` + 2 images, with `paired` up to `batch_size` + 3.
    """
    if samples < 2 * world_size:
        raise UserError(
            f"{samples} training images for {world_size} processes: each process needs at least 2; "
            "add images or start fewer processes"
        )
    if paired and batch_size % 2:
        raise UserError(
            f"--batch-size {batch_size} and --mixup or --cutmix, which mix the images in pairs: give an even number"
        )
    unit = 2 if paired else 1
    first, last = shard_bounds(samples, rank, world_size, unit)
    full, rest = divmod(samples // unit // world_size * unit, batch_size)
    starts = [first + i * batch_size for i in range(max(1, full + (rest >= 2)))]
    return list(zip(starts, [*starts[1:], last], strict=True))


def evaluation_slices(samples: int, batch_size: int, rank: int, world_size: int) -> list[tuple[int, int]]:
    """(start, stop) of each evaluation batch of this process. Together the processes use each sample once."""
    first, last = shard_bounds(samples, rank, world_size)
    return [(start, min(start + batch_size, last)) for start in range(first, last, batch_size)]
