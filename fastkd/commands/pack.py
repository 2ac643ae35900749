"""`fastkd pack SRC DST`: images once decoded, or made smaller, in shards."""

import os
import shlex
import time
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..data.decode import MAX_PIXELS
from ..data.options import NAMES, WITH_FILES, DataOptions, default_workers
from ..data.pack import Packing, pack
from ..data.pack_format import check_content, read_manifest, refuse_unfinished
from ..data.pack_source import Kind, check_place, read_source
from ..errors import UserError, count_of, no_folder
from ..parser import run_parser
from ..report import log_rank0
from ..signals import names_the_command

USAGE = """\
usage: fastkd pack SRC DST [OPTIONS]
       fastkd pack DST --check

SRC is all that --data takes: a folder, tar shards, parquet files, a data set by name. DST is for --data then.
"""
SIZE = 256  # pixels
EVERY = 60.0  # seconds between the lines that stand for the bar where there is no terminal


@dataclass(frozen=True)
class PackOptions:
    """Write images in the form that is read fastest: decoded, as squares of uint8.

    A square holds the whole picture, resized; crops are drawn as for the picture itself. An image takes 3 x SIZE x
    SIZE bytes: 1.28 million of 256 pixels take 252 GB. A command that was stopped goes on where it was.
    """

    size: int = 0
    """Side of the squares in pixels; with --jpeg-quality the longest that the shorter side may be. 0: 256, and for
    a data set by name that of its images."""
    jpeg_quality: int = 0
    """1 to 100: JPEGs of this quality in tar shards, instead of pixels. 0: pixels."""
    keep_files: bool = False
    """Copy the image files as they are into tar shards: for many small files, and for parquet files."""
    exif: bool = False
    """Turn photos as their EXIF orientation says."""
    file_list: str = ""
    """Pack these images of the folder or the shards alone: a list that `fastkd check-data --file-list` has written."""
    skip_bad: bool = False
    """Check all images first, and leave out those that cannot be read. A list made once is faster."""
    max_pixels: int = MAX_PIXELS
    """Images that claim more pixels than this are refused before they take memory."""
    val_fraction: float = 0.0
    """Hold out this fraction of each class for evaluation, if SRC has no val/."""
    split_seed: int = 0
    """Chooses the images that val_fraction holds out."""
    data_dir: str = ""
    """The folder that holds the files of cifar10, cifar100, fashion-mnist or mnist."""
    workers: int = field(default_factory=default_workers)
    """Processes, each of which writes a shard."""
    check: bool = False
    """Compare all files of a packed folder with their checksums."""

    def __post_init__(self) -> None:
        if self.size != 0 and not 8 <= self.size <= 4096:
            raise UserError(f"--size {self.size}: give 8 to 4096 pixels, or 0")
        if not 0 <= self.jpeg_quality <= 100:
            raise UserError(f"--jpeg-quality {self.jpeg_quality}: give 1 to 100, or 0 for pixels")
        if self.workers < 0:
            raise UserError(f"--workers {self.workers}: give at least 0")
        if self.keep_files and (self.jpeg_quality or self.size or self.exif):
            raise UserError("--keep-files copies files as they are: drop --size, --jpeg-quality and --exif")


def run(arguments: list[str]) -> None:
    """The command."""
    words = _leading(arguments)
    is_help = "--help" in arguments or "-h" in arguments
    if is_help:
        print(USAGE)
    kind = make_dataclass("Pack", [("pack", PackOptions)], frozen=True)
    options: PackOptions = run_parser(kind, arguments[len(words) :], "fastkd pack SRC DST").pack
    if options.check:
        _check(words)
        return
    if len(words) != 2:
        raise UserError(f"pack needs SRC and DST, and got {shlex.join(words) or 'neither'}; see `fastkd pack --help`")
    with names_the_command(shlex.join(["fastkd", "pack", *arguments])):
        _pack(words[0], words[1], options)


