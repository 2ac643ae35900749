"""What the trainer needs from a source of batches."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ..errors import UserError, check_classes
from .order import IMAGE, Shard, evaluation_slices, training_slices

if TYPE_CHECKING:
    from .prefetch import Prefetch
    from .train_size import TrainSizes

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Loader(Protocol):
    """Batches that are ready to use: on the device, channels-last, normalised.

    Iterating gives one epoch of (images [B, 3, H, W] floating, target [B] int64). `len()` is the number of batches of
    this process in an epoch. A training loader counts its complete epochs. `other.load_state_dict(loader.state_dict())`
    between epochs makes `other` continue with exactly the batches that `loader` would have given next.

    An epoch is complete when its last batch has been given. An epoch that was stopped before is given again, by this
    loader and by one that loads its state. An evaluation loader gives the same batches each time; its state is empty.

    A batch may be kept: nothing writes over it while it is referenced. On CUDA it belongs to the stream that is current
    when it is asked for. What is queued there finds the batch complete, although the host has not waited for it. If
    another stream uses the batch too, the first stream has to wait for that use before the batch is released.
    """

    classes: tuple[str, ...]  # names, in label order
    samples: int  # images per epoch over all processes

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...
    def state_dict(self) -> dict: ...
    def load_state_dict(self, state: dict) -> None: ...


def check_loaders(
    train_loader: Loader, val_loader: Iterable, gather: Callable[[Any], list[Any]]
) -> tuple[Tensor, Tensor]:
    """Raise UserError if a loader lacks what the trainer needs, or gives no batch.

    Gives the next training batch, so that it need not be read again; the training loader is rewound.
    `gather(x)` gives the x of every process. A process may have no images to evaluate if another has some.
    """
    if not hasattr(val_loader, "__iter__"):
        raise UserError(f"val_loader ({type(val_loader).__name__}) lacks __iter__: give an iterable of batches")
    batch = first_batch(train_loader)
    check_classes(train_loader.classes, "the classes of train_loader (Trainer's classes=, else those of its data set)")
    if all(gather(isinstance(val_loader, Sized) and len(val_loader) == 0)):
        raise UserError("val_loader is empty: it gives no batch (its length is 0)")
    return batch


def check_count(batches: int, loader: Loader, epoch: int) -> None:
    """Raise UserError if an epoch had another number of batches than len(loader).

    The learning rate, the draws of IAKD and an exact resume follow that number, so that the run would go wrong.
    """
    if batches != len(loader):
        raise UserError(
            f"train_loader gave {batches or 'no'} batch{'' if batches == 1 else 'es'} in epoch {epoch}, but its length "
            f"is {len(loader)}; the schedule follows the length: let len(train_loader) be the number of batches"
        )


def continued(loader: Loader, step: int, restore: Callable[[], None] = lambda: None) -> Iterable[tuple[Tensor, Tensor]]:
    """The batches from `step` on of the epoch that the loader's state names.

    Our loaders begin there. Others give the batches before it as well, which are dropped; then `restore` is called, so
    that what they draw from there on follows the generators as they were.
    """
    return loader if isinstance(loader, EpochLoader) or not step else _rest(loader, step, restore)


def _rest(loader: Loader, step: int, restore: Callable[[], None]) -> Iterator[tuple[Tensor, Tensor]]:
    batches = iter(loader)
    for _ in islice(batches, step):
        pass
    restore()
    yield from batches


def state_at(loader: Loader, start: dict[str, Any], step: int) -> dict[str, Any]:
    """The state to go on from after `step` batches of an epoch that is not finished; `start` is that of its beginning.

    A loader of the caller may count an epoch when it begins.
    """
    return start | ({"step": step} if isinstance(loader, EpochLoader) else {})


@contextmanager
def rewound(loader: Loader) -> Iterator[None]:
    """After the block, `loader` gives the batches that it would have given without the block."""
    position = loader.state_dict()
    yield
    loader.load_state_dict(position)


def first_images(train_loader: Loader) -> Tensor:
    """The images of the next batch, [B, 3, H, W]. The loader is rewound. Raises UserError if there is no batch."""
    return first_batch(train_loader)[0]


def first_batch(train_loader: Loader) -> tuple[Tensor, Tensor]:
    """The next batch: images [B, 3, H, W] and target. The loader is rewound. Raises UserError if there is none."""
    with rewound(train_loader):
        batch: Any = next(iter(train_loader), None) if len(train_loader) else None
    if batch is None:
        raise UserError(f"train_loader is empty: it gives no batch (its length is {len(train_loader)})")
    return checked_pair(batch, "train_loader")


def checked_pair(batch: Any, role: str) -> tuple[Tensor, Tensor]:
    """(images, target) of a batch that `role` gave. Raises UserError if it is something else. Values are not read."""
    is_pair = isinstance(batch, (tuple, list)) and len(batch) == 2
    if not is_pair or not all(isinstance(part, Tensor) for part in batch):
        raise UserError(
            f"{role} gives {_described(batch)}; a batch is the pair (images, target) of tensors: let the data set or "
            "collate_fn make it"
        )
    return batch[0], batch[1]


def _described(batch: Any) -> str:
    """What a batch is made of, in a few words."""
    if isinstance(batch, dict):
        return f"a dict of {', '.join(map(str, batch))}"[:120]
    if isinstance(batch, (tuple, list)):
        return f"a {type(batch).__name__} of {', '.join(type(part).__name__ for part in batch)}"[:120]
    return f"a {type(batch).__name__}"


def describe(loader: Loader) -> dict[str, Any]:
    """What must be equal when a run is resumed: the number of images, and the names of the classes.

    If some of the images are unlabelled, their number too.
    """
    unlabelled = getattr(loader, "unlabelled", 0)
    about = {"images": loader.samples, "classes": list(loader.classes)}
    return about | ({"unlabelled": unlabelled} if unlabelled else {})


def input_of(loader: Loader, options: Mapping[str, Any]) -> dict[str, Any]:
    """The loader's image_size, mean and std where it has them, as all of ours do; else those of `options`.

    `resident` is True for images that were kept in memory at their own size. A loader of the caller may have tensors or
    arrays: they become lists, as they are written to files.
    """
    values: dict[str, Any] = {name: getattr(loader, name, options.get(name)) for name in ("image_size", "mean", "std")}
    plain = {name: value.tolist() if hasattr(value, "tolist") else value for name, value in values.items()}
    plain["resident"] = getattr(loader, "name", "") == "resident"
    return {name: value for name, value in plain.items() if value}


def resize_side(image_size: int, crop_pct: float = 0.0) -> int:
    """Length of the shorter side, in pixels, before the centre crop of evaluation. Rounded down, as timm does."""
    return math.floor(image_size / crop_pct) if crop_pct else round(image_size * 256 / 224)


def position_of(state: dict, loader: str) -> tuple[int, int]:
    """(epoch, step) in a state that a `loader` wrote. Raises UserError if another kind of loader wrote it."""
    before = state.get("loader")
    if before != loader:
        known = before in ("dali", "folder", "packed", "resident")  # "digits" is of older versions
        remedy = f"resume with --loader {before}, or begin" if known else "begin"
        if "packed" in (before, loader):
            remedy = "resume with the same --data, or begin"
        raise UserError(
            f"the checkpoint's data state was written by the {before!r} loader and this run uses {loader!r}, whose "
            f"batches differ: {remedy} a new run with another --out"
        )
    if "step" not in state:
        raise UserError(
            "the checkpoint was written by an older version of fastkd, whose crops differ: begin a new run with "
            "another --out, or go on with that version"
        )
    return state["epoch"], state["step"]


def place_of(loader: Loader, epoch: int, done: int) -> tuple[int, int]:
    """(epoch, first step) of the run's `epoch`, of which `done` steps are over, as the loader counts them.

    Our loader may have given epochs before this run. A loader of the caller is taken to count as the run does.
    """
    return (loader.epoch, loader.first - done) if isinstance(loader, EpochLoader) else (epoch, 0)


def samples_of(loader: Loader, epoch: int, step: int, count: int, rank: int) -> tuple[int, Tensor]:
    """(view, numbers of the images int64 [count]) of a batch. A loader of the caller is taken to have new images."""
    if isinstance(loader, EpochLoader):
        return loader.shard.view(epoch), loader.samples_of(epoch, step)
    return epoch, torch.arange(count) + (rank << 40) + (step << 20)


def without_copies(samples: Tensor) -> Tensor:
    """The numbers of the images in those of their copies (`Shard.repeats`), int64."""
    return samples & IMAGE


class EpochLoader:
    """What our loaders share: a Loader whose batches depend on the seed and the number of the epoch.

    It can begin at any step of an epoch: load the state {"loader": name, "epoch": 3, "step": 500}.
    """

    name: str  # in the state
    image_size: int  # pixels, of evaluation
    mean: tuple[float, ...]  # of each channel, which was subtracted from images in [0, 1]
    std: tuple[float, ...]
    unlabelled = 0  # images of an epoch that have no label
    fingerprint: Callable[[], str] = staticmethod(lambda: "")  # of the images and their labels; "": not known
    follows_train_size = False  # whether the loader gives training images of `size_of(epoch)`
    train_sizes: "TrainSizes | None" = None  # of the training crops over the epochs; None: image_size
    prefetch: "Prefetch | None" = None  # on CUDA, of a loader that decodes on the host
    _held_s = 0.0

    def __init__(self, classes: tuple[str, ...], samples: int, batch_size: int, shard: Shard, *, train: bool):
        self.classes, self.samples, self.train, self.seed, self.shard = classes, samples, train, shard.seed, shard
        self.batch_size = batch_size  # images of a process in a step
        place = shard.rank, shard.world_size
        if train:
            self.slices = training_slices(samples, batch_size, *place, shard.paired)
        else:
            self.slices = evaluation_slices(samples, batch_size, *place)
        self.epoch = 0  # complete epochs that the loader has given
        self.first = 0  # step at which the next iteration begins
        self._known: tuple[int, Tensor] | None = None  # the last epoch that was asked for, and its order

    def __len__(self) -> int:
        return len(self.slices)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch, first = self.epoch, self.first
        for step, batch in enumerate(self.batches(epoch, first), first):
            if self.train and step == len(self) - 1:
                self.epoch, self.first = epoch + 1, 0
            yield batch

    def batches(self, epoch: int, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one epoch, one for each of `slices[first:]`."""
        raise NotImplementedError

    def size_of(self, epoch: int) -> int:
        """The side of the images of an epoch, in pixels; evaluation always has `image_size`."""
        return self.train_sizes.size_of(epoch) if self.train and self.train_sizes else self.image_size

    def stretch(self, epochs: int) -> None:
        """Let the sizes of the training images grow over so many epochs."""
        if self.train_sizes:
            self.train_sizes = replace(self.train_sizes, epochs=epochs)

    def order(self, epoch: int) -> Tensor:
        """Numbers of the images, [samples] int64 on the CPU: `Shard.order`, or as they are for evaluation."""
        if not self.train:
            return torch.arange(self.samples)
        if self._known is None or self._known[0] != epoch:
            self._known = epoch, self.shard.order(self.samples, epoch)
        return self._known[1]

    def samples_of(self, epoch: int, step: int) -> Tensor:
        """Numbers of the images of a batch, int64 on the CPU; of repeated ones see `Shard.repeats`."""
        start, stop = self.slices[step]
        return self.order(epoch)[start:stop]

    @property
    def held_s(self) -> float:
        """Seconds that the loader has waited for steps on the device, see wait.py."""
        return self._held_s + (self.prefetch.held_s if self.prefetch else 0.0)

    def hold_until(self, step: torch.cuda.Event) -> None:
        """Wait for a step on the device, and count the time as the step's."""
        start = time.perf_counter()
        step.synchronize()
        self._held_s += time.perf_counter() - start

    def state_dict(self) -> dict:
        return {"loader": self.name, "epoch": self.epoch, "step": self.first} if self.train else {}

    def load_state_dict(self, state: dict) -> None:
        if not self.train:
            return
        epoch, step = position_of(state, self.name)
        if not 0 <= step < len(self):
            raise UserError(f"the checkpoint's data state is at step {step} of an epoch of {len(self)} steps")
        self.epoch, self.first = epoch, step
