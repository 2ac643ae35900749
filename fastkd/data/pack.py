"""`fastkd pack`: write images once in the form that is read fastest.

Worker processes write one shard each. A shard gets its name when it is complete and on the disk, so whatever stops the
work leaves complete shards alone; the same command goes on after them and ends with the same bytes. Until the end the
folder DST/.pack holds the plan, the unfinished shards, and a note for each finished one.
"""

import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ..errors import UserError
from .decode import begin_worker
from .pack_format import (
    FORMAT,
    HEADER,
    MANIFEST,
    VERSION,
    WORK,
    Manifest,
    checksum,
    read_manifest,
    whole_shards,
    write_atomic,
    wrong_sizes,
)
from .pack_shard import index_of, write_shard
from .pack_source import Kind, Part, smaller_jpeg
from .shard_labels import FILES
from .walk import shown

PIXEL_BYTES = 256 << 20  # of a shard of pixels
TAR_IMAGES = 1000  # of a tar shard
LOOKED_AT = 32  # images that are encoded to estimate the size of all
INDEXED = 64  # bytes of an image in the index and in the note of its shard, beside its name
SPARE = 16 << 20  # bytes that are left free
WAIT = 10  # seconds for the processes of a run that was killed

Tick = Callable[[int, int], None]  # images of a finished shard, and of all that were finished before


@dataclass(frozen=True)
class Packing:
    """How images are packed."""

    kind: Kind = "pixels"
    size: int = 256
    """pixels: the side of the squares; jpeg: the longest that the shorter side may be."""
    quality: int = 0
    """Of the JPEGs, 1 to 100; jpeg alone."""
    exif: bool = False
    known: str = ""
    """The name of the data set, if it has one."""


def pack(
    destination: str, packing: Packing, classes: tuple[str, ...], parts: dict[str, Part], workers: int, tick: Tick
) -> None:
    """Pack the images into the folder `destination`, or go on with it.

    Raises UserError if the folder holds something else, if the disk is too small, and for a damaged image.
    """
    folder, plan = Path(destination), _plan(packing, classes, parts)
    if _is_complete(folder, plan):
        return
    with _claimed(folder, plan):
        shards = [shard for name, part in parts.items() for shard in _shards(folder, name, part, packing)]
        open_shards = [shard for shard in shards if not shard.is_done()]
        check_disk(folder, packing, parts, open_shards)
        done = sum(len(shard.rows) for shard in shards) - sum(len(shard.rows) for shard in open_shards)
        tick(0, done)
        for result in _written(open_shards, parts, packing, workers):
            if isinstance(result, str):
                raise UserError(result)
            tick(result, 0)
        try:
            _finish(folder, plan, parts, shards)
        except OSError as error:
            raise UserError(_unwritable(folder, error)) from None


def _unwritable(path: Path, error: OSError) -> str:
    """What went wrong when a file was written, and what to do."""
    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    remedy = "make room, and run the same command again: complete shards are kept" if is_full else "check the disk"
    return f"{str(path)!r} cannot be written ({error.strerror}): {remedy}"


def _plan(packing: Packing, classes: tuple[str, ...], parts: dict[str, Part]) -> dict[str, Any]:
    """What must be equal for a folder to be gone on with."""
    about = {name: {"images": len(part.labels), "source": part.digest()} for name, part in parts.items()}
    how = {
        "kind": packing.kind,
        "size": packing.size,
        "quality": packing.quality,
        "exif": packing.exif,
        "known": packing.known,
    }
    return {"format": FORMAT, "version": VERSION, **how, "classes": list(classes), "parts": about}


def _is_complete(folder: Path, plan: dict[str, Any]) -> bool:
    """True if the folder holds this pack. Raises UserError if it holds anything that is no beginning of it.

    Raises UserError too if a file of the pack is missing or has another length.
    """
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise UserError(f"{shown(str(folder))} is a file: name a folder for the packed images")
    if (manifest := read_manifest(folder)) is not None:
        there = {
            **manifest,
            "parts": {n: {k: p[k] for k in ("images", "source")} for n, p in manifest["parts"].items()},
        }
        _refuse_other(folder, there, plan)
        if wrong_sizes(folder, manifest):
            _begin_again(folder, plan, manifest)
            return False
        shutil.rmtree(folder / WORK, ignore_errors=True)
        return True
    if os.path.isdir(folder) and os.listdir(folder) and not (folder / WORK).is_dir():
        raise UserError(f"{shown(str(folder))} is not empty and holds no packed images: name a new folder")
    return False


def _begin_again(folder: Path, plan: dict[str, Any], manifest: Manifest) -> None:
    """Make a complete pack, of which files were lost, one that is to be gone on with: its other shards are kept."""
    notes = whole_shards(folder, manifest)
    shutil.rmtree(folder / WORK, ignore_errors=True)
    (folder / WORK).mkdir(exist_ok=True)
    for file, note in notes.items():
        write_atomic(folder / WORK / f"{file}.json", json.dumps(note).encode())
    write_atomic(folder / WORK / "plan.json", json.dumps(plan).encode())
    (folder / MANIFEST).unlink()


def _refuse_other(folder: Path, there: dict[str, Any], plan: dict[str, Any]) -> None:
    differ = [name for name in plan if there.get(name) != plan[name]]
    if differ:
        values = [f"{name} {there.get(name)!r:.80} there and {plan[name]!r:.80} now" for name in differ]
        raise UserError(f"{shown(str(folder))} holds another pack ({'; '.join(values)}): name a new folder")


