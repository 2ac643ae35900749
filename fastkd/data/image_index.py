"""The sizes of the images of a folder: read from their headers once, and kept.

To draw a crop before the image is decoded, its size must be known. Pillow reads a header in 0.03 ms, and with a process
for it 0.05 ms: a minute for 1.28 million files that lie in the page cache, much longer on a slow disk. So the answers
are kept in DIR/.fastkd-index.npz, or in the cache folder of the user if DIR cannot be written. A later run asks the
file system for the length and the time of each file, and reads anew what has changed. What is read is saved every few
seconds, so that a run that was killed goes on there.
"""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ..errors import UserError, count_of
from .decode import MAX_PIXELS, begin_worker, header, too_many
from .index_file import HEADER, NO_ROWS, ROW, in_cache, key_of, load, merged, pruned, take, write
from .progress import with_bar
from .walk import HOW, INDEX, SHOWN, shown

SLOW = 1.0  # seconds after which there is a progress bar, and the index is kept
SAVE_EVERY = 5.0  # seconds
CHUNK = 256  # headers per message of a reading process
FEW = 2000  # headers that one process reads within the time that it takes to start others

if TYPE_CHECKING:
    from .options import DataOptions

Log = Callable[[str], None]
Bad = tuple[str, str]  # a file, and what is wrong with it


@dataclass(frozen=True)
class ImageIndex:
    """What is known of each of N images."""

    rows: np.ndarray
    """[N] of ROW, in the order of the files."""
    sizes: Tensor
    """(height, width) as decoded, int64 [N, 2]; turned as EXIF says if the index was read with `exif`."""


def read_index(
    files: Sequence[str],
    roots: Sequence[str] = (),
    *,
    exif: bool = False,
    workers: int = 0,
    log: Log = print,
    max_pixels: int = MAX_PIXELS,
) -> ImageIndex:
    """The index of the files, in their order. `roots`: the folders that they lie in, of which each keeps an index.

    exif: read the orientation too, and give the sizes as turned by it. workers: processes that read headers. `log` gets
    a line if the reading took long, or if a kept index is damaged. Raises UserError for files whose header is damaged
    or claims more than `max_pixels`.
    """
    parts = [NO_ROWS]
    for root, group in groupby(files, lambda file: _root_of(file, roots)):
        below = list(group)
        place = root or os.path.commonpath(map(os.path.dirname, below))
        parts.append(_Reader(below, place, exif, workers, log, max_pixels).read())
    rows = np.concatenate(parts)
    _check_pixels(files, rows, max_pixels)
    sizes = torch.from_numpy(np.stack([rows["height"], rows["width"]], 1).astype(np.int64))
    if exif:
        lying = torch.from_numpy(rows["orientation"] >= 5)
        sizes[lying] = sizes[lying].flip(1)
    return ImageIndex(rows, sizes)


def sizes_of(files: Sequence[str], options: "DataOptions", log: Log = print) -> Tensor:
    """(height, width) of the images as decoded, int64 [N, 2]. Raises UserError for damaged headers."""
    roots = (options.data, options.unlabelled)
    exif, workers, most = options.exif, options.workers, options.max_pixels
    return read_index(files, roots, exif=exif, workers=workers, log=log, max_pixels=most).sizes


def _check_pixels(files: Sequence[str], rows: np.ndarray, max_pixels: int) -> None:
    """Raise UserError for images of more pixels, of which an index was kept with another limit."""
    heights, widths = (rows[name].astype(np.int64) for name in ("height", "width"))
    places = np.flatnonzero(heights * widths > max_pixels).tolist()
    if places:
        raise UserError(_damaged([(files[i], too_many(int(widths[i]), int(heights[i]), max_pixels)) for i in places]))


def _root_of(file: str, roots: Sequence[str]) -> str:
    return next((root for root in roots if root and file.startswith(root.rstrip(os.sep) + os.sep)), "")


