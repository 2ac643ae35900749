"""What a packed folder holds, and how it is checked.

    manifest.json     what was packed and how: kind, size, quality, classes, and of each shard its images, bytes and
                      BLAKE2b checksum
    train.npz         of each image: label, size before it was packed (height, width), name
    train-00000.npy   kind "pixels": uint8 [n, S, S, 3], the whole picture resized to a square, antialiased
    train-00000.tar   kinds "jpeg" and "files": a tar shard of WebDataset; classes.json has the names of the classes
    val...            the same

A box is drawn for the picture's own size and scaled to the square, so the crop is the one that the picture itself would
give: nothing is cut off and nothing is distorted. What is lost is resolution along the longer side.
"""

import os
from dataclasses import dataclass
from hashlib import blake2b
from os.path import isfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..foreign import check_stored, open_file, parse_json, read_bytes
from .walk import shown, some

FORMAT, VERSION = "fastkd-pack", 1
MANIFEST = "manifest.json"
WORK = ".pack"  # the folder of a pack that is not complete
LONGEST = 256 << 20  # bytes of a manifest; that of 100,000 shards has 20 MB
CHUNK = 1 << 20  # bytes that are read at once for a checksum

Manifest = dict[str, Any]


@dataclass(frozen=True)
class PackedPart:
    """The images of train/ or val/ as pixels."""

    folder: str
    classes: tuple[str, ...]
    side: int  # pixels
    labels: Tensor  # int64 [N]
    sizes: Tensor  # int64 [N, 2]: height and width of the pictures before they were packed
    shards: tuple[str, ...]  # paths
    per_shard: int  # images of every shard but the last
    known: str = ""  # the name of the data set, if it has one


def read_manifest(folder: str | Path) -> Manifest | None:
    """The manifest of a packed folder; None if the folder is no such. Raises UserError if it cannot be used."""
    path = Path(folder) / MANIFEST
    if not os.path.isfile(path):  # False for a name that is too long, where Path.is_file raises OSError
        return None
    try:
        manifest = parse_json(read_bytes(path, LONGEST))
    except (OSError, ValueError) as error:
        raise UserError(f"{str(path)!r} cannot be read ({error}): pack the images again, or remove it") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        return None  # of another program
    if manifest.get("version") != VERSION:
        raise UserError(
            f"{str(path)!r} has the version {manifest.get('version')!r} of packed images and this fastkd reads "
            f"{VERSION}: pack the images again"
        )
    if not _is_sound(manifest):
        raise UserError(f"{str(path)!r} is damaged: pack the images again")
    return manifest


def _is_sound(manifest: Manifest) -> bool:
    """True if all that is read from it is there and of its type. No name of a file leads out of the folder."""
    try:
        parts, classes = manifest["parts"].values(), manifest["classes"]
        shards = [shard for part in parts for shard in part["shards"]]
        files = [*shards, *(part["index"] for part in parts)]
        names = [file["file"] for file in files]
        numbers = [
            manifest["size"],
            *(each["images"] for each in (*parts, *shards)),
            *(file["bytes"] for file in files),
        ]
        texts = [manifest["kind"], manifest["known"], *classes, *names, *(file["blake2b"] for file in files)]
        texts += [part["source"] for part in parts]
    except (KeyError, TypeError, AttributeError):
        return False
    are_right = all(isinstance(text, str) for text in texts) and all(type(number) is int for number in numbers)
    return are_right and isinstance(classes, list) and not any("/" in name or name.startswith(".") for name in names)


def refuse_unfinished(folder: str | Path) -> None:
    """Raise UserError if a pack was begun in the folder and is not complete."""
    if isfile(Path(folder) / WORK / "plan.json") and not isfile(Path(folder) / MANIFEST):  # False for overlong names
        raise UserError(
            f"{shown(str(folder))} holds a pack that is not complete: run the same `fastkd pack` again, which goes on "
            "after its complete shards"
        )


def whole_shards(folder: Path, manifest: Manifest) -> dict[str, dict[str, Any]]:
    """What pack_shard.py notes of a shard, by its file, for all shards that have the length in the manifest."""
    notes = {}
    for part in manifest["parts"].values():
        try:
            sizes, first = read_index(str(folder / part["index"]["file"]))[1].tolist(), 0
        except UserError:  # the sizes of the pictures are lost: all shards of the part are written again
            continue
        for shard in part["shards"]:
            path, images = folder / shard["file"], shard["images"]
            if path.is_file() and path.stat().st_size == shard["bytes"]:
                notes[path.name] = {name: shard[name] for name in ("images", "bytes", "blake2b")}
                notes[path.name]["sizes"] = sizes[first : first + images]
            first += images
    return notes


