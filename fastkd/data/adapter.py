"""Any loader of (images, target), such as torch's DataLoader, as a Loader of the trainer.

The batches go to the device and are checked; nothing is cast. An epoch is given again, also by a new process, if its
random numbers come from torch's, Python's or numpy's generators: the trainer sets these before each epoch. The loader's
and the sampler's own `generator` is kept in the state. `sampler.set_epoch` is called where there is one.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..errors import UserError
from .base import EpochLoader, Loader, checked_pair
from .fingerprint import of_dataset, of_text
from .prefetch import Prefetch
from .shares import check_train_share, gathered, sampler_of, val_share

PROTOCOL = ("__iter__", "__len__", "classes", "samples", "state_dict", "load_state_dict")
DEEPEST = 8  # datasets within one another, such as Subset


class OnDevice:
    """The batches of `loader` on the device, in this memory format; `role` is what errors call it.

    Images are [N, 3, H, W] floating, the target has N rows. On CUDA the copies run beside the steps (prefetch.py).
    """

    def __init__(self, loader: Iterable, device: torch.device, memory_format: torch.memory_format, role: str):
        self.loader, self.device, self.memory_format, self.role = loader, device, memory_format, role
        if classes := class_names(loader):
            self.classes = classes
        self.prefetch = Prefetch(self._formatted, device) if device.type == "cuda" else None

    @property
    def held_s(self) -> float:
        """Seconds that the loader has waited for steps on the device, see wait.py."""
        return self.prefetch.held_s if self.prefetch else 0.0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        pairs: Iterator = (checked_batch(batch, self.role) for batch in self.loader)
        if (first := next(pairs, None)) is None:
            return
        pairs = chain([first], pairs)
        is_on_host = all(part.device.type == "cpu" for part in first)
        del first  # its memory
        # What is on the device was made on its current stream, for which the prefetch's stream does not wait.
        if self.prefetch and is_on_host:
            yield from self.prefetch(pairs)
        else:
            yield from (self._sent(*pair) for pair in pairs)

    def _sent(self, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        images = self._formatted(images.to(self.device, non_blocking=True))
        return images, target.to(self.device, non_blocking=True)

    def _formatted(self, images: Tensor) -> Tensor:
        return images.contiguous(memory_format=self.memory_format)


class SizedOnDevice(OnDevice):
    """The same, of a loader that has a length."""

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]


class AdaptedLoader(SizedOnDevice):
    """A training loader: see Loader in base.py. `classes`: names, in the order of the labels."""

    def __init__(
        self,
        loader: Iterable,
        classes: Sequence[str],
        device: torch.device,
        memory_format: torch.memory_format,
    ):
        super().__init__(loader, device, memory_format, "train_loader")
        self.classes, self.samples, self.epoch = tuple(classes), _samples(loader), 0
        for name in ("image_size", "mean", "std"):  # of the images, for the weights file
            if hasattr(loader, name):
                setattr(self, name, getattr(loader, name))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for part in _parts(self.loader):
            if hasattr(part, "set_epoch"):
                part.set_epoch(self.epoch)
        epoch, last = self.epoch, len(self) - 1
        for step, batch in enumerate(super().__iter__()):
            if step == last:
                self.epoch = epoch + 1
            yield batch

    def fingerprint(self) -> str:
        """A hash of the images and labels of all processes, which each must call; "" if they are not at hand."""
        parts = gathered(of_dataset(getattr(self.loader, "dataset", None)))
        return parts[0] if len(set(parts)) == 1 else of_text("\0".join(parts))

    @property
    def sampler(self) -> str:
        """The class of the sampler, such as RandomSampler; "" if it is not known."""
        sampler = sampler_of(self.loader) if isinstance(self.loader, DataLoader) else None
        return "" if sampler is None else type(sampler).__name__

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "generators": [each.get_state() for each in self._generators()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        own, saved = self._generators(), state.get("generators", [])
        if len(saved) != len(own):
            raise UserError(
                f"train_loader has {len(own)} generators of its own and the checkpoint {len(saved)}: give the loader "
                "of before to go on, or begin a new run with another --out"
            )
        self.epoch = state["epoch"]
        for generator, values in zip(own, saved, strict=True):
            generator.set_state(values)

    def _generators(self) -> list[torch.Generator]:
        """Those of the loader and its samplers, each once; the ones of this process that everything shares are not."""
        found = [getattr(part, "generator", None) for part in _parts(self.loader)]
        return list(dict.fromkeys(each for each in found if isinstance(each, torch.Generator)))


def adapt(
    train_loader: Any,
    val_loader: Any,
    classes: Sequence[str] | None,
    device: torch.device,
    memory_format: torch.memory_format,
    log: Callable[[str], None],
) -> tuple[Loader, Iterable]:
    """Both loaders as the trainer takes them; a Loader is given as it is.

    `classes`: names, for a training loader whose data set has none. Raises UserError if a loader cannot be used. `log`
    gets a line if a resume with it is not exact.
    """
    for name, loader in (("train_loader", train_loader), ("val_loader", val_loader)):
        kind = type(loader)
        if isinstance(loader, Iterator) and kind.__module__ in ("builtins", "torch.utils.data.dataloader"):
            raise UserError(
                f"{name} is an iterator ({kind.__name__}), which can be read only once, and every epoch reads it: give "
                "what iter() was called on, such as the DataLoader itself"
            )
    if classes is not None and (isinstance(classes, str) or not isinstance(classes, Iterable)):
        raise UserError(f"classes must be a list of names, one for each label, got {classes!r}")
    follows = all(hasattr(train_loader, name) for name in PROTOCOL)
    if follows and classes is not None and tuple(classes) != tuple(train_loader.classes):
        raise UserError(f"classes={list(classes)[:5]} are not those of train_loader, {list(train_loader.classes)[:5]}")
    if not follows:
        train_loader = _adapted(train_loader, classes, device, memory_format, log)
    if not isinstance(val_loader, EpochLoader) and hasattr(val_loader, "__iter__"):
        kind = SizedOnDevice if hasattr(val_loader, "__len__") else OnDevice
        val_loader = kind(val_share(val_loader, log), device, memory_format, "val_loader")
    return train_loader, val_loader


def _adapted(
    loader: Any,
    classes: Sequence[str] | None,
    device: torch.device,
    memory_format: torch.memory_format,
    log: Callable[[str], None],
) -> AdaptedLoader:
    kind = type(loader).__name__
    if missing := [name for name in PROTOCOL[:2] if not hasattr(loader, name)]:
        raise UserError(f"train_loader ({kind}) lacks {', '.join(missing)}: give an iterable of batches with a length")
    try:
        len(loader)
    except TypeError as error:  # a DataLoader of a data set without a length
        raise UserError(f"train_loader ({kind}) has no length ({error}): the schedule needs one") from None
    names = classes if classes is not None else _names_of(loader)
    if not names:
        raise UserError(
            f"train_loader ({kind}) has no class names (dataset.classes): give Trainer(..., classes=[...]), one name "
            "for each label, in the order of the labels"
        )
    check_train_share(loader, log)
    if getattr(loader, "persistent_workers", False):
        log(
            f"train_loader is a {kind} with persistent_workers: after a resume within an epoch its workers draw other "
            "random numbers; persistent_workers=False keeps a resume exact"
        )
    apart = told_apart(names)
    if numbered := sorted(set(apart) - set(map(str, names))):
        log(f"classes of one name get the number of their label: {', '.join(numbered[:4])}")
    return AdaptedLoader(loader, apart, device, memory_format)


def class_names(loader: object) -> tuple[str, ...]:
    """The names of the loader or of its data set, told apart; () if there are none."""
    return told_apart(_names_of(loader))


def _names_of(loader: object) -> Sequence[object]:
    """Of the loader or of its data set, which may be inside of others."""
    thing: Any = loader
    for _ in range(DEEPEST):
        classes = getattr(thing, "classes", None)
        if isinstance(classes, (list, tuple)) and classes:
            return classes
        thing = getattr(thing, "dataset", None)
    return ()


def told_apart(names: Iterable[object]) -> tuple[str, ...]:
    """The names, with the number of the label after those that are equal: ImageNet has two classes called crane."""
    words = [str(name) for name in names]
    times = Counter(words)
    return tuple(f"{word} ({label})" if times[word] > 1 else word for label, word in enumerate(words))


def checked_batch(batch: Any, role: str) -> tuple[Tensor, Tensor]:
    """(images, target) of a batch that `role` gave, with images [N, 3, H, W] and N labels. Raises UserError if not."""
    images, target = checked_pair(batch, role)
    if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise UserError(
            f"{role} gives images {list(images.shape)} of {images.dtype}; [N, 3, H, W] of normalised floating numbers "
            "are needed"
        )
    if target.shape[:1] != images.shape[:1]:
        raise UserError(f"{role} gives labels {list(target.shape)} for {len(images)} images in one batch")
    return images, target


def _samples(loader: Any) -> int:
    """Images of an epoch over all processes, as far as they are known."""
    data = getattr(loader, "dataset", None)
    try:
        return len(data)  # type: ignore[arg-type]
    except TypeError:  # none, or one without a length
        return len(loader) * (getattr(loader, "batch_size", None) or 1)


def _parts(loader: Any) -> list[Any]:
    """The loader, its batch sampler and their samplers, each once: whatever may have a generator or `set_epoch`."""
    batches = getattr(loader, "batch_sampler", None)
    parts = [loader, batches, getattr(loader, "sampler", None), getattr(batches, "sampler", None)]
    return list({id(part): part for part in parts if part is not None}.values())
