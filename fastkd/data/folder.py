"""A folder of images, decoded by decode.py and cropped by torchvision in worker processes.

Training: RandomResizedCrop (area 0.08 to 1, aspect 3/4 to 4/3, bilinear, antialiased) and a flip with probability 1/2.
Evaluation: shorter side to image_size * 256 / 224, centre crop. Both are the settings of torchvision's references.

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
from .base import EpochLoader, resize_side
from .decode import begin_worker
from .normalise import Normalise
from .order import ONE_PROCESS, Shard
from .prefetch import Prefetch
from .scan import Split
from .stored import Pictures

if TYPE_CHECKING:
    from . import DataOptions

Batch = tuple[Tensor, Tensor] | str  # images and target, or an error message


class Images(Dataset):
    """Cropped images. A key is (view, size, position in the files), for workers outlive an epoch.

    `size`: the side of a training crop in pixels.
    """

    def __init__(self, split: Split, image_size: int, *, train: bool, seed: int, exif: bool = False, flip: bool = True):
        self.files = Pictures(split.files, split.places)
        self.labels = torch.tensor(split.labels)
        self.seed, self.exif, self.flip, self.train = seed, exif, flip, train
        self.side = None if train else resize_side(image_size)
        self.transform = v2.Compose([v2.Resize(resize_side(image_size)), v2.CenterCrop(image_size)])

    def __len__(self) -> int:
        return len(self.files)

    def __getitems__(self, keys: list[tuple[int, int, int]]) -> Batch:
        """(uint8 [B, H, W, 3], int64 [B]), or an error message: an exception would show the worker's traceback."""
        numbers = torch.tensor([i for *_, i in keys])
        try:
            images = [self.files.decode(i, self.exif, self.side) for *_, i in keys]
        except UserError as error:
            return str(error)
        images = (
            self._crops(images, *keys[0][:2], numbers) if self.train else [self.transform(image) for image in images]
        )
        return torch.stack([image.permute(1, 2, 0) for image in images]).contiguous(), self.labels[numbers]

    def _crops(self, images: list[Tensor], view: int, size: int, numbers: Tensor) -> list[Tensor]:
        boxes = resized_boxes(self.seed, view, numbers, torch.tensor([image.shape[1:] for image in images]))
        flips = crops_and_flips(self.seed, view, numbers, pad=0, flip=self.flip)[1].tolist()
        crops = []
        for image, box, flip in zip(images, boxes.int().tolist(), flips, strict=True):
            crop = F.resized_crop(image, *box, [size, size])
            crops.append(crop.flip(2) if flip else crop)
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
        flip = options.flip != "off"
        self.decoded = DataLoader(
            Images(split, options.image_size, train=train, seed=shard.seed, exif=options.exif, flip=flip),
            batch_sampler=EpochKeys(self),
            num_workers=options.workers,
            persistent_workers=options.workers > 0,
            prefetch_factor=4 if options.workers else None,
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
    """The DataLoader's batch sampler: lists of (view, size, position in the files)."""

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
