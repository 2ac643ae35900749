"""Where the bytes of an image are: in a file of its own, or in a part of a larger one.

`Places` are the images of a split that lie in shards. Images are read by number, in any order. Nothing is unpacked.
"""

import os
from collections.abc import Sequence
from threading import Lock
from typing import Protocol

import numpy as np
from torch import Tensor

from ..foreign import open_file
from .decode import LARGEST_FILE, MAX_PIXELS, check_length, decode, read_file

OPEN = 128  # shards that a process keeps open; Linux allows 1,024 open files by default


class Places(Protocol):
    """Images by number. It is sent to worker processes."""

    def read(self, i: int) -> bytes:
        """The encoded image. Raises OSError if it cannot be read."""
        ...

    def take(self, positions: Sequence[int]) -> "Places":
        """The images at these positions."""
        ...

    def lengths(self) -> np.ndarray:
        """Bytes of each image, int64 [N]."""
        ...


class Pictures:
    """The images of a split for worker processes.

    Names are one array of bytes: with a list of str, reference counts would make every worker copy its memory pages.
    """

    def __init__(self, files: list[str], places: Places | None, max_pixels: int = MAX_PIXELS):
        self.names, self.places = np.array([os.fsencode(file) for file in files]), places
        self.max_pixels = max_pixels  # of a picture

    def __len__(self) -> int:
        return len(self.names)

    def name(self, i: int) -> str:
        return os.fsdecode(self.names[i])

    def read(self, i: int) -> bytes:
        """The encoded image. Raises OSError."""
        longest = max(LARGEST_FILE, 4 * self.max_pixels)
        return read_file(self.name(i), longest) if self.places is None else self.places.read(i)

    def decode(self, i: int, exif: bool = False, side: int | None = None) -> Tensor:
        """uint8 [3, H, W], as decode.decode. Raises UserError with the name of the image."""
        return decode(self.name(i), exif, side, lambda _: self.read(i), self.max_pixels)


class OwnFiles:
    """Places of images that are files."""

    def __init__(self, files: Sequence[str]):
        self.files = files

    def read(self, i: int) -> bytes:
        return read_file(self.files[i])

    def take(self, positions: Sequence[int]) -> "OwnFiles":
        return OwnFiles([self.files[i] for i in positions])

    def lengths(self) -> np.ndarray:
        return np.array([os.path.getsize(file) for file in self.files], dtype=np.int64)


class Members:
    """Places of images that are runs of bytes in shards, such as members of tar files."""

    def __init__(self, shards: Sequence[str], shard: np.ndarray, offset: np.ndarray, length: np.ndarray):
        """Image i has `length[i]` bytes from `offset[i]` on in `shards[shard[i]]`; all int64 [N]."""
        self.shards, self.shard, self.offset, self.length = tuple(shards), shard, offset, length
        self.opened = OpenFiles()

    def read(self, i: int) -> bytes:
        length = int(self.length[i])
        check_length(length)
        data = os.pread(self.opened(self.shards[self.shard[i]]).descriptor, length, int(self.offset[i]))
        if len(data) < length:
            raise OSError(f"{length - len(data):,} of its {length:,} bytes are missing: the shard was cut off")
        return data

    def take(self, positions: Sequence[int]) -> "Members":
        rows = np.asarray(positions, dtype=np.int64)
        return Members(self.shards, self.shard[rows], self.offset[rows], self.length[rows])

    def lengths(self) -> np.ndarray:
        return self.length


class Joined:
    """The images of several places, one after another."""

    def __init__(self, parts: Sequence[Places], counts: Sequence[int]):
        self.parts = tuple(parts)
        self.part = np.repeat(np.arange(len(counts)), counts)
        self.number = np.concatenate([np.arange(count) for count in counts])

    def read(self, i: int) -> bytes:
        return self.parts[self.part[i]].read(int(self.number[i]))

    def take(self, positions: Sequence[int]) -> "Joined":
        taken = Joined(self.parts, [0] * len(self.parts))
        rows = np.asarray(positions, dtype=np.int64)
        taken.part, taken.number = self.part[rows], self.number[rows]
        return taken

    def lengths(self) -> np.ndarray:
        every = [part.lengths() for part in self.parts]
        pairs = zip(self.part.tolist(), self.number.tolist(), strict=True)
        return np.array([every[part][number] for part, number in pairs], dtype=np.int64)


class OpenFile:
    """A file that is closed with its last reference, so that it may be dropped while another thread reads it."""

    _close = staticmethod(os.close)  # the module may be gone when the program ends

    def __init__(self, path: str):
        with open_file(path) as file:  # refuses a pipe, for which it would wait
            self.descriptor = os.dup(file.fileno())

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):  # else it could not be opened
            self._close(self.descriptor)


class OpenFiles:
    """The last OPEN files that were asked for. Each loader has its own: a path may be another file for the next one."""

    def __init__(self) -> None:
        self.files: dict[str, OpenFile] = {}
        self.lock = Lock()

    def __call__(self, path: str) -> OpenFile:
        """Raises OSError if it cannot be opened."""
        with self.lock:
            file = self.files.get(path)
            if file is None:
                if len(self.files) >= OPEN:
                    self.files.pop(next(iter(self.files)))
                file = self.files[path] = OpenFile(path)
            return file

    def __reduce__(self) -> tuple[type["OpenFiles"], tuple[()]]:
        return OpenFiles, ()  # another process opens them itself
