"""What a tar shard of WebDataset holds: the place and the label of every image, from one pass over its headers.

Members whose names are equal up to the first dot after the last slash are one sample: an image, and its label as .cls
(text) or as "label" in .json. Other members are counted and not read: nothing is unpickled, nothing is unpacked, and no
name is used as a path. The index of a shard is kept in the cache folder, and made anew if the shard's size or time has
changed. 25 us a member.
"""

import hashlib
import io
import json
import os
import tarfile
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import UserError
from ..foreign import open_file
from .scan import UNKNOWN, image_kind
from .walk import EXTENSIONS, shown, some

VERSION = 1  # of the index
ENDINGS = tuple(extension[1:] for extension in EXTENSIONS)
LONGEST = 1 << 20  # bytes of a label's file
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}

Index = dict[str, Any]
"""size and mtime of the shard; `images`: [name, offset, length, kind, label] each, label a number, a text or None;
`skipped`: {ending: number of members}."""


def index_of(shard: str) -> tuple[Index, bool]:
    """(the index of a shard, whether it had to be made). Raises UserError for a damaged shard."""
    try:
        status = os.stat(shard)
    except OSError as error:
        raise UserError(f"{shard!r} cannot be read ({error.strerror})") from None
    stamp = {"version": VERSION, "size": status.st_size, "mtime": status.st_mtime_ns}
    kept = cache_folder() / f"{hashlib.blake2b(os.fsencode(os.path.abspath(shard)), digest_size=16).hexdigest()}.json"
    try:
        found = json.loads(kept.read_bytes())
        if {name: found[name] for name in stamp} == stamp:
            return found, False
    except (OSError, ValueError, KeyError, TypeError):  # none yet, or one that was cut off
        pass
    index = stamp | scan_shard(shard)
    _keep(kept, index)
    return index, True


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastkd" / "shards"


def _keep(path: Path, index: Index) -> None:
    """Write the index; where this is not possible, the next run makes it again."""
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps(index))
        os.replace(beside, path)
    except OSError:
        with suppress(OSError):
            beside.unlink()


def scan_shard(shard: str) -> Index:
    """`images` and `skipped` of a shard. Raises UserError if it is damaged, or if its samples are."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    skipped: dict[str, int] = {}
    with opened(shard) as stream:
        for name, offset, length in _members(shard, stream):
            key, ending = _split_name(name)
            if _is_wanted(ending):
                if ending in samples.setdefault(key, {}):
                    raise UserError(f"{shard!r} has two members named {name!r}: keep one")
                samples[key][ending] = offset, length
            else:
                skipped[ending] = skipped.get(ending, 0) + 1
        return {"images": _images(shard, stream, samples), "skipped": skipped}


class _Headers(io.BufferedReader):
    """A tar file of which no more is read at once than a long name takes: a header may claim one of any length."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= LONGEST:
            raise tarfile.ReadError(f"a header claims {size:,} bytes")
        return super().read(size)


def opened(shard: str) -> BinaryIO:
    """The file, with a buffer. Raises UserError if it cannot be opened, or is no file."""
    try:
        return _Headers(open_file(shard))
    except OSError as error:
        raise UserError(f"{shard!r} cannot be read ({error.strerror})") from None


def _members(shard: str, stream: BinaryIO) -> list[tuple[str, int, int]]:
    """(name, offset, length) of every file in the tar. Links, devices, folders and sparse files are left out."""
    head, size = stream.read(2), os.fstat(stream.fileno()).st_size
    if head in COMPRESSED:
        raise UserError(
            f"{shard!r} is compressed ({COMPRESSED[head]}), and images are read by their place: unpack it to a .tar"
        )
    stream.seek(0)
    members = []
    try:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            while (member := tar.next()) is not None:
                if member.isreg() and not member.issparse():
                    members.append((member.name, member.offset_data, member.size))
            end = tar.offset
    except (tarfile.TarError, ValueError, OverflowError, OSError) as error:
        raise UserError(f"{shard!r} is no tar file, or is damaged ({error}): get it again") from None
    stream.seek(end)
    last = max((offset + length for _, offset, length in members), default=0)
    if last > size or stream.read(512).strip(b"\0") or end >= size:
        raise UserError(
            f"{shard!r} was cut off or is damaged at byte {min(end, size):,} of {size:,}: no mark of the end "
            "follows; get it again"
        )
    return members


def _split_name(name: str) -> tuple[str, str]:
    """(key, ending) of a member, as in WebDataset: a/b.left.JPG is ("a/b", "left.jpg")."""
    folder, slash, base = name.rpartition("/")
    stem, _, ending = base.partition(".")
    return folder + slash + stem, ending.lower()


def _is_wanted(ending: str) -> bool:
    return ending in ("cls", "json") or ending in ENDINGS


def _images(shard: str, stream: BinaryIO, samples: dict[str, dict[str, tuple[int, int]]]) -> list[list[Any]]:
    """The rows of the index. Raises UserError for keys with several images or none."""
    alone = [key for key, parts in samples.items() if not parts.keys() & {*ENDINGS}]
    if alone:
        raise UserError(
            f"{shard!r}: {len(alone):,} labels have no image ({some(alone)}): remove them, or add the image"
        )
    images = []
    for key, parts in samples.items():
        endings = [ending for ending in parts if ending in ENDINGS]
        if len(endings) > 1:
            raise UserError(f"{shard!r} has {len(endings)} images of the key {key!r} ({', '.join(endings)}): keep one")
        offset, length = parts[endings[0]]
        stream.seek(offset)
        kind = image_kind(stream.read(min(16, length))) or UNKNOWN
        label = _label(f"{shard!r}: {shown(key)}", stream, parts)
        images.append([f"{key}.{endings[0]}", offset, length, kind, label])
    return images


def _label(name: str, stream: BinaryIO, parts: dict[str, tuple[int, int]]) -> int | str | None:
    """A number or a text; None if there is none. Raises UserError if it cannot be read."""
    for ending in ("cls", "json"):
        if ending not in parts:
            continue
        offset, length = parts[ending]
        if length > LONGEST:
            raise UserError(f"{name}.{ending} has {length:,} bytes, which is no label")
        stream.seek(offset)
        try:
            text = stream.read(length).decode().strip()
            label = text if ending == "cls" else json.loads(text)["label"]
        except KeyError:
            continue
        except (ValueError, TypeError, RecursionError):
            raise UserError(f"{name}.{ending} cannot be read as a label: repair it") from None
        if isinstance(label, bool) or not isinstance(label, (int, str)) or label == "":
            raise UserError(f"{name}.{ending} has the label {label!r:.60}: a label is a number or a text")
        return int(label) if isinstance(label, str) and label.isascii() and label.isdigit() else label
    return None
