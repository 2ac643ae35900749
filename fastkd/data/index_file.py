"""The file of an image index: one array of rows, sorted by key. image_index.py says what it is for.

The key of an image is a hash of 64 bits of its path below the folder. Two of 1.28 million have the same key with a
probability of 4e-8, and they would have to agree in length and time as well. NumPy's .npz holds a checksum, so that a
damaged file is told.
"""

import os
from collections.abc import Callable
from hashlib import blake2b

import numpy as np

from ..foreign import check_stored, open_file
from .walk import shown

ROW = np.dtype(
    [
        ("key", "u8"),
        ("bytes", "i8"),
        ("mtime_ns", "i8"),
        ("height", "i4"),  # pixels, as stored: not turned
        ("width", "i4"),
        ("orientation", "u1"),  # of EXIF, 1 to 8; 0: not read
        ("kind", "S8"),  # Pillow's name of the format
    ]
)
HEADER = ("height", "width", "orientation", "kind")
NO_ROWS = np.zeros(0, ROW)


def key_of(path: str) -> int:
    return int.from_bytes(blake2b(os.fsencode(path), digest_size=8).digest(), "little")


def take(rows: np.ndarray, known: np.ndarray, exif: bool) -> np.ndarray:
    """Fill the rows of unchanged files from the sorted known ones. Gives the positions of the others, int64 [n]."""
    same = np.zeros(len(rows), bool)
    if len(known):
        at = np.searchsorted(known["key"], rows["key"]).clip(max=len(known) - 1)
        same = (known["height"][at] > 0) & (known["width"][at] > 0) & (known["orientation"][at] <= 8)
        for name in ("key", "bytes", "mtime_ns"):
            same &= known[name][at] == rows[name]
        if exif:
            same &= known["orientation"][at] > 0
        rows[same] = known[at[same]]
    return np.flatnonzero(~same)


def merged(*parts: np.ndarray) -> np.ndarray:
    """All rows, sorted by key; of those with one key, the last."""
    rows = np.concatenate(parts[::-1])
    return rows[np.unique(rows["key"], return_index=True)[1]]


def pruned(known: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Without the rows of other files than those with the `wanted` keys, if there are more of them.

    They may belong to another split of the folder, or to files that went away.
    """
    ours = np.isin(known["key"], wanted)
    return known if len(known) - ours.sum() <= len(wanted) else known[ours]


def load(path: str, log: Callable[[str], None]) -> np.ndarray:
    """The rows of a file; none if it is not there, or damaged, which is logged."""
    try:
        with open_file(path) as stream:
            check_stored(stream)
            with np.load(stream, allow_pickle=False) as content:
                rows = content["rows"]
        if rows.dtype != ROW or rows.ndim != 1 or not (rows["key"][1:] > rows["key"][:-1]).all():
            raise ValueError("it is of another version of fastkd")
    except FileNotFoundError:
        return NO_ROWS
    except Exception as error:  # of zipfile, zlib and numpy: anything
        reason = str(error).partition("\n")[0] or type(error).__name__
        log(f"data: the index of the images {shown(path)} cannot be used ({reason}): it is made anew")
        return NO_ROWS
    return rows


def write(path: str, rows: np.ndarray) -> None:
    """Atomic: after a kill at any moment, the old or the new file is there. One process of a machine writes."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    part = f"{path.removesuffix('.npz')}.{os.uname().nodename}.tmp"
    with open(part, "wb") as stream:
        np.savez(stream, rows=rows)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(part, path)


def in_cache(root: str) -> str:
    """The path of the index of a folder that cannot be written."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    name = blake2b(os.fsencode(os.path.abspath(root)), digest_size=8).hexdigest()
    return os.path.join(cache, "fastkd", f"index-{name}.npz")