def check_sizes(folder: str | Path, manifest: Manifest) -> None:
    """Raise UserError, with the names, if a file of the pack is missing or has not the length that is noted."""
    _refuse(folder, wrong_sizes(folder, manifest))


def wrong_sizes(folder: str | Path, manifest: Manifest) -> list[str]:
    """What is wrong with the files of the pack, as far as their lengths tell."""
    wrong = []
    for name, noted in _files(manifest):
        try:
            size = os.path.getsize(Path(folder) / name)
        except OSError:
            wrong.append(f"{name} is missing")
            continue
        if size != noted["bytes"]:
            wrong.append(f"{name} has {size:,} bytes instead of {noted['bytes']:,}")
    return wrong


def check_content(folder: str | Path, manifest: Manifest, tick: Any = lambda size: None) -> None:
    """Raise UserError, with the names, if a file of the pack has another checksum. tick(bytes) after each file."""
    check_sizes(folder, manifest)
    wrong = []
    for name, noted in _files(manifest):
        if checksum(Path(folder) / name) != noted["blake2b"]:
            wrong.append(f"{name} has another content")
        tick(noted["bytes"])
    _refuse(folder, wrong)


def _files(manifest: Manifest) -> list[tuple[str, dict[str, Any]]]:
    """(name, {bytes, blake2b}) of every file that the manifest notes."""
    parts = manifest["parts"].values()
    noted = [*(shard for part in parts for shard in part["shards"]), *(part["index"] for part in parts)]
    return [(file["file"], file) for file in noted]


def _refuse(folder: str | Path, wrong: list[str]) -> None:
    if wrong:
        raise UserError(
            f"packed images in {shown(str(folder))}: {some(wrong, quote=False)}; remove these files and run the "
            "same `fastkd pack` again, which writes them anew, or copy the folder again"
        )


def checksum(path: Path) -> str:
    digest = blake2b(digest_size=32)
    with open(path, "rb", buffering=0) as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def write_atomic(path: Path, content: bytes) -> None:
    """The file is there with all of `content`, or not at all."""
    beside = path.with_name(f".{path.name}.unfinished")
    with open(beside, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(beside, path)


def packed_parts(folder: str) -> dict[str, PackedPart] | None:
    """{"train": ..., "val": ...} of a folder of packed pixels; None if it holds something else.

    Raises UserError if a file is missing or has another length.
    """
    refuse_unfinished(folder)
    manifest = read_manifest(folder) if os.path.isdir(folder) else None
    if manifest is None or manifest.get("kind") != "pixels":
        return None
    check_sizes(folder, manifest)
    try:
        return {name: _part(folder, name, manifest) for name in manifest["parts"]}
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"{MANIFEST} of {shown(folder)} is damaged ({error!r:.80}): pack the images again") from None


def _part(folder: str, name: str, manifest: Manifest) -> PackedPart:
    part, side = manifest["parts"][name], manifest["size"]
    labels, sizes, _ = read_index(os.path.join(folder, part["index"]["file"]))
    counts = [shard["images"] for shard in part["shards"]]
    per_shard = counts[0] if counts else 1
    shards = tuple(os.path.join(folder, shard["file"]) for shard in part["shards"])
    lengths = {os.path.getsize(path) - count * side * side * 3 for path, count in zip(shards, counts, strict=True)}
    fits = len(labels) == len(sizes) == sum(counts) and {*counts[:-1]} <= {per_shard} and lengths <= {HEADER}
    if (
        not fits
        or (len(labels) and not 0 <= labels.min() <= labels.max() < len(manifest["classes"]))
        or (sizes < 1).any()
    ):
        raise UserError(f"{shown(folder)}: {MANIFEST} and the shards for {name} do not fit: pack the images again")
    return PackedPart(folder, tuple(manifest["classes"]), side, labels, sizes, shards, per_shard, manifest["known"])


HEADER = 128  # bytes before the pixels in a .npy file whose header is short


def read_index(path: str) -> tuple[Tensor, Tensor, list[str]]:
    """(labels int64 [N], sizes int64 [N, 2], names) of train.npz. Nothing is unpickled."""
    try:
        with open_file(path) as stream:
            check_stored(stream)
            with np.load(stream, allow_pickle=False) as arrays:
                labels, sizes = (torch.from_numpy(arrays[name].astype(np.int64)) for name in ("labels", "sizes"))
                names = parse_json(arrays["names"].tobytes())
    except Exception as error:  # of zipfile, zlib and numpy: anything
        raise UserError(f"{path!r} cannot be read ({error}): pack the images again") from None
    return labels, sizes.reshape(-1, 2), names