def _leading(arguments: list[str]) -> list[str]:
    """The words before the first flag."""
    first = next((i for i, word in enumerate(arguments) if word.startswith("-")), len(arguments))
    return arguments[:first]


def _pack(source: str, destination: str, options: PackOptions) -> None:
    packing = _packing(source, options)
    data = DataOptions(
        data=source,
        data_dir=options.data_dir,
        val_fraction=options.val_fraction,
        split_seed=options.split_seed,
        file_list=options.file_list,
        skip_bad=options.skip_bad,
        exif=options.exif,
        max_pixels=options.max_pixels,
        workers=options.workers,
    )
    classes, parts = read_source(data, log_rank0)
    check_place(destination, source, parts)
    counts = ", ".join(f"{count_of(len(part.labels), 'image')} for {name}" for name, part in parts.items())
    log_rank0(f"pack: {counts}, {len(classes):,} classes, as {_described(packing)}")
    start = time.monotonic()
    with _progress() as bar:
        task = bar.add_task("pack", total=sum(len(part.labels) for part in parts.values()), rate="", logged=start)
        pack(destination, packing, classes, parts, options.workers, lambda new, old: _advance(bar, task, new, old))
    seconds = time.monotonic() - start
    size = sum(file.stat().st_size for file in Path(destination).iterdir())
    log_rank0(
        f"pack: {destination} holds {size / 1e6:,.1f} MB, after {seconds:,.0f} s; train with "
        f"--data {shlex.quote(destination)}"
    )


def _packing(source: str, options: PackOptions) -> Packing:
    known = source if source in NAMES else ""
    kind: Kind = "files" if options.keep_files else "jpeg" if options.jpeg_quality else "pixels"
    if known and kind != "pixels":
        raise UserError(f"{known!r} is no set of files: pack it as pixels, without --jpeg-quality and --keep-files")
    side = 0 if kind == "files" else options.size or (_own_side(known) if known else SIZE)
    return Packing(kind, side, options.jpeg_quality, options.exif, known)


def _own_side(name: str) -> int:
    from ..data.small_sets import SMALL_SETS

    if name not in (*WITH_FILES, "digits"):
        raise UserError(f"{name!r} holds no images: nothing to pack")
    return SMALL_SETS[name].sides[0]


def _described(packing: Packing) -> str:
    if packing.kind == "pixels":
        return f"squares of {packing.size} pixels"
    return f"JPEGs of {packing.size} pixels, quality {packing.quality}" if packing.kind == "jpeg" else "files"


def _progress() -> Progress:
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _advance(bar: Progress, task: Any, new: int, old: int) -> None:
    """Show `new` images packed now; `old` ones were packed by an earlier command and count for no rate."""
    if old:
        log_rank0(f"pack: {count_of(old, 'image')} packed before; going on from there")
        bar.update(task, total=(bar.tasks[0].total or 0) - old)
    bar.advance(task, new)
    speed = bar.tasks[0].speed
    bar.update(task, rate=f"{speed:,.0f} images/s" if speed else "")
    if bar.disable and time.monotonic() - bar.tasks[0].fields["logged"] > EVERY:
        log_rank0(f"pack: {bar.tasks[0].completed:,.0f} of {bar.tasks[0].total:,.0f} images")
        bar.update(task, logged=time.monotonic())


def _check(words: list[str]) -> None:
    """`fastkd pack DST --check`."""
    if len(words) != 1:
        raise UserError("pack --check needs one folder: fastkd pack DST --check")
    refuse_unfinished(words[0])
    manifest = read_manifest(words[0])
    if manifest is None:
        reason = "there is no manifest.json of fastkd in it" if os.path.isdir(words[0]) else no_folder(words[0])
        raise UserError(f"{words[0]!r} holds no complete pack: {reason}")
    check_content(words[0], manifest)
    images = sum(part["images"] for part in manifest["parts"].values())
    log_rank0(f"pack: {words[0]} is sound: {count_of(images, 'image')}, all checksums fit")