@contextmanager
def _claimed(folder: Path, plan: dict[str, Any]) -> Iterator[None]:
    """Make the folder for the work, with a lock that worker processes hold too."""
    work = folder / WORK
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{shown(str(folder))} cannot be made ({error.strerror}): check the path") from None
    with open(work / "lock", "ab") as lock:
        _take(lock.fileno(), folder)
        noted = work / "plan.json"
        if noted.is_file():
            _refuse_other(folder, json.loads(noted.read_bytes()), plan)
        else:
            write_atomic(noted, json.dumps(plan).encode())
        yield
    shutil.rmtree(work)


def _take(lock: int, folder: Path) -> None:
    until = time.monotonic() + WAIT
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if time.monotonic() > until:
                raise UserError(f"another process packs into {shown(str(folder))}: wait for it, or stop it") from None
            time.sleep(0.1)


@dataclass(frozen=True)
class Shard:
    """A shard to be written: `rows` of the images of `part`."""

    folder: Path
    part: str
    file: str
    rows: range

    @property
    def path(self) -> Path:
        return self.folder / self.file

    @property
    def unfinished(self) -> Path:
        return self.folder / WORK / self.file

    @property
    def note(self) -> Path:
        """images, bytes, blake2b of the shard, and the sizes of its images."""
        return self.folder / WORK / f"{self.file}.json"

    def is_done(self) -> bool:
        return self.path.is_file() and self.note.is_file()


def _shards(folder: Path, name: str, part: Part, packing: Packing) -> list[Shard]:
    count = len(part.labels)
    each = max(1, PIXEL_BYTES // (packing.size**2 * 3)) if packing.kind == "pixels" else TAR_IMAGES
    ending = "npy" if packing.kind == "pixels" else "tar"
    starts = range(0, count, each)
    return [
        Shard(folder, name, f"{name}-{number:05}.{ending}", range(start, min(start + each, count)))
        for number, start in enumerate(starts)
    ]


def check_disk(folder: Path, packing: Packing, parts: dict[str, Part], shards: list[Shard]) -> None:
    """Raise UserError unless the shards that are missing, and the indices, have room on the disk."""
    need = sum(_bytes(packing, parts[shard.part], shard.rows) for shard in shards)
    need += sum(len(name) + INDEXED for part in parts.values() for name in part.names)
    free = shutil.disk_usage(folder).free
    if need + SPARE > free:
        raise UserError(
            f"{shown(str(folder))}: the packed images need {_size(need)} and {_size(free)} are free, of which "
            f"{_size(SPARE)} are to stay so: make room, or take a smaller --size or --jpeg-quality"
        )


def _size(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def _bytes(packing: Packing, part: Part, rows: range) -> int:
    """Bytes of a shard: exact for pixels, from the files' lengths for files, and from some images for JPEGs."""
    if packing.kind == "pixels":
        return HEADER + len(rows) * packing.size**2 * 3
    if packing.kind == "files":
        return int(part.lengths[rows.start : rows.stop].sum()) + 3072 * len(rows)
    some = rows[:: max(1, len(part.labels) // LOOKED_AT)]
    encoded = [len(smaller_jpeg(part.pictures.decode(i), packing.size, packing.quality)) for i in some]
    return (sum(encoded) // len(encoded) + 3072) * len(rows)


def _written(shards: list[Shard], parts: dict[str, Part], packing: Packing, workers: int) -> DataLoader:
    """Writes the shards; gives the number of images of each, or a message of what went wrong."""
    return DataLoader(
        _Shards(shards, parts, packing),
        batch_size=None,
        num_workers=min(workers, len(shards)) if workers > 1 else 0,
        prefetch_factor=1 if workers > 1 and shards else None,
        collate_fn=nn.Identity(),
        worker_init_fn=begin_worker,
        generator=torch.Generator(),  # else the process's default generator is drawn from
    )


class _Shards(Dataset):
    def __init__(self, shards: list[Shard], parts: dict[str, Part], packing: Packing):
        self.shards, self.parts, self.packing = shards, parts, packing

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, number: int) -> int | str:
        """Write a shard: the number of its images, or an error message. An exception would show a traceback."""
        shard, how = self.shards[number], self.packing
        try:
            note = write_shard(
                shard.unfinished, self.parts[shard.part], shard.rows, how.kind, how.size, how.quality, how.exif
            )
            write_atomic(shard.note, json.dumps(note).encode())
            os.replace(shard.unfinished, shard.path)
        except UserError as error:
            return str(error)
        except OSError as error:
            shard.unfinished.unlink(missing_ok=True)
            return _unwritable(shard.path, error)
        return len(shard.rows)


def _finish(folder: Path, plan: dict[str, Any], parts: dict[str, Part], shards: list[Shard]) -> None:
    """Write the indices and the manifest, which comes last."""
    manifest = json.loads(json.dumps(plan))
    if plan["kind"] != "pixels":
        write_atomic(folder / FILES[0], json.dumps(plan["classes"]).encode())
    for name, part in parts.items():
        noted = [(shard, json.loads(shard.note.read_bytes())) for shard in shards if shard.part == name]
        index = folder / f"{name}.npz"
        write_atomic(index, index_of(part, [size for _, note in noted for size in note.pop("sizes")]))
        size = index.stat().st_size
        manifest["parts"][name]["index"] = {"file": index.name, "bytes": size, "blake2b": checksum(index)}
        manifest["parts"][name]["shards"] = [{"file": shard.file, **note} for shard, note in noted]
    write_atomic(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