class _Reader:
    """Reads the index of the files below one folder."""

    def __init__(self, files: list[str], root: str, exif: bool, workers: int, log: Log, max_pixels: int):
        self.files, self.root, self.exif, self.log, self.max_pixels = files, root, exif, log, max_pixels
        self.workers = workers
        self.paths = [os.path.join(root, f"{INDEX}.npz"), in_cache(root)]
        self.started = self.saved = time.monotonic()

    def read(self) -> np.ndarray:
        """The rows of the files, in their order."""
        rows = _stat_all(self.files, self.root)
        known = NO_ROWS
        for path in self.paths:
            known = merged(known, load(path, self.log))
        missing = take(rows, known, self.exif)
        if not len(missing):
            return rows
        _, first = np.unique(rows["key"][missing], return_index=True)  # a file may be listed twice
        missing = missing[np.sort(first)]
        known, bad = self._read_headers(rows, missing, known)
        if self._is_slow():
            self._finish(known, len(missing))
        if bad:
            raise UserError(_damaged(bad))
        take(rows, known, self.exif)
        return rows

    def _read_headers(self, rows: np.ndarray, missing: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, list[Bad]]:
        """(the known rows with those of `missing`, positions in the files; the damaged files)"""
        fresh, bad = [NO_ROWS], list[Bad]()
        wanted = rows["key"]
        for positions, sizes, wrong in with_bar(
            self._headers(missing),
            len(missing),
            "reading image sizes",
            lambda chunk: len(chunk[0]) + len(chunk[2]),
            self._is_slow,
        ):
            part = rows[positions]
            for name in HEADER:
                part[name] = sizes[name]
            fresh.append(part)
            bad += wrong
            if self._is_slow() and time.monotonic() > self.saved + SAVE_EVERY:
                known, fresh = pruned(merged(known, *fresh), wanted), [NO_ROWS]
                self._save(known)
                self.saved = time.monotonic()
        return pruned(merged(known, *fresh), wanted), bad

    def _headers(self, missing: np.ndarray) -> DataLoader:
        return DataLoader(
            _Headers(self.files, missing, self.exif, self.max_pixels),
            batch_size=CHUNK,
            num_workers=self.workers if len(missing) > FEW else 0,
            collate_fn=nn.Identity(),  # `__getitems__` makes whole chunks already
            worker_init_fn=begin_worker,
            generator=torch.Generator(),  # else the training process's default generator is drawn from
        )

    def _is_slow(self) -> bool:
        return time.monotonic() > self.started + SLOW

    def _finish(self, known: np.ndarray, count: int) -> None:
        """Save, and say where."""
        path = self._save(known)
        where = f"kept in {shown(path)}" if path else "and cannot be kept, so that each run reads them"
        seconds = time.monotonic() - self.started
        self.log(f"data: the size of {count_of(count, 'image')} was read in {seconds:,.0f} s, {where}")

    def _save(self, rows: np.ndarray) -> str:
        """Write the index beside the data or in the cache folder. Gives the path; "" if neither can be written."""
        for path in self.paths:
            try:
                write(path, rows)
            except OSError:
                continue
            return path
        return ""


_Chunk = tuple[np.ndarray, np.ndarray, list[Bad]]  # positions int64 [n], their part of ROW [n], damaged files


class _Headers(Dataset):
    def __init__(self, files: list[str], missing: np.ndarray, exif: bool, max_pixels: int):
        self.files, self.missing, self.exif, self.max_pixels = files, missing, exif, max_pixels

    def __len__(self) -> int:
        return len(self.missing)

    def __getitems__(self, places: list[int]) -> _Chunk:
        positions, sizes, bad = [], [], list[Bad]()
        for position in self.missing[places].tolist():
            try:
                sizes.append(header(self.files[position], self.exif, self.max_pixels))
                positions.append(position)
            except ValueError as error:
                bad.append((self.files[position], str(error)))
        return np.array(positions, np.int64), np.array(sizes, [(name, ROW[name]) for name in HEADER]), bad


def _stat_all(files: list[str], root: str) -> np.ndarray:
    """Rows [N] with key, length and time, and no size yet. Raises UserError for files that cannot be opened.

    In threads: on network storage each file is a wait. On a local disk it takes about 4 us a file.
    """
    rows, bad, start = np.zeros(len(files), ROW), list[Bad](), len(root.rstrip(os.sep)) + 1
    rows["key"] = np.fromiter((key_of(file[start:]) for file in files), np.uint64, len(files))
    with ThreadPoolExecutor(16) as pool:
        chunks = [slice(at, at + 4096) for at in range(0, len(files), 4096)]
        for chunk, (found, wrong) in zip(chunks, pool.map(_stat, (files[chunk] for chunk in chunks)), strict=True):
            rows["bytes"][chunk], rows["mtime_ns"][chunk] = found.T
            bad += wrong
    if bad:
        raise UserError(_damaged(bad))
    return rows


def _stat(files: list[str]) -> tuple[np.ndarray, list[Bad]]:
    """((length, time) int64 [n, 2], the files that are not there)"""
    found, bad = np.zeros((len(files), 2), np.int64), list[Bad]()
    for i, file in enumerate(files):
        try:
            status = os.stat(file)
        except OSError as error:
            bad.append((file, str(error.strerror)))
            continue
        found[i] = status.st_size, status.st_mtime_ns
    return found, bad


def _damaged(bad: list[Bad]) -> str:
    first = "; ".join(f"{file!r} cannot be decoded ({reason})" for file, reason in bad[:SHOWN])
    more = f"; and {len(bad) - SHOWN} more" if bad[SHOWN:] else ""
    total = f"{len(bad)} damaged images: " if len(bad) > 1 else ""
    return f"{total}{first}{more}: repair or remove {'these files' if len(bad) > 1 else 'it'}{HOW}"
