"""TeacherCache: a folder with what a teacher says of each view of each image."""

import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from .. import distributed
from ..errors import UserError
from .files import SHARD, hash_of, is_lost, make_view, marks_path, open_rows, shard_path, shard_sizes, view_bytes
from .manifest import Manifest, differences

FLUSH_SECONDS = 10.0  # what a process that is killed loses at most; each flush waits for the disk


class TeacherCache:
    """The cache in a folder; `read` and `write` rows by view and numbers of the images.

    Processes of one machine fill one folder together, each its own images. A view is complete when all rows are there
    and rank 0 has noted the hash of each shard. Rows are taken from complete views alone.
    """

    def __init__(self, folder: Path, manifest: Manifest):
        self.folder, self.manifest, self.rows = folder, manifest, manifest.rows
        self._view, self._shards, self._marks = -1, list[np.memmap](), np.zeros(0, np.uint8)
        self._pending: list[np.ndarray] = []  # numbers of images whose rows are written, but not marked yet
        self._flushed = time.monotonic()
        self.lost: list[int] = []  # views that were complete and miss a shard: they are filled again

    @classmethod
    def open(cls, folder: Path, settings: dict[str, Any], how: dict[str, str], views: int) -> "TeacherCache":
        """The cache in `folder`, or a new one if the folder is empty or not there; nothing is written yet.

        settings: what the run needs. A value of None fits any; a new cache then has fp16 and whole logits. views: how
        many views the run sees; if all of them are complete, it does not matter how its teacher would run. A view
        that misses a shard is not complete. Every process must call it. Raises UserError if the folder holds something
        else, a cache of other settings, or one whose files are damaged.
        """
        settings = json.loads(json.dumps(settings))  # as the manifest gives it back: lists for tuples
        found = Manifest.read(folder)
        if found is None:
            given = {name: value for name, value in settings.items() if value is not None}
            new = {"precision": "fp16", "topk": 0, "temperature": 1.0} | given
            if not new["topk"]:
                new["temperature"] = 0.0
            return cls(folder, Manifest(new, how))
        wanted = settings if found.settings.get("topk") else settings | {"temperature": None}
        if changed := differences(wanted, found.settings):
            raise UserError(
                f"the teacher cache {folder} does not fit: {'; '.join(changed)}. Give the cache's values, or another "
                "folder to make a new cache in"
            )
        lost = distributed.from_rank_zero(lambda: lost_views(folder, found))
        cache = cls(folder, without(found, lost))
        cache.lost = lost
        for view in cache.manifest.complete:
            cache.check_files(int(view))
        if not cache.covers(views) and (changed := differences(how, found.how)):
            raise UserError(
                f"the teacher cache {folder} is not complete and was begun in another way: {'; '.join(changed)}. Go on "
                "with the cache's values"
            )
        return cache

    def check_files(self, view: int) -> None:
        """Raise UserError if a shard of a view is missing or truncated, or has another kind of rows."""
        for shard, rows in enumerate(shard_sizes(self.manifest.samples)):
            open_rows(shard_path(self.folder, view, shard), rows, self.rows.dtype)

    def is_complete(self, view: int) -> bool:
        return str(view) in self.manifest.complete

    def covers(self, views: int) -> bool:
        """True if the first `views` views are complete."""
        return all(map(self.is_complete, range(views)))

    def check_room(self, views: int) -> None:
        """Raise UserError if the disk lacks the space for the first `views` views."""
        missing = [view for view in range(views) if not marks_path(self.folder, view).exists()]
        needed = len(missing) * view_bytes(self.manifest.samples, self.rows.dtype)
        there = next(each for each in (self.folder.absolute(), *self.folder.absolute().parents) if os.path.exists(each))
        free = shutil.disk_usage(there).free
        if needed > free:
            raise UserError(
                f"the teacher cache {self.folder} needs {_megabytes(needed)} more, and {there} has "
                f"{_megabytes(free)} free: give fewer --views, --teacher-cache-precision fp16, "
                "--teacher-cache-topk, or another folder"
            )

    def begin(self, view: int) -> None:
        """Make the files of a view, and open them for writing. Every process must call it."""
        if distributed.rank() == 0:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"cannot make the folder {self.folder}: {error.strerror}; choose another") from None
            self.manifest.write(self.folder)
            make_view(self.folder, view, self.manifest.samples, self.rows.dtype)
        distributed.barrier()
        self._open(view, "r+")
        self._marks = open_rows(marks_path(self.folder, view), self.manifest.samples, np.dtype(np.uint8), "r+")

    def _open(self, view: int, mode: str) -> None:
        """Open the shards of a view, if they are not open."""
        sizes = enumerate(shard_sizes(self.manifest.samples))
        self._shards = [open_rows(shard_path(self.folder, view, i), rows, self.rows.dtype, mode) for i, rows in sizes]
        self._view = view

    def filled(self, samples: Tensor) -> np.ndarray:
        """Whether the rows of these images are there, bool [N], of the view that was begun."""
        return self._marks[samples.numpy()] == 1

    def write(self, samples: Tensor, rows: np.ndarray) -> None:
        """Write the rows [N] of these images, int64 [N], into the view that was begun."""
        numbers = samples.numpy()
        for shard in np.unique(numbers // SHARD):
            chosen = numbers // SHARD == shard
            self._shards[shard][numbers[chosen] % SHARD] = rows[chosen]
        self._pending.append(numbers)
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Bring what was written to the disk, and then mark it as filled."""
        if self._pending:
            for shard in self._shards:
                shard.flush()
            self._marks[np.concatenate(self._pending)] = 1
            self._marks.flush()  # type: ignore[attr-defined]
        self._pending.clear()
        self._flushed = time.monotonic()

    def finish(self, view: int) -> bool:
        """Flush, and note the view as complete if all of its rows are there. Every process must call it."""
        self.flush()
        distributed.barrier()
        if distributed.rank() == 0 and (self._marks == 1).all():
            files = [shard_path(self.folder, view, i) for i in range(len(self._shards))]
            hashes = {str(view): {file.name: hash_of(file) for file in files}}
            self.manifest = replace(self.manifest, complete=self.manifest.complete | hashes)
            self.manifest.write(self.folder)
        self.manifest = distributed.from_rank_zero(lambda: self.manifest)
        return self.is_complete(view)

    def note_form(self, form: str) -> None:
        """Keep how the teacher runs, for the processes that go on with this cache."""
        self.manifest = replace(self.manifest, how=self.manifest.how | {"teacher_form": form})

    def read(self, view: int, samples: Tensor) -> tuple[Tensor, ...]:
        """What the teacher says of these images in a complete view, on the CPU (`methods.forwards.Taught`)."""
        if self._view != view:
            self._open(view, "r")
        numbers = samples.numpy()
        shards, rows = numbers // SHARD, np.empty(len(numbers), self.rows.dtype)
        for shard in np.unique(shards):
            chosen = shards == shard
            rows[chosen] = self._shards[shard][numbers[chosen] % SHARD]
        return self.rows.unpack(rows)

    def share(self, view: int) -> float:
        """The share of a view's rows that are there, 0 to 1."""
        path = marks_path(self.folder, view)
        if self.is_complete(view) or not path.exists():
            return float(self.is_complete(view))
        return float(open_rows(path, self.manifest.samples, np.dtype(np.uint8)).mean())


def lost_views(folder: Path, manifest: Manifest) -> list[int]:
    """The complete views that miss a shard."""
    return [view for view in sorted(map(int, manifest.complete)) if is_lost(folder, view, manifest.samples)]


def without(manifest: Manifest, views: list[int]) -> Manifest:
    """The manifest with these views as not complete."""
    left = {view: hashes for view, hashes in manifest.complete.items() if int(view) not in views}
    return replace(manifest, complete=left)


def _megabytes(size: int) -> str:
    """A number of bytes, for a message."""
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.3f} MB"


def verify(folder: Path) -> int:
    """The number of shards of the complete views, whose content is what was written. Raises UserError if it is not."""
    manifest = Manifest.read(folder)
    if manifest is None:
        raise UserError(f"there is no teacher cache in {folder}")
    checked = 0
    for view, hashes in manifest.complete.items():
        TeacherCache(folder, manifest).check_files(int(view))
        for name, wanted in hashes.items():
            if (found := hash_of(folder / name)) != wanted:
                raise UserError(
                    f"{folder / name} is damaged: its BLAKE2 hash is {found} and was {wanted} when view {view} was "
                    "completed; take it from a copy, or remove it, and `fastkd cache-teacher` with the options of the "
                    "cache asks the teacher again for this view"
                )
            checked += 1
    return checked
