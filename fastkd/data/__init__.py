"""Where batches come from: `create_loaders` makes the training and the evaluation loader of a run.

options.py       DataOptions: which images, and how they are read
base.py          the Loader protocol
adapter.py       a DataLoader of the user, or another iterable, as a Loader
shares.py        which of its images each of several processes gets
order.py         the order of an epoch, and how it is split into batches and over processes
augment.py       what is drawn for each image: crops, flips, mixtures
train_size.py    the size of the training crops in each epoch
draws.py         the generator of these numbers
random_augment.py  RandAugment and random erasing; loader_options.py: which loader follows which option
layout.py        which images of a folder are for training and which for evaluation
scan.py          finds the images of a folder and checks them
walk.py          the files below a folder: which are images, and why the others are skipped
shards.py        tar shards and parquet files as splits; shard_names.py: which file is for what
tar_index.py     the places and labels of the images in a tar shard; shard_labels.py: their classes
parquet.py       images and labels in parquet files
stored.py        reads an image by number, wherever its bytes are
pack.py          `fastkd pack`; pack_source.py: what is packed; pack_shard.py: writes one shard
pack_format.py   the files of packed images, and their checks
packed.py        the loader of packed images; packed_set.py: small ones in memory
classes.py       the class names of a weights file against those of the data
decode.py        one picture file to pixels; names the file if it is damaged
check.py         what is bad or odd with each image; chosen.py: the images that a list or --skip-bad leaves
image_index.py   the sizes of the images of a folder, read once; index_file.py: keeps them
folder.py        a folder of images, decoded in worker processes
dali.py          a folder of images, decoded by NVIDIA DALI: faster, and on the GPU if there is one
dali_source.py   what DALI gets for each batch
dali_files.py    what DALI cannot do: tell a damaged file, decode every format
dali_start.py    whether DALI reads the images of a run, decided by all processes together
dali_package.py  which DALI package fits torch, and whether it can be imported
small_sets.py    CIFAR-10, CIFAR-100, Fashion-MNIST and MNIST in memory, and what is usual for each
cifar.py         the files of CIFAR
idx.py           the files of Fashion-MNIST and MNIST
small_folder.py  a folder of small images, decoded once
resident.py      images in memory, cropped, mirrored and normalised on the device
digits.py        1,797 real images inside the package
fingerprint.py   a hash that tells one set of training images from another
normalise.py     bytes to normalised channels-last batches
prefetch.py      batches to a CUDA device, one ahead of the step
wait.py          how long the training loop waits for its loader
synthetic.py     random images that are already on the device, to measure a run without loading data
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ..errors import UserError, as_typed
from ..kernels.logit_loss import UNLABELLED
from .base import IMAGENET_MEAN, IMAGENET_STD, EpochLoader, Loader
from .dali_start import dali_loaders, first_problem
from .fingerprint import of_split
from .layout import evaluation_split, training_splits
from .loader_options import given, given_for_training
from .options import NAMES, DataOptions, changes_augmentation
from .order import Shard
from .pack_format import PackedPart, packed_parts
from .scan import Split
from .train_size import sized_loader
from .walk import shown

if TYPE_CHECKING:
    from .options import Padding
    from .resident import ResidentSet

__all__ = ["DataOptions", "create_eval_loader", "create_loaders"]

Log = Callable[[str], None]
Gather = Callable[[Any], list[Any]]


def create_loaders(
    options: DataOptions,
    device: torch.device,
    *,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    dtype: torch.dtype = torch.float32,
    paired: bool = False,
    epochs: int = 1,
    log: Log = print,
    gather: Gather = lambda thing: [thing],
) -> tuple[Loader, Loader]:
    """The training and the evaluation loader: batches of `dtype` on `device`, this process's share of each epoch.

    Both have the classes of the training images. `paired`: the images will be mixed in pairs, by mixup or CutMix.
    `epochs` of the whole run, over which `options.train_size` grows.
    Images of `options.unlabelled` have the label UNLABELLED (-100). `log` gets one line for each choice made here, and
    for what is skipped in the folder. `gather(x)` gives the x of every process, so that all of them choose the same
    decoder. Raises UserError if the data cannot be used.
    """
    shard = Shard(seed, rank, world_size, dtype, options.views, paired, options.aug_repeats)
    if options.data in NAMES:
        train, val = _named_loaders(options, device, shard, log, gather)
    elif (parts := packed_parts(options.data)) is not None:
        train, val = _packed_loaders(parts, ("train", "val"), options, device, shard, log)
    else:
        splits = training_splits(options, log)
        train, val = _folder_loaders(splits, options, device, shard, log, gather)
        train.unlabelled = splits["train"].labels.count(UNLABELLED)
        train.fingerprint = train.fingerprint if train.name == "resident" else partial(of_split, splits["train"])
    if options.batch_size * world_size > train.samples:
        processes = f" in each of {world_size} processes" if world_size > 1 else ""
        log(
            f"WARNING: --batch-size {options.batch_size}{processes} is more than all training images, {train.samples}: "
            "an epoch is one step of them all; --lr is not scaled to it"
        )
    return sized_loader(train, options, epochs, log), val


def create_eval_loader(
    options: DataOptions,
    device: torch.device,
    *,
    rank: int = 0,
    world_size: int = 1,
    dtype: torch.dtype = torch.float32,
    log: Log = print,
    gather: Gather = lambda thing: [thing],
    keep_small: bool = True,
) -> Loader:
    """The evaluation loader alone, as from `create_loaders`, of a folder that may have no train/.

    Its classes are those of the images that are evaluated. Without val/ these are the images that `val_fraction` holds
    out, or all images of a folder of classes. `keep_small` False: small images, of a folder or packed, are resized and
    cropped as large ones are, for a network that was trained on such.
    """
    unlabelled = as_typed("unlabelled", options.unlabelled) if options.unlabelled else ""
    for option in (unlabelled, changes_augmentation(options), given_for_training(options)):
        if option:
            raise UserError(f"{option} is for training: images to evaluate have labels and are not augmented; drop it")
    shard = Shard(0, rank, world_size, dtype)
    if options.data in NAMES:
        return _named_loaders(options, device, shard, log, gather, parts=("val",))[-1]
    if (parts := packed_parts(options.data)) is not None:
        return _packed_loaders(parts, ("val",), options, device, shard, log, keep_small=keep_small)[0]
    split = evaluation_split(options, log)
    return _folder_loaders({"val": split}, options, device, shard, log, gather, keep_small=keep_small)[0]


def _named_loaders(
    options: DataOptions,
    device: torch.device,
    shard: Shard,
    log: Log,
    gather: Gather,
    parts: tuple[str, ...] = ("train", "val"),
) -> tuple[EpochLoader, ...]:
    """The loaders of a data set that has a name."""
    if options.data == "synthetic":
        from .synthetic import create_synthetic

        return create_synthetic(options.for_large_images(), device, shard)
    from .small_sets import SMALL_SETS, download, read_small_set, side_of, unusual_normalisation

    known, side = SMALL_SETS[options.data], side_of(options, options.data, log)
    if options.download:
        problem = download(options.data, options.data_dir, parts, log) if shard.rank == 0 else ""
        if problem := first_problem(gather(problem)):
            raise UserError(problem)
    if "train" in parts and (line := unusual_normalisation(options, known)):
        log(line)
    options = replace(options, image_size=side).sized(side, known.mean, known.std)
    sets = {}
    for part in parts:
        sets[part] = read_small_set(options, options.data, part == "train", log if part == parts[0] else _quiet)
    return tuple(_resident_loaders(sets, options, (known.pad_mode, known.flip), device, shard, log))


def _quiet(line: str) -> None:
    """Logs nothing: both parts of a set come from the same place."""


def _resident_loaders(
    sets: "dict[str, ResidentSet]",
    options: DataOptions,
    usual: "tuple[Padding, bool]",
    device: torch.device,
    shard: Shard,
    log: Log,
) -> list[EpochLoader]:
    """A loader for each set of images. `usual`: how they are padded, and whether they are mirrored, by default."""
    from .resident import Augmentation, ResidentLoader
    from .small_sets import augmentation_of, describe_augmentation

    augmentation, loaders = augmentation_of(options, options.image_size, *usual), list[EpochLoader]()
    for name, images in sets.items():
        is_train = name == "train"
        if is_train:
            log(describe_augmentation(augmentation, options.image_size))
        loaders.append(
            ResidentLoader(
                images,
                augmentation if is_train else Augmentation("none", 0, "zeros", False),
                options.batch_size,
                device,
                shard,
                train=is_train,
                mean=options.mean,
                std=options.std,
                image_size=options.image_size,
            )
        )
    return loaders


def _packed_loaders(
    parts: dict[str, PackedPart],
    names: tuple[str, ...],
    options: DataOptions,
    device: torch.device,
    shard: Shard,
    log: Log,
    *,
    keep_small: bool = True,
) -> list[EpochLoader]:
    """A loader for each part of `names` of a packed folder. Small squares are kept in memory."""
    from .packed import PackedLoader
    from .packed_set import check_packed, read_small_pack

    check_packed(options, parts, names)
    found = {name: parts[name] for name in names}
    about = ", ".join(f"{len(part.labels):,} images for {name}" for name, part in parts.items())
    side = next(iter(found.values())).side
    log(f"data: {shown(options.data)} holds packed images of {side} pixels: {about}")
    if keep_small and (small := read_small_pack(found, options)) is not None:
        sets, known = small
        usual, options = (known.pad_mode, known.flip), options.sized(side, known.mean, known.std)
        return _resident_loaders(sets, options, usual, device, shard, log)
    wanted = options.for_large_images().image_size
    if "train" in names and side < wanted:  # in evaluation the network says the size
        log(
            f"data: packed images of {side} pixels are enlarged to {wanted}: give --image-size {side}, or pack them "
            f"again with --size {wanted} or more"
        )
    return [PackedLoader(part, options, device, shard, train=name == "train") for name, part in found.items()]


def _folder_loaders(
    splits: dict[str, Split],
    options: DataOptions,
    device: torch.device,
    shard: Shard,
    log: Log,
    gather: Gather,
    *,
    keep_small: bool = True,
) -> list[EpochLoader]:
    """A loader for each split. The one called "train" is for training."""
    from .small_folder import read_small_folder

    sets = read_small_folder(splits, options, device, log, gather) if keep_small else None
    if sets is not None:
        side = next(iter(sets.values())).images.shape[1]
        size = sum(each.images.numel() for each in sets.values()) / 1e6
        log(f"data: the images of {side} pixels are kept in memory, {size:,.1f} MB (--loader folder resizes them)")
        usual: tuple[Padding, bool] = ("reflect", True)
        return _resident_loaders(sets, options.sized(side, IMAGENET_MEAN, IMAGENET_STD), usual, device, shard, log)
    options = options.for_large_images()
    loaders = None
    if options.loader == "auto" and (option := given(options, "dali")):
        log(f"data: decoding with torchvision ({option} is for --loader folder)")
    elif options.loader != "folder":
        loaders = dali_loaders(splits, options, device, shard, log, gather)
    if loaders is not None:
        return loaders
    from .folder import FolderLoader

    return [FolderLoader(split, options, device, shard, train=name == "train") for name, split in splits.items()]
