"""What is packed: the images of a folder, of shards, or of a data set that has a name; and one of them, packed."""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from ..errors import UserError
from .chosen import stored_chosen
from .decode import MAX_PIXELS, check_resized, open_image
from .layout import training_splits
from .options import NAMES, DataOptions
from .pack_format import read_manifest
from .scan import Split
from .stored import OwnFiles, Pictures

Kind = Literal["pixels", "jpeg", "files"]
Log = Callable[[str], None]


class Pixels:
    """Images that are in memory: those of a data set with a name. Has what Pictures has."""

    def __init__(self, images: Tensor):
        self.images = images  # uint8 [N, H, W, 1 or 3]

    def decode(self, i: int, exif: bool = False) -> Tensor:
        return self.images[i].expand(-1, -1, 3).permute(2, 0, 1)

    def read(self, i: int) -> bytes:
        raise UserError("these images are no files: pack them as pixels, without --jpeg-quality and --keep-files")


@dataclass(frozen=True)
class Part:
    """The images of train/ or val/."""

    pictures: Pictures | Pixels
    labels: list[int]
    names: list[str]
    lengths: np.ndarray  # int64 [N], bytes of each image before it is packed
    formats: tuple[str, ...] = ()  # kinds of the files, as far as they are known

    def digest(self) -> str:
        """Depends on the names, labels and lengths of all images."""
        text = json.dumps([self.names, self.labels])
        return blake2b(text.encode() + self.lengths.tobytes(), digest_size=16).hexdigest()


def read_source(options: DataOptions, log: Log) -> tuple[tuple[str, ...], dict[str, Part]]:
    """(the names of the classes, {"train": ..., "val": ...}). A source with one of the two gives that one.

    Raises UserError for a source without images to pack, and for one that the options cannot divide or choose from.
    """
    if options.data == "synthetic":
        raise UserError("--data synthetic holds no images: nothing to pack")
    if (found := read_manifest(options.data)) is not None and found.get("kind") == "pixels":
        raise UserError(f"--data {options.data!r} holds packed pixels already: pack the images they were made from")
    if options.data in NAMES:
        return _named(options, log)
    splits = None if options.val_fraction else stored_chosen(options, log)
    splits = splits or training_splits(options, log)
    if "" in splits:
        raise UserError(
            f"--data {options.data!r} does not say which images are for training: add --val-fraction 0.1, or let the "
            "names of the shards hold the word train or val"
        )
    return next(iter(splits.values())).classes, {
        name: part_of(split, options.data, options.max_pixels) for name, split in splits.items()
    }


def part_of(split: Split, root: str, max_pixels: int = MAX_PIXELS) -> Part:
    """The images of a split. Their names are those of the files, below `root`."""
    places = OwnFiles(split.files) if split.places is None else split.places
    names = [file.removeprefix(root).lstrip("/") for file in split.files]
    return Part(
        Pictures(split.files, split.places, max_pixels), split.labels, names, places.lengths(), tuple(split.formats)
    )


def check_place(destination: str, source: str, parts: dict[str, Part]) -> None:
    """Raise UserError if the packed images would lie among the folders of the classes, or among the shards."""
    files = [Path(part.pictures.name(0)) for part in parts.values() if isinstance(part.pictures, Pictures)]
    if any(file.absolute().parents[1] in Path(destination).absolute().parents for file in files):
        raise UserError(
            f"{destination!r} lies among the classes or shards of {source!r}, and would be one of them later: name a "
            "folder elsewhere"
        )


def _named(options: DataOptions, log: Log) -> tuple[tuple[str, ...], dict[str, Part]]:
    from .small_sets import read_small_set, side_of

    options = replace(options, image_size=side_of(options, options.data, log))
    parts = {}
    for name in ("train", "val"):
        found = read_small_set(options, options.data, name == "train", log)
        lengths = np.full(len(found.images), found.images[0].numel(), dtype=np.int64)
        names = [f"{options.data}/{name}/{i}" for i in range(len(found.images))]
        parts[name] = Part(Pixels(found.images), found.target.tolist(), names, lengths)
    return found.classes, parts


def squared(pixels: Tensor, side: int) -> Tensor:
    """uint8 [side, side, 3] of uint8 [3, H, W]: the whole picture, resized with antialiasing."""
    if pixels.shape[1:] != (side, side):
        pixels = F.resize(pixels, [side, side], antialias=True)
    return pixels.permute(1, 2, 0).contiguous()


def smaller_jpeg(pixels: Tensor, side: int, quality: int) -> bytes:
    """A JPEG of uint8 [3, H, W] whose shorter side is at most `side`; 4:2:0 chroma, as Pillow's default."""
    if min(pixels.shape[1:]) > side:
        check_resized((pixels.shape[2], pixels.shape[1]), side)
        pixels = F.resize(pixels, [side], antialias=True)
    buffer = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def header_size(data: bytes) -> tuple[int, int]:
    """(height, width) in the header of an image. Raises ValueError or OSError for a damaged one."""
    with open_image(io.BytesIO(data)) as image:
        return image.size[1], image.size[0]
