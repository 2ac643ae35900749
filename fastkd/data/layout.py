"""Which images of a folder, or of shards, are for training and which for evaluation.

A folder holds train/<class>/* and val/<class>/*. With `val_fraction` it holds train/<class>/* alone, or <class>/*, and
a part of each class is held out.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from hashlib import blake2b
from typing import TYPE_CHECKING

from ..errors import UserError, count_of, nearest, no_folder
from ..kernels.logit_loss import UNLABELLED
from .chosen import scan_chosen, stored_chosen
from .options import NAMES
from .pack_format import read_manifest
from .parquet import advise
from .scan import Formats, Split, scan_images
from .shard_names import shards_of
from .stored import Joined, OwnFiles
from .walk import Found, identity, look, shown, some

if TYPE_CHECKING:
    from .options import DataOptions

Log = Callable[[str], None]
ARRANGE = "arrange the images as train/<class>/* and val/<class>/*"


def training_splits(options: "DataOptions", log: Log) -> dict[str, Split]:
    """{"train": ..., "val": ...}. Raises UserError if a file or the arrangement is unusable. `log` gets the notes."""
    stored = stored_chosen(options, log)
    advise((split.places for split in (stored or {}).values()), log)
    train, val = _folder_pair(options, log) if stored is None else _stored_pair(stored, options, log)
    if options.unlabelled:
        more = _unlabelled(train, options, log)
        _warn_if_shared(more, val, log)
        train = _joined(train, more)
    return {"train": train, "val": val}


def _folder_pair(options: "DataOptions", log: Log) -> tuple[Split, Split]:
    """(the images to train on, those to evaluate) of a folder."""
    root, parts = options.data, parts_of(options.data)
    if options.val_fraction:
        refuse_second_val(root, parts)
        tree = os.path.join(root, "train") if "train" in parts else root
        whole = scan_chosen(tree, options, log)
        _refuse_one_class(tree, whole)
        return _hold_out(whole, tree, options, log)
    if options.unlabelled and parts == ["val"]:
        val = scan_chosen(os.path.join(root, "val"), options, log)
        log(f"data: {shown(root)} has no train/: all training images are unlabelled")
        return Split(val.classes, [], []), val
    _refuse_missing(root, parts)
    train, val = (scan_chosen(os.path.join(root, name), options, log) for name in ("train", "val"))
    _refuse_one_class(os.path.join(root, "train"), train)
    val = _with_labels_of(train, val, root, log)
    _warn_if_shared(train, val, log)
    return train, val


def _stored_pair(stored: dict[str, Split], options: "DataOptions", log: Log) -> tuple[Split, Split]:
    """(the images to train on, those to evaluate) of shards."""
    root, whole = options.data, stored.get("train", stored.get(""))
    for name, split in stored.items():
        if len(split.classes) < 2:
            raise UserError(
                f"--data {root!r}: all images have one label ({split.classes[0]!r}), in the shards for {name}"
            )
    if options.val_fraction:
        refuse_second_val(root, list(stored))
        assert whole is not None  # there is a part, and it is not "val"
        return _hold_out(whole, _common_folder(whole), options, log)
    if options.unlabelled and list(stored) == ["val"]:
        log(f"data: {shown(root)} has no shards for train: all training images are unlabelled")
        return Split(stored["val"].classes, [], []), stored["val"]
    if missing := [name for name in ("train", "val") if name not in stored]:
        remedy = ", or add --val-fraction 0.1" if missing[-1] == "val" else ""
        raise UserError(
            f"--data {root!r} has no shards for {' and '.join(missing)}: let their names hold the word train or val, "
            f"as in '{{train,val}}-{{000..099}}.tar', or put them into folders of these names{remedy}"
        )
    return stored["train"], stored["val"]


def _common_folder(split: Split) -> str:
    """What all names of a split begin with: names below it do not depend on the place of the shards."""
    return os.path.commonpath([min(split.files), max(split.files)])


def evaluation_split(options: "DataOptions", log: Log) -> Split:
    """The images to evaluate: those of val/, or those that `val_fraction` holds out, or all of a class tree."""
    root, stored = options.data, stored_chosen(options, log)
    parts = parts_of(root) if stored is None else list(stored)
    if options.val_fraction and stored is not None:
        return _stored_pair(stored, options, log)[1]
    if options.val_fraction:
        refuse_second_val(root, parts)
        tree = os.path.join(root, "train") if "train" in parts else root
        return _hold_out(scan_chosen(tree, options, log), tree, options, log)[1]
    if stored is not None and parts != ["train"]:
        return stored.get("val", stored.get("", stored[parts[0]]))
    if "val" in parts:
        return scan_chosen(os.path.join(root, "val"), options, log)
    if "train" in parts:
        inner = "the shards alone" if stored is not None else os.path.join(root, "train")
        raise UserError(
            f"--data {root!r} has no val/ inside: give --data {inner} to evaluate the training "
            "images, or --val-fraction and --split-seed as in training to evaluate what was held out"
        )
    log(f"data: {shown(root)} has no val/: its folders are taken as the classes")
    return scan_chosen(root, options, log)


def parts_of(root: str) -> list[str]:
    """Which of train/ and val/ are in `root`. A folder of images beside other classes is itself a class."""
    if (manifest := read_manifest(root)) is not None:
        return list(manifest["parts"])
    if (shards := shards_of(root)) is not None:
        return list(shards)
    if not os.path.isdir(root):
        raise UserError(
            f"--data {root!r}: {no_folder(root)}; give one with train/<class>/* and val/<class>/*, shards, or one of "
            f"{', '.join(NAMES)}{nearest(root, NAMES)}"
        )
    folders = _folders_in(root)
    parts: list[str] = [name for name in ("train", "val") if name in folders]
    others = len(folders) > len(parts)
    are_classes = others and all(_holds_images_alone(os.path.join(root, name)) for name in parts)
    return [] if are_classes else list(parts)


def is_there(data: str) -> bool:
    """True for a folder, and for shards that all exist."""
    try:
        return os.path.isdir(data) or shards_of(data) is not None
    except UserError:
        return False


def refuse_second_val(root: str, parts: list[str]) -> None:
    """Raise UserError if there is a val/, so that none has to be made."""
    if "val" in parts:
        raise UserError(f"--val-fraction: {root!r} has a val/ already; drop --val-fraction, or give another --data")


def _refuse_missing(root: str, parts: list[str]) -> None:
    """Raise UserError, with the likely remedy, unless there are train/ and val/."""
    if len(parts) == 2:
        return
    folders, missing = _folders_in(root), [name for name in ("train", "val") if name not in parts]
    holds = sorted(os.listdir(root))
    raise UserError(
        f"--data {root!r} has no {' and no '.join(name + '/' for name in missing)} inside "
        f"(it holds {some(holds) or 'nothing'}): {_remedy(root, folders, parts)}"
    )


def _remedy(root: str, folders: list[str], parts: list[str]) -> str:
    deeper = [name for name in folders if {"train", "val"} <= {*_folders_in(os.path.join(root, name))}]
    if deeper:
        return f"give --data {shown(os.path.join(root, deeper[0]))}"
    if parts == ["train"]:
        renamed = [name for name in folders if name.lower() in ("valid", "validation", "test", "eval", "dev")]
        if renamed:
            return f"rename {shown(renamed[0])}/ to val/, or add --val-fraction 0.1 to hold out a part of train/"
        return f"add --val-fraction 0.1 to hold out a part of train/, or {ARRANGE}"
    if not parts and folders:
        return f"if these are the classes, add --val-fraction 0.1 to hold out a part of each; else {ARRANGE}"
    return ARRANGE


def _refuse_one_class(root: str, split: Split) -> None:
    """Raise UserError if there is nothing to tell apart."""
    if len(split.classes) > 1:
        return
    name = split.classes[0]
    inside = _folders_in(os.path.join(root, name))
    if inside:
        reason = (
            f"it holds the folders {some(inside)}, so there may be a level too many: move them one level up, "
            f"into {root!r}"
        )
    else:
        reason = "all images lie in it: put the images of each class into a folder of their own"
    raise UserError(f"{root!r} holds one class alone, {name!r}, and a classifier needs two or more; {reason}")


def _with_labels_of(train: Split, val: Split, root: str, log: Log) -> Split:
    """`val` with the classes of `train`, of which it may hold a part."""
    only_train, only_val = sorted({*train.classes} - {*val.classes}), sorted({*val.classes} - {*train.classes})
    if only_val:
        raise UserError(
            f"train/ and val/ of {root!r} hold different classes (only in train: {some(only_train) or 'none'}; "
            f"only in val: {some(only_val)}): make the class folders the same; val/ may lack some"
        )
    if only_train:
        log(
            f"data: val/ has {len(val.classes):,} of the {len(train.classes):,} classes of train/ "
            f"(it lacks {some(only_train)})"
        )
    places = {name: label for label, name in enumerate(train.classes)}
    return replace(val, classes=train.classes, labels=[places[val.classes[label]] for label in val.labels])


def _hold_out(whole: Split, tree: str, options: "DataOptions", log: Log) -> tuple[Split, Split]:
    """(the images to train on, those held out): `val_fraction` of each class, at least one image on either side.

    A hash of the seed and of its path below `tree` decides whether an image is held out. So neither the order on the
    disk nor the place of the folder matters. About 3 us an image.
    """
    by_class: list[list[int]] = [[] for _ in whole.classes]
    for i, label in enumerate(whole.labels):
        by_class[label].append(i)
    small = [shown(name) for name, members in zip(whole.classes, by_class, strict=True) if len(members) < 2]
    if small:
        raise UserError(
            f"--val-fraction {options.val_fraction}: {len(small)} of the {len(by_class)} classes of {tree!r} have one "
            f"image ({some(small, quote=False)}), and each side of the split needs one: add images, or remove the class"
        )
    held, start = set[int](), len(os.path.join(tree, ""))
    for members in by_class:
        count = min(max(1, round(options.val_fraction * len(members))), len(members) - 1)
        order = sorted(members, key=lambda i: _rank(options.split_seed, whole.files[i][start:]))
        held.update(order[:count])
    sides = [[i for i in range(len(whole.files)) if (i in held) == held_out] for held_out in (False, True)]
    log(
        f"data: {len(held):,} of the {len(whole.files):,} images of {shown(tree)} are held out for evaluation "
        f"(--val-fraction {options.val_fraction} --split-seed {options.split_seed})"
    )
    train, val = (whole.take(side) for side in sides)
    return replace(train, formats={}), val  # each file counts once


def _rank(seed: int, path: str) -> bytes:
    return blake2b(os.fsencode(path), digest_size=8, key=str(seed).encode()).digest()


def _warn_if_shared(train: Split, val: Split, log: Log) -> None:
    """Log a warning if training images lie in a folder of evaluation images, for example through a link."""
    if train.places is not None or val.places is not None:
        return  # each shard is of one part
    trained = {identity(folder) for folder in {file.rpartition("/")[0] for file in train.files}}
    shared = [
        folder for folder in sorted({file.rpartition("/")[0] for file in val.files}) if identity(folder) in trained
    ]
    if shared:
        log(f"WARNING: images to evaluate are trained on too, so that the accuracy says little: {some(shared)}")


def _unlabelled(train: Split, options: "DataOptions", log: Log) -> Split:
    """The images of `unlabelled`, with the label UNLABELLED."""
    more = scan_images(options.unlabelled)
    for note in more.notes:
        log(note)
    log(
        f"data: {count_of(len(more.files), 'image')} of {shown(options.unlabelled)} without labels, beside "
        f"{len(train.files):,} with labels"
    )
    return replace(more, classes=train.classes, labels=[UNLABELLED] * len(more.files))


def _joined(train: Split, more: Split) -> Split:
    """The images of both, in this order."""
    formats: Formats = dict(train.formats)
    for kind, (count, file) in more.formats.items():
        before, first = formats.get(kind, (0, file))
        formats[kind] = before + count, first
    places = None
    if train.places is not None or more.places is not None:
        parts = train.places or OwnFiles(train.files), more.places or OwnFiles(more.files)
        places = Joined(parts, (len(train.files), len(more.files)))
    return Split(train.classes, train.files + more.files, train.labels + more.labels, formats, (), places)


def _folders_in(root: str) -> list[str]:
    return look(root, Found())[1]


def _holds_images_alone(root: str) -> bool:
    files, folders = look(root, Found())
    return bool(files) and not folders
