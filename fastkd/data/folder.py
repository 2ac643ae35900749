"""A folder of images, decoded by decode.py and cropped by torchvision in worker processes.

Training: RandomResizedCrop (area 0.08 to 1, aspect 3/4 to 4/3, bilinear, antialiased) and a flip with probability 1/2.
Evaluation: shorter side to image_size * 256 / 224, centre crop. Both are the settings of torchvision's references.
RandAugment, random erasing, repeated augmentation, bicubic resizing and another crop_pct are options.

Workers return uint8 [B, H, W, 3], a quarter of the bytes of float32. The device normalises, on CUDA one batch ahead of
the step (prefetch.py). The crop of image i in epoch e depends only on (seed, e, i), see augment.py. So the numbers of
workers and processes change no image, and the place in the epoch is the whole state. EXIF orientation is ignored, as in
torchvision's ImageFolder, unless the option `exif` is on.
"""

import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ..errors import UserError
from .augment import crops_and_flips, resized_boxes
from .base import EpochLoader
from .decode import begin_worker
from .normalise import Normalise
from .order import IMAGE, ONE_PROCESS, Shard
from .prefetch import Prefetch
from .random_augment import RandomAugment, seeds_of
from .scan import Split
from .shared_memory import check_shared_memory
from .stored import Pictures
from .train_size import TrainSizes

if TYPE_CHECKING:
    from . import DataOptions

AHEAD = 4  # batches that a worker may be ahead of the step

Batch = tuple[Tensor, Tensor] | str  # images and target, or an error message


class Images(Dataset):
    """Cropped images. A key is (view, size, number of the image and its copy), for workers outlive an epoch.

    `size`: the side of a training crop in pixels.
    """

    def __init__(self, split: Split, options: "DataOptions", *, train: bool, seed: int):
        self.files = Pictures(split.files, split.places, options.max_pixels)
        self.labels = torch.tensor(split.labels)
        self.seed, self.exif, self.flip, self.train = seed, options.exif, options.flip != "off", train
        self.side = None if train else options.resize_side
        self.mode = v2.InterpolationMode(options.interpolation)
        self.transform = v2.Compose([v2.Resize(options.resize_side, self.mode), v2.CenterCrop(options.image_size)])
        self.augment = RandomAugment(options.aa, options.reprob, options.mean, options.interpolation)

    def __len__(self) -> int:
        return len(self.files)

    def __getitems__(self, keys: list[tuple[int, int, int]]) -> Batch:
        """(uint8 [B, H, W, 3], int64 [B]), or an error message: an exception would show the worker's traceback."""
        samples = torch.tensor([i for *_, i in keys])
        numbers = samples & IMAGE
        try:
            images = [self.files.decode(i, self.exif, self.side) for i in numbers.tolist()]
        except UserError as error:
            return str(error)
        images = (
            self._crops(images, *keys[0][:2], samples) if self.train else [self.transform(image) for image in images]
        )
        return torch.stack([image.permute(1, 2, 0) for image in images]).contiguous(), self.labels[numbers]

    def _crops(self, images: list[Tensor], view: int, size: int, samples: Tensor) -> list[Tensor]:
        boxes = resized_boxes(self.seed, view, samples, torch.tensor([image.shape[1:] for image in images]))
        flips = crops_and_flips(self.seed, view, samples, pad=0, flip=self.flip)[1].tolist()
        crops = []
        for image, box, flip in zip(images, boxes.int().tolist(), flips, strict=True):
            crop = F.resized_crop(image, *box, [size, size], self.mode)
            crops.append(crop.flip(2) if flip else crop)
        if self.augment:
            seeds = seeds_of(self.seed, view, samples)
            crops = [self.augment(crop, each) for crop, each in zip(crops, seeds, strict=True)]
        return crops


class FolderLoader(EpochLoader):
    """A Loader (see base.py) over one split of a folder."""

    name, follows_train_size = "folder", True

    def __init__(
        self, split: Split, options: "DataOptions", device: torch.device, shard: Shard = ONE_PROCESS, *, train: bool
    ):
        super().__init__(split.classes, len(split.files), options.batch_size, shard, train=train)
        options = options.for_large_images()
        self.image_size, self.mean, self.std = options.image_size, options.mean, options.std
        self.device, self.normalise = device, Normalise(options.mean, options.std, device, shard.dtype)
        self.prefetch = Prefetch(self.normalise, device) if device.type == "cuda" else None
        sizes = TrainSizes.parse(options.train_size)
        side = sizes.last if train and sizes else options.image_size
        check_shared_memory(options.workers, AHEAD, options.batch_size * side**2 * 3, "lower --workers or --batch-size")
        self.decoded = DataLoader(
            Images(split, options, train=train, seed=shard.seed),
            batch_sampler=EpochKeys(self),
            num_workers=options.workers,
            persistent_workers=options.workers > 0,
            prefetch_factor=AHEAD if options.workers else None,
            timeout=options.worker_timeout if options.workers else 0,
            pin_memory=device.type == "cuda",
            collate_fn=nn.Identity(),  # `__getitems__` makes whole batches already
            worker_init_fn=begin_worker,
            generator=torch.Generator(),  # else each epoch draws from the training process's default generator
        )

    def batches(self, epoch: int, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        if self.prefetch is not None:
            yield from self.prefetch(self._decode())
        else:
            for images, target in self._decode():
                yield self.normalise(images.to(self.device)), target.to(self.device)

    def _decode(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(uint8 [B, H, W, 3], int64 [B]) in host memory, pinned if the device is a GPU."""
        for batch in self.decoded if len(self) else ():
            if isinstance(batch, str):
                raise UserError(batch)
            yield batch


class EpochKeys:
    """The DataLoader's batch sampler: lists of (view, size, number of the image and its copy)."""

    def __init__(self, loader: FolderLoader):
        # A cycle of references would leave the loader to the garbage collector, which closes the workers' queues first:
        # each worker was then waited for in vain, 5 s.
        self.loader: FolderLoader = weakref.proxy(loader)

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        loader = self.loader
        order, view = loader.order(loader.epoch), loader.shard.view(loader.epoch)
        size = loader.size_of(loader.epoch)
        for start, stop in loader.slices[loader.first :]:
            yield [(view, size, i) for i in order[start:stop].tolist()]
