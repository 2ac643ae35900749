"""Where batches come from: `create_loaders` makes the training and the evaluation loader of a run.

base.py          the Loader protocol, and the rule that splits an epoch over processes
layout.py        which images of a folder are for training and which for evaluation
scan.py          finds the images of a folder and checks them
walk.py          the files below a folder: which are images, and why the others are skipped
classes.py       the class names of a weights file against those of the data
decode.py        one picture file to pixels; names the file if it is damaged
folder.py        a folder of images, decoded in worker processes
dali.py          a folder of images, decoded by NVIDIA DALI: faster, and on the GPU if there is one
dali_package.py  which DALI package fits torch, and whether it can be imported
digits.py        1,797 real images inside the package
normalise.py     bytes to normalised channels-last batches
prefetch.py      batches to a CUDA device, one ahead of the step
synthetic.py     random images that are already on the device, to measure a run without loading data
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch

from ..errors import UserError, nearest
from .base import IMAGENET_MEAN, IMAGENET_STD, UNLABELLED, EpochLoader, Loader, Shard
from .dali_package import import_problem
from .layout import evaluation_split, training_splits
from .scan import Split


def default_workers() -> int:
    """The number of cores divided by the number of processes on this machine, 16 at most."""
    return max(1, min(16, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


LoaderName = Literal["auto", "dali", "folder"]


@dataclass(frozen=True)
class DataOptions:
    """Which images, and how they are read."""

    data: str = "digits"
    """A folder with train/<class>/* and val/<class>/*, or "digits" (embedded), or "synthetic" (random, to measure)."""
    val_fraction: float = 0.0
    """Hold out this fraction of each class for evaluation: for a folder without val/, or of class folders alone."""
    split_seed: int = 0
    """Chooses the images that val_fraction holds out, together with their names."""
    unlabelled: str = ""
    """A folder of images without labels, at any depth: trained on beside those of train/, or alone if it is missing."""
    ignore_class_names: bool = False
    """Compare the classes of a weights file and of the data by position, not by their names."""
    loader: LoaderName = "auto"
    """What decodes a folder: NVIDIA DALI, or torchvision ("folder"); "auto" takes DALI where it can start."""
    batch_size: int = 128
    """Images per step and process; also -b."""
    image_size: int = 224
    """Side of the square crop, in pixels; the digits are always 32."""
    workers: int = field(default_factory=default_workers)
    """Decoding threads (DALI, at least 1) or processes (torchvision; 0: the training process itself), per process."""
    exif: bool = False
    """Turn photos as their EXIF orientation says; off, as in torchvision's ImageFolder."""
    hw_decoder_load: float = 0.65
    """Fraction of the JPEGs that the GPU's hardware decoder decodes, 0 to 1; DALI on CUDA only."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Mean of each channel of images in [0, 1], which is subtracted; not used for the digits."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Standard deviation of each channel, by which it is divided; not used for the digits."""
    synthetic_classes: int = 1000
    """Classes of the synthetic data."""
    synthetic_samples: int = 51200
    """Training images per epoch of the synthetic data, over all processes; evaluation uses a tenth as many."""

    def __post_init__(self) -> None:
        if self.loader not in get_args(LoaderName):
            names = get_args(LoaderName)
            raise UserError(f"loader={self.loader!r}: choose one of {', '.join(names)}{nearest(self.loader, names)}")
        least = {"batch_size": 2, "image_size": 8, "workers": 0, "synthetic_classes": 2, "synthetic_samples": 2}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise UserError(f"{name}={getattr(self, name)}: give at least {low}")
        if not 0 <= self.val_fraction < 1:
            raise UserError(f"val_fraction={self.val_fraction}: give a fraction from 0 to below 1, such as 0.1")
        if self.split_seed and not self.val_fraction:
            raise UserError(f"split_seed={self.split_seed} needs val_fraction: it chooses the images that are held out")
        for name in ("val_fraction", "unlabelled"):
            if self.data in ("digits", "synthetic") and getattr(self, name):
                raise UserError(f"{name}={getattr(self, name)!r} is for a folder of images, and data={self.data!r}")
        if not 0 <= self.hw_decoder_load <= 1:
            raise UserError(f"hw_decoder_load={self.hw_decoder_load}: give a fraction from 0 to 1")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != 3 or not all(math.isfinite(value) for value in values):
                raise UserError(f"{name}={values}: give three finite numbers, one for each of red, green, blue")
        if min(self.std) <= 0:
            raise UserError(f"std={self.std}: give three numbers above 0")


def create_loaders(
    options: DataOptions,
    device: torch.device,
    *,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    dtype: torch.dtype = torch.float32,
    log: Callable[[str], None] = print,
    gather: Callable[[Any], list[Any]] = lambda thing: [thing],
) -> tuple[Loader, Loader]:
    """The training and the evaluation loader: batches of `dtype` on `device`, this process's share of each epoch.

    Both have the classes of the training images. Images of `options.unlabelled` have the label UNLABELLED (-100).
    `log` gets one line for each choice made here, and for what is skipped in the folder. `gather(x)` gives the x of
    every process, so that all of them choose the same decoder. Raises UserError if the data cannot be used.
    """
    shard = Shard(seed, rank, world_size, dtype)
    if embedded := _embedded(options, device, shard):
        return embedded
    splits = training_splits(options, log)
    train, val = _folder_loaders(splits, options, device, shard, log, gather)
    train.unlabelled = splits["train"].labels.count(UNLABELLED)
    return train, val


def create_eval_loader(
    options: DataOptions,
    device: torch.device,
    *,
    rank: int = 0,
    world_size: int = 1,
    dtype: torch.dtype = torch.float32,
    log: Callable[[str], None] = print,
    gather: Callable[[Any], list[Any]] = lambda thing: [thing],
) -> Loader:
    """The evaluation loader alone, as from `create_loaders`, of a folder that may have no train/.

    Its classes are those of the images that are evaluated. Without val/ these are the images that `val_fraction` holds
    out, or all images of a folder of classes.
    """
    if options.unlabelled:
        raise UserError(f"unlabelled={options.unlabelled!r} is for training: accuracy needs labels")
    shard = Shard(0, rank, world_size, dtype)
    if embedded := _embedded(options, device, shard):
        return embedded[1]
    split = evaluation_split(options, log)
    return _folder_loaders({"val": split}, options, device, shard, log, gather)[0]


def _embedded(options: DataOptions, device: torch.device, shard: Shard) -> tuple[Loader, Loader] | None:
    """The loaders of the digits or the synthetic data; None for a folder."""
    if options.data not in ("digits", "synthetic"):
        return None
    if options.loader != "auto":
        raise UserError(
            f"loader={options.loader!r} decodes a folder of images and data={options.data!r} needs none: "
            "leave loader at 'auto', or set data to a folder"
        )
    if options.data == "digits":
        from .digits import create_digits

        return create_digits(options, device, shard)
    from .synthetic import create_synthetic

    return create_synthetic(options, device, shard)


def _folder_loaders(
    splits: dict[str, Split],
    options: DataOptions,
    device: torch.device,
    shard: Shard,
    log: Callable[[str], None],
    gather: Callable[[Any], list[Any]],
) -> list[EpochLoader]:
    """A loader for each split. The one called "train" is for training."""
    loaders = None if options.loader == "folder" else _dali(splits, options, device, shard, log, gather)
    if loaders is not None:
        return loaders
    from .folder import FolderLoader

    return [FolderLoader(split, options, device, shard, train=name == "train") for name, split in splits.items()]


def _dali(
    splits: dict[str, Split],
    options: DataOptions,
    device: torch.device,
    shard: Shard,
    log: Callable[[str], None],
    gather: Callable[[Any], list[Any]],
) -> list[EpochLoader] | None:
    """The loaders, or None if the DALI of any process cannot start and `loader` is "auto". Logs the choice made."""
    loaders, problem = _start_dali(splits, options, device, shard)
    problem = _first_problem(gather(problem))
    if problem and options.loader == "dali":
        raise UserError(f"loader='dali': {problem}; loader='folder' does without it")
    if problem:
        log(f"data: decoding with torchvision ({problem})")
        return None
    if options.loader == "auto":
        log("data: decoding with NVIDIA DALI (it is installed; loader='folder' takes torchvision)")
    return loaders


def _start_dali(
    splits: dict[str, Split], options: DataOptions, device: torch.device, shard: Shard
) -> tuple[list[EpochLoader] | None, str]:
    """(the loaders, ""), or (None, why DALI cannot be used in this process)."""
    if problem := import_problem():
        return None, f"NVIDIA DALI, which is faster, {problem}"
    from .dali import WAY_OUT, DaliLoader
    from .dali_files import undecodable

    if problem := undecodable(tuple(splits.values())):
        return None, problem
    loaders = [DaliLoader(split, options, device, shard, train=name == "train") for name, split in splits.items()]
    try:
        if loaders[0].slices:  # a process may have no images to evaluate
            loaders[0].start()
    except UserError as error:
        return None, str(error).removesuffix(WAY_OUT)
    return [*loaders], ""


def _first_problem(problems: list[str]) -> str:
    """The first that is not empty, with its process if the processes differ; "" if there is none."""
    for rank, problem in enumerate(problems):
        if problem:
            return problem if len(set(problems)) == 1 else f"process {rank} of {len(problems)}: {problem}"
    return ""
