"""Paths for libraries that take names in UTF-8 alone, such as safetensors; a name on Linux may be any bytes."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def utf8_path(path: str | os.PathLike[str]) -> Iterator[str]:
    """Within the block, a path in UTF-8 of an existing file: its own, or else one through an open descriptor.

    Raises OSError if the file cannot be read. safetensors would say of any such file that it does not exist.
    """
    with open(path, "rb") as file:
        name = os.fspath(path)
        try:
            name.encode()  # Python holds other bytes as surrogates, which cannot be encoded
        except UnicodeEncodeError:
            name = f"/proc/self/fd/{file.fileno()}"
        yield name
