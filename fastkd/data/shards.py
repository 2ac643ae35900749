"""Splits of images that lie in tar shards of WebDataset or in parquet files of Hugging Face's datasets."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ..errors import UserError
from .pack_format import check_sizes, read_manifest
from .scan import Formats, Split
from .shard_labels import classes_of, names_beside, positions
from .shard_names import shards_of
from .stored import Members, Places
from .tar_index import Index, index_of
from .walk import shown, some

Log = Callable[[str], None]
Part = tuple[list[str], list[int | str], Places, Formats]  # names of the images, their labels, places and kinds


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
    counts = [f"{len(splits[name].files):,} images in {len(files[name]):,} files{_of(name)}" for name in splits]
    kind = os.path.splitext(first)[1]
    log(f"data: {shown(data)} holds shards ({kind}): {', '.join(counts)}; {len(classes):,} classes")
    return splits


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
    with ThreadPoolExecutor(4) as pool:  # they wait for the disk
        found = list(pool.map(index_of, shards))
    indices = [index for index, _ in found]
    if made := sum(new for _, new in found):
        log(f"data: indexed {made:,} of {len(shards):,} tar files")
    _refuse_unlabelled(shards, indices)
    rows = [(number, *row) for number, index in enumerate(indices) for row in index["images"]]
    if not rows:
        raise UserError(f"{some(shards)}: no images in {len(shards):,} tar files")
    if skipped := _skipped(indices):
        log(f"data: not read in the tar files: {skipped}")
    names = [f"{shards[number]}/{name}" for number, name, *_ in rows]
    columns = (np.array([row[at] for row in rows], dtype=np.int64) for at in (0, 2, 3))
    formats: Formats = {}
    for name, row in zip(names, rows, strict=True):
        count, example = formats.get(row[4], (0, name))
        formats[row[4]] = count + 1, example
    return names, [row[5] for row in rows], Members(shards, *columns), formats


def _refuse_unlabelled(shards: list[str], indices: list[Index]) -> None:
    bare = [
        (shard, row[0])
        for shard, index in zip(shards, indices, strict=True)
        for row in index["images"]
        if row[4] is None
    ]
    if bare:
        shard, name = bare[0]
        raise UserError(
            f"{len(bare):,} images in tar files have no label, such as {shown(name)} in {shown(shard)}: a label is a "
            'member of the same name ending in .cls (a number or a text) or .json (with "label")'
        )


def _skipped(indices: list[Index]) -> str:
    totals: dict[str, int] = {}
    for index in indices:
        for ending, count in index["skipped"].items():
            totals[ending] = totals.get(ending, 0) + count
    return some([f"{count:,} .{ending}" for ending, count in sorted(totals.items())], quote=False)
