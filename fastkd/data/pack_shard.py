"""One shard of packed images, written image by image, with its checksum."""

import io
import json
import os
import tarfile
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from ..errors import UserError
from .pack_format import HEADER
from .pack_source import Part, header_size, smaller_jpeg, squared
from .scan import image_kind

ENDINGS = {"jpeg": "jpg", "tiff": "tif"}  # by the kind of an image; others are called as their kind


class Summed:
    """A file to write, with the checksum of what was written."""

    def __init__(self, stream: BinaryIO):
        self.stream, self.digest, self.bytes = stream, blake2b(digest_size=32), 0

    def write(self, data: bytes | memoryview) -> int:
        self.digest.update(data)
        self.bytes += len(data)
        self.stream.write(data)
        return len(data)


def write_shard(path: Path, part: Part, rows: range, kind: str, size: int, quality: int, exif: bool) -> dict[str, Any]:
    """Write the images `rows` of `part` to `path`, down to the disk.

    Gives {"images", "bytes", "blake2b", "sizes": (height, width) of each}. Raises UserError for a damaged image and
    OSError if the disk is full.
    """
    with open(path, "wb") as stream:
        out = Summed(stream)
        if kind == "pixels":
            sizes = _write_pixels(out, part, rows, size, exif)
        else:
            sizes = _write_tar(out, part, rows, kind, size, quality, exif)
        stream.flush()
        os.fsync(stream.fileno())
    return {"images": len(rows), "bytes": out.bytes, "blake2b": out.digest.hexdigest(), "sizes": sizes}


def _write_pixels(out: Summed, part: Part, rows: range, side: int, exif: bool) -> list[list[int]]:
    """A .npy file, uint8 [n, side, side, 3]."""
    head = io.BytesIO()
    about = {"descr": "|u1", "fortran_order": False, "shape": (len(rows), side, side, 3)}
    np.lib.format.write_array_header_1_0(head, about)
    assert head.tell() == HEADER
    out.write(head.getvalue())
    sizes = []
    for i in rows:
        pixels = part.pictures.decode(i, exif)
        sizes.append(list(pixels.shape[1:]))
        out.write(squared(pixels, side).numpy().data.cast("B"))
    return sizes


def _write_tar(out: Summed, part: Part, rows: range, kind: str, side: int, quality: int, exif: bool) -> list[list[int]]:
    """A tar file of WebDataset: 00000017.jpg and 00000017.cls for image 17."""
    sizes = []
    with tarfile.open(fileobj=cast(Any, out), mode="w|", format=tarfile.USTAR_FORMAT) as tar:
        for i in rows:
            if kind == "jpeg":
                pixels = part.pictures.decode(i, exif)
                ending, data, size = "jpg", smaller_jpeg(pixels, side, quality), (pixels.shape[1], pixels.shape[2])
            else:
                ending, data, size = _file(part, i)
            sizes.append(list(size))
            _add(tar, f"{i:08}.{ending}", data)
            _add(tar, f"{i:08}.cls", str(part.labels[i]).encode())
    return sizes


def _file(part: Part, i: int) -> tuple[str, bytes, tuple[int, int]]:
    """(ending, bytes, size) of an image that is copied. It is not decoded: only its header is looked at."""
    name = part.names[i]
    try:
        data = part.pictures.read(i)
        kind, size = image_kind(data[:16]), header_size(data)
    except (OSError, ValueError) as error:
        raise UserError(f"{name!r} cannot be read ({error}): repair or remove it") from None
    if kind is None:
        raise UserError(f"{name!r} is no picture, by its first bytes: remove it")
    return ENDINGS.get(kind, kind), data, size


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def index_of(part: Part, sizes: list[list[int]]) -> bytes:
    """The index of a part, an npz file. `sizes`: (height, width) of each picture, in pixels."""
    buffer = io.BytesIO()
    names = np.frombuffer(json.dumps(part.names).encode(), dtype=np.uint8)
    labels, pixels = np.array(part.labels, dtype=np.int64), np.array(sizes, dtype=np.int64).reshape(-1, 2)
    np.savez(buffer, labels=labels, sizes=pixels, names=names)
    return buffer.getvalue()
