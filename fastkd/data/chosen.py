"""The images of a folder or of shards that the options take: those of a list, those that can be read."""

import os
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import UserError
from .check import check_images
from .file_list import read_list
from .scan import Split, check_headers, scan
from .shards import refuse_unknown, stored_splits
from .stored import Pictures
from .walk import shown, some

if TYPE_CHECKING:
    from .options import DataOptions

Log = Callable[[str], None]


def scan_chosen(root: str, options: "DataOptions", log: Log) -> Split:
    """The images of a folder of classes that the options take."""
    wanted = read_list(options.file_list, options.data) if options.file_list else None
    split = scan(root, wanted, check=not options.skip_bad)
    for note in split.notes:
        log(note)
    if wanted is not None:
        prefix = os.path.join(root, "")
        lost = {file for file in wanted if file.startswith(prefix)} - {*split.files}
        _refuse_lost(lost, options.file_list)
    if options.skip_bad:
        split = _without_bad(split, root, options, log)
        split = replace(split, formats=check_headers(split.files))
    return split


def stored_chosen(options: "DataOptions", log: Log) -> dict[str, Split] | None:
    """The images of shards that the options take; None if the data are none."""
    splits = stored_splits(options.data, log)
    if splits is None:
        return None
    if not (options.file_list or options.skip_bad):
        refuse_unknown(splits)
    if options.file_list:
        wanted = read_list(options.file_list, options.data)
        _refuse_lost(wanted - {file for split in splits.values() for file in split.files}, options.file_list)
        for name, split in splits.items():
            splits[name] = split.take([i for i, file in enumerate(split.files) if file in wanted])
    if options.skip_bad:
        splits = {name: _without_bad(split, name or options.data, options, log) for name, split in splits.items()}
    if empty := [name for name, split in splits.items() if not split.files]:
        raise UserError(f"--data {options.data!r}: no image is left for {empty[0] or 'training'}")
    return splits


def _refuse_lost(lost: set[str] | frozenset[str], path: str) -> None:
    if lost:
        raise UserError(
            f"--file-list {path!r} names images that are not there ({len(lost):,}: {some(sorted(lost))}): make it anew "
            "with `fastkd check-data --file-list`"
        )


def _without_bad(split: Split, where: str, options: "DataOptions", log: Log) -> Split:
    """The images that can be read. Raises UserError if a class loses all of its images."""
    side = options.resize_side  # of the evaluation, which enlarges most
    found, _ = check_images(Pictures(split.files, split.places, options.max_pixels), options.workers, side)
    bad = {each.image: f"{shown(split.files[each.image])}: {each.kind}" for each in found if each.is_bad}
    if not bad:
        return split
    log(
        f"WARNING: --skip-bad leaves out {len(bad):,} of the {len(split.files):,} images of {shown(where)}: "
        f"{some(bad.values(), quote=False)}; `fastkd check-data` lists them"
    )
    good = split.take([i for i in range(len(split.files)) if i not in bad])
    if lost := [split.classes[label] for label in sorted({*split.labels} - {*good.labels})]:
        raise UserError(f"--skip-bad: no image of {some(lost)} can be read: repair them, or remove the classes")
    return good
