"""`fastkd check-data DIR`: which images cannot be read, which are odd, which are there twice."""

import csv
import io
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, make_dataclass
from itertools import groupby
from pathlib import Path

from ..data.check import BAD, NOTES, Finding, check_images, duplicates
from ..data.file_list import list_of
from ..data.options import NAMES, default_workers
from ..data.pack_format import read_manifest
from ..data.shards import stored_splits
from ..data.stored import Joined, OwnFiles, Pictures, Places
from ..data.walk import EXTENSIONS, Found, files_below, shown
from ..errors import UserError, count_of, no_folder
from ..files import write_atomic
from ..parser import run_parser
from ..report import log_rank0, show_table

USAGE = """\
usage: fastkd check-data DIR [OPTIONS]

DIR is a folder of images at any depth, tar shards or parquet files. Nothing in it is changed.
"""
SHOWN = 20  # bad images that are named; --csv has all


@dataclass(frozen=True)
class CheckOptions:
    """Read every image once, in parallel, and show what is bad or odd. The exit status is 1 if an image is bad.

    Train on the others by `fastkd train --data DIR --file-list FILE`.
    """

    file_list: str = ""
    """Write the names of the images that can be read to this file, for --file-list of `fastkd train` and `pack`."""
    drop_duplicates: bool = False
    """Leave images out of the list whose bytes an earlier image of it has."""
    csv: str = ""
    """Write all that was found to this file: image, kind, detail."""
    workers: int = field(default_factory=default_workers)
    """Processes that read images; 0: this one alone."""

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise UserError(f"--workers {self.workers}: give at least 0")
        if self.drop_duplicates and not self.file_list:
            raise UserError("--drop-duplicates changes the list alone: give --file-list FILE")
        for name in ("file_list", "csv"):
            path = getattr(self, name)
            if path and os.path.lexists(path):
                raise UserError(f"--{name.replace('_', '-')} {path!r} is there already: name a new file")
            if path and not Path(path).absolute().parent.is_dir():
                raise UserError(f"--{name.replace('_', '-')} {path!r}: its folder does not exist")


@dataclass(frozen=True)
class Images:
    """The images to check; labels and parts (train, val or empty) tell which copies matter."""

    files: list[str]
    labels: Sequence[object]
    parts: list[str]
    places: Places | None = None


def run(arguments: list[str]) -> None:
    """The command."""
    words = [word for word in arguments[:1] if not word.startswith("-")]
    if "--help" in arguments or "-h" in arguments:
        print(USAGE)
    kind = make_dataclass("Check", [("check", CheckOptions)], frozen=True)
    options: CheckOptions = run_parser(kind, arguments[len(words) :], "fastkd check-data DIR").check
    if len(words) != 1:
        raise UserError("check-data needs a folder first: fastkd check-data DIR [OPTIONS]")
    if _check(words[0], options):
        sys.exit(1)


def _check(data: str, options: CheckOptions) -> int:
    """Show and write what is found; gives the number of bad images."""
    found = Found()
    images = _images(data, found)
    findings, hashes = check_images(Pictures(images.files, images.places), options.workers)
    findings += duplicates(hashes, images.files, images.labels, images.parts)
    wrong = [(path, Finding(-1, "unreadable", problem)) for path, problem in found.wrong]
    every = wrong + [(images.files[each.image], each) for each in sorted(findings, key=lambda each: each.image)]
    _show(every, len(images.files), data)
    if options.csv:
        _write_csv(options.csv, every)
    if options.file_list:
        _write_list(options, data, images, findings)
    return len({path for path, each in every if each.is_bad})


def _images(data: str, found: Found) -> Images:
    if data in NAMES:
        raise UserError(f"{data!r} is a data set with files of its own kind: check-data reads folders and shards")
    if (manifest := read_manifest(data)) is not None and manifest["kind"] == "pixels":
        raise UserError(f"{shown(data)} holds packed pixels: check them by `fastkd pack {shlex.quote(data)} --check`")
    splits = stored_splits(data, log_rank0)
    if splits is None:
        return _of_folder(data, found)
    parts = [name for name, split in splits.items() for _ in split.files]
    places = [split.places for split in splits.values() if split.places is not None]
    joined = Joined(places, [len(split.files) for split in splits.values()])
    files = [file for split in splits.values() for file in split.files]
    return Images(files, [label for split in splits.values() for label in split.labels], parts, joined)


def _of_folder(root: str, found: Found) -> Images:
    if not os.path.isdir(root):
        raise UserError(f"{root!r}: {no_folder(root)}; give one with images at any depth, or shards")
    files = files_below(root, found)
    for note in found.notes(root):
        log_rank0(note)
    if not files and not found.wrong:
        raise UserError(f"{root!r} holds no images: add files ending in {' '.join(EXTENSIONS)}")
    labels, parts = [], []
    for file in files:
        part, _, rest = os.path.relpath(file, root).partition(os.sep)
        parts.append(part if part in ("train", "val") else "")
        labels.append((rest if parts[-1] else f"{part}{os.sep}{rest}").rpartition(os.sep)[0].partition(os.sep)[0])
    return Images(files, labels, parts, OwnFiles(files))


def _show(every: list[tuple[str, Finding]], count: int, data: str) -> None:
    by_kind = {kind: list(group) for kind, group in groupby(sorted(every, key=_order), key=lambda each: each[1].kind)}
    rows = []
    for kind, words in (BAD | NOTES).items():
        if group := by_kind.get(kind):
            verdict = "bad" if kind in BAD else "note"
            rows.append([kind, verdict, words, shown(os.path.relpath(group[0][0], data)), f"{len(group):,}"])
    if rows:
        show_table(["found", "", "what it means", "such as", "images"], rows, numbers=1, whole=2)
    bad = [(path, each) for path, each in every if each.is_bad]
    for path, each in bad[:SHOWN]:
        log_rank0(f"{shown(path)}: {each.kind}{f', {each.detail}' if each.detail else ''}")
    if bad[SHOWN:]:
        log_rank0(f"... and {len(bad) - SHOWN:,} more bad images; --csv FILE lists all")
    log_rank0(f"check-data: {count_of(count, 'image')} read, {len(bad):,} of them bad")


def _order(each: tuple[str, Finding]) -> tuple[str, str]:
    return each[1].kind, each[0]


def _write_csv(path: str, every: list[tuple[str, Finding]]) -> None:
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["image", "kind", "bad", "detail"])
    for name, each in every:
        writer.writerow([shown(name), each.kind, int(each.is_bad), each.detail])
    write_atomic(Path(path), table.getvalue())


def _write_list(options: CheckOptions, data: str, images: Images, findings: list[Finding]) -> None:
    copies = ("duplicate", "other label", "train and val") if options.drop_duplicates else ()
    left_out = {each.image for each in findings if each.is_bad or each.kind in copies}
    good = [file for i, file in enumerate(images.files) if i not in left_out]
    write_atomic(Path(options.file_list), list_of(good, data))
    command = f"fastkd train --data {shlex.quote(data)} --file-list {shlex.quote(options.file_list)}"
    log_rank0(f"check-data: {options.file_list} names {count_of(len(good), 'image')}; train on them by `{command}`")
