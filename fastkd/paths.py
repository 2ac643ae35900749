"""Paths for libraries that take names in UTF-8 alone, such as safetensors; a name on Linux may be any bytes."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def utf8_path(path: str | os.PathLike[str]) -> Iterator[str]:
    """Within the block, a path in UTF-8 of an existing file: its own, or else one through an open descriptor."""
    name = os.fspath(path)
    try:
        name.encode()  # Python holds other bytes as surrogates, which cannot be encoded
    except UnicodeEncodeError:
        with open(path, "rb") as file:
            yield f"/proc/self/fd/{file.fileno()}"
        return
    yield name
