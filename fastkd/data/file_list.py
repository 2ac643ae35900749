"""A list of the images to use: a text file with one path per line, as `fastkd check-data` writes it.

The paths are relative to the folder of the data, or of its shards. They name an image in a shard as messages do.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from ..errors import UserError
from .walk import some


def base_of(data: str) -> str:
    """The folder that the paths of a list start from; `data` is a folder, or a pattern of shards in one."""
    return data if os.path.isdir(data) else os.path.dirname(data)


def read_list(path: str, data: str) -> frozenset[str]:
    """The images of the list, as paths of the data. Raises UserError if it cannot be read or names nothing."""
    try:
        lines = [os.fsdecode(line) for line in Path(path).read_bytes().split(b"\n") if line]
    except OSError as error:
        raise UserError(f"--file-list {path!r} cannot be read ({error.strerror}): give one of `check-data`") from None
    if not lines:
        raise UserError(f"--file-list {path!r} names no images: make one with `fastkd check-data --file-list`")
    return frozenset(os.path.join(base_of(data), line) for line in lines)


def list_of(files: Iterable[str], data: str) -> bytes:
    """The content of a list. Raises UserError for names with a line break."""
    base = base_of(data)
    names = [os.path.relpath(file, base) for file in files]
    if broken := [name for name in names if "\n" in name]:
        raise UserError(f"{len(broken)} names have a line break, which a list cannot hold: rename {some(broken)}")
    return b"".join(os.fsencode(name) + b"\n" for name in names)
