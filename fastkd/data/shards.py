"""Splits of images that lie in tar shards of WebDataset or in parquet files of Hugging Face's datasets."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import numpy as np

from ..errors import UserError, count_of
from .pack_format import check_sizes, read_manifest
from .scan import UNKNOWN, Formats, Split
from .shard_labels import classes_of, names_beside, positions
from .shard_names import shards_of
from .stored import Members, Places
from .tar_index import Index, index_of
from .walk import HOW, shown, some

Log = Callable[[str], None]
Part = tuple[list[str], list[int | str], Places, Formats]  # names of the images, their labels, places and kinds

AHEAD = 16  # tar files whose indices are in memory


def stored_splits(data: str, log: Log) -> dict[str, Split] | None:
    """{"train": ..., "val": ...}, as far as the names of the shards tell, else {"": ...}; None if there are no shards.

    All have the same classes. Logs one line of what was found. Raises UserError for damaged shards and for images
    without labels.
    """
    files = shards_of(data)
    if files is None:
        return None
    if (manifest := read_manifest(data)) is not None:
        check_sizes(data, manifest)
    first = next(iter(files.values()))[0]
    if first.endswith(".tar"):
        names, parts = names_beside(first), {name: _tar_part(shards, log) for name, shards in files.items()}
    else:
        from .parquet import parquet_names, parquet_part

        names, parts = parquet_names(first), {name: parquet_part(shards) for name, shards in files.items()}
    classes = classes_of((label for part in parts.values() for label in part[1]), names, shown(data))
    if {"train", "val"} <= parts.keys():
        train, val = ({*positions(parts[name][1], classes)} for name in ("train", "val"))
        _compare_classes(data, train, val, classes, names, log)
    splits = {
        name: Split(classes, images, positions(labels, classes), formats, (), places)
        for name, (images, labels, places, formats) in parts.items()
    }
    counts = [
        f"{count_of(len(split.files), 'image')} in {count_of(len(files[name]), 'file')}{_of(name)}"
        for name, split in splits.items()
    ]
    kind = os.path.splitext(first)[1]
    log(f"data: {shown(data)} holds shards ({kind}): {', '.join(counts)}; {len(classes):,} classes")
    return splits


def refuse_unknown(splits: dict[str, Split]) -> None:
    """Raise UserError if an image does not begin like one."""
    for split in splits.values():
        count, example = split.formats.get(UNKNOWN, (0, ""))
        if count:
            more = f", and {count - 1:,} more are none either" if count > 1 else ""
            raise UserError(f"{shown(example)} is no picture, by its first bytes{more}: leave it out{HOW}")


def _compare_classes(
    data: str, train: set[int], val: set[int], classes: Sequence[str], names: Sequence[str], log: Log
) -> None:
    """Say which labels only one part has. Without a list of names, a label that only val has is an error.

    Numbers have such a list in effect: a label of few images may lack in some of the shards.
    """
    only_train, only_val = ([classes[label] for label in sorted(each)] for each in (train - val, val - train))
    if only_val and not names and not all(name.isdigit() for name in classes):
        raise UserError(
            f"the shards of {shown(data)} for train and val have different labels (only in val: {some(only_val)}; only "
            f"in train: {some(only_train) or 'none'}): correct them, or list all classes in a classes.txt beside"
        )
    if only_val:
        log(
            f"data: no training image has the label of {len(only_val):,} of the {len(val):,} classes that are "
            f"evaluated ({some(only_val)})"
        )
    if only_train:
        log(
            f"data: the shards for val have {len(val):,} of the {len(classes):,} classes (they lack {some(only_train)})"
        )


def _of(part: str) -> str:
    return f" for {part}" if part else ""


def _tar_part(shards: list[str], log: Log) -> Part:
    """The images of tar files, in the order of the files and of the members."""
    names, labels, formats = list[str](), list[int | str | None](), Formats()
    places, skipped, made = [np.zeros((0, 3), np.int64)], dict[str, int](), 0
    for number, (index, is_new) in enumerate(_indices(shards)):
        rows, made = index["images"], made + is_new
        for name, _, _, kind, label in rows:
            names.append(f"{shards[number]}/{name}")
            labels.append(label)
            count, example = formats.get(kind, (0, names[-1]))
            formats[kind] = count + 1, example
        places.append(np.array([(number, *row[1:3]) for row in rows], dtype=np.int64).reshape(-1, 3))
        for ending, count in index["skipped"].items():
            skipped[ending] = skipped.get(ending, 0) + count
    if made:
        log(f"data: indexed {made:,} of {len(shards):,} tar files")
    if not names:
        raise UserError(f"{some(shards)}: no images in {len(shards):,} tar files")
    if skipped:
        counts = [f"{count:,} .{ending}" for ending, count in sorted(skipped.items())]
        log(f"data: not read in the tar files: {some(counts, quote=False)}")
    return names, _all_labels(names, labels), Members(shards, *np.concatenate(places).T.copy()), formats


def _indices(shards: list[str]) -> Iterator[tuple[Index, bool]]:
    """What index_of gives for each shard, few at a time: those of 1.28 million images would take 0.6 GB."""
    with ThreadPoolExecutor(4) as pool:  # they wait for the disk
        for first in range(0, len(shards), AHEAD):
            yield from pool.map(index_of, shards[first : first + AHEAD])


def _all_labels(names: list[str], labels: list[int | str | None]) -> list[int | str]:
    """The labels. Raises UserError for images without one."""
    bare = [name for name, label in zip(names, labels, strict=True) if label is None]
    if bare:
        raise UserError(
            f"{count_of(len(bare), 'image')} in tar files without a label, such as {shown(bare[0])}: a label is "
            'a member of the same name ending in .cls (a number or a text) or .json (with "label")'
        )
    return cast(list[int | str], labels)
