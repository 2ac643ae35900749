"""The files of a view: shards of rows in .npy format, and a byte for each image that says whether its row is filled.

Files get their place on the disk when they are made, so that a full disk is an error then and not a crash later, and
they appear under their names when they are whole. Rows are written through a memory map. A row is marked as filled
after it is on the disk, so that a process may be killed at any moment.
"""

import hashlib
import os
from pathlib import Path

import numpy as np

from ..errors import UserError

SHARD = 65_536  # images: 131 MB of 1,000 classes in fp16


def shard_sizes(samples: int) -> list[int]:
    """The number of images in each shard."""
    return [min(SHARD, samples - start) for start in range(0, samples, SHARD)]


def shard_path(folder: Path, view: int, shard: int) -> Path:
    return folder / f"view-{view:04}-{shard:05}.npy"


def marks_path(folder: Path, view: int) -> Path:
    return folder / f"view-{view:04}-filled.npy"


def view_bytes(samples: int, dtype: np.dtype) -> int:
    """Size of the files of a view, without their headers."""
    return samples * (dtype.itemsize + 1)


def make_view(folder: Path, view: int, samples: int, dtype: np.dtype) -> None:
    """Make those files of a view that are not there. Raises UserError, also if the disk is full.

    If a shard is missing, no row of the view counts as filled: the marks would be those of the lost rows.
    """
    if is_lost(folder, view, samples):
        marks_path(folder, view).unlink(missing_ok=True)
    for shard, rows in enumerate(shard_sizes(samples)):
        _make(shard_path(folder, view, shard), rows, dtype)
    _make(marks_path(folder, view), samples, np.dtype(np.uint8))


def is_lost(folder: Path, view: int, samples: int) -> bool:
    """True if a shard of the view is not there."""
    return not all(shard_path(folder, view, shard).exists() for shard in range(-(-samples // SHARD)))


def _make(path: Path, rows: int, dtype: np.dtype) -> None:
    if path.exists():
        return
    temporary = path.with_name(f".{path.name}.tmp")
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (rows,)}
    try:
        with open(temporary, "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            file.flush()
            os.posix_fallocate(file.fileno(), 0, file.tell() + rows * dtype.itemsize)
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"cannot make {path} ({rows * dtype.itemsize:,} bytes): {error.strerror}; what the cache holds is valid: "
            "make room or permission and give the same command again"
        ) from None


def open_rows(path: Path, rows: int, dtype: np.dtype, mode: str = "r") -> np.memmap:
    """A file as a memory map [rows]. Raises UserError if it is missing, truncated or of another kind."""
    again = "`fastkd cache-teacher` with the options of the cache asks the teacher again for this view"
    hint = f"it is damaged: take it from a copy, or remove it, and {again}"
    try:
        found = np.load(path, mmap_mode=mode, allow_pickle=False)  # type: ignore[arg-type]
    except FileNotFoundError:
        raise UserError(f"{path} is missing: take it from a copy, or {again}") from None
    except PermissionError as error:
        raise UserError(f"{path} cannot be opened: {error.strerror}; check its permissions") from None
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: {error}; {hint}") from None
    if not isinstance(found, np.memmap) or found.shape != (rows,) or found.dtype != dtype:
        raise UserError(f"{path} holds {found.shape} of {found.dtype}, not ({rows},) of {dtype}; {hint}")
    return found


def hash_of(path: Path) -> str:
    """The BLAKE2 hash of a file."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
