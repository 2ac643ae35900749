"""Packed images that are small and of one size are kept in memory, as those of a folder are (small_folder.py)."""

from typing import TYPE_CHECKING

import numpy as np
import torch

from ..errors import UserError, as_typed
from .base import IMAGENET_MEAN, IMAGENET_STD
from .loader_options import given, refuse
from .options import OVER_RECIPE, needs_resident
from .pack_format import PackedPart
from .resident import ResidentSet
from .small_folder import LARGEST
from .small_sets import SMALL_SETS, SmallSet
from .walk import shown

if TYPE_CHECKING:
    from .options import DataOptions

USUAL = SmallSet("", (), IMAGENET_MEAN, IMAGENET_STD, "reflect", True)  # as for a folder of small images


def check_packed(options: "DataOptions", parts: dict[str, PackedPart], names: tuple[str, ...]) -> None:
    """Raise UserError if a part is missing, or for options that packed images cannot follow."""
    folder = shown(options.data)
    if missing := [name for name in names if name not in parts]:
        raise UserError(
            f"--data {options.data!r} holds packed images for {' and '.join(parts)} and none for "
            f"{' and '.join(missing)}: pack a source that has both, or give `fastkd pack` --val-fraction 0.1"
        )
    if options.loader in ("dali", "folder"):
        raise UserError(f"--loader {options.loader} decodes files, and {folder} holds pixels: take --loader auto")
    refuse(options, "packed", f"{folder} holds packed pixels")
    for name, remedy in (
        ("val_fraction", "give it to `fastkd pack`"),
        ("unlabelled", "drop it, or train on the folder of images"),
        ("exif", "give it to `fastkd pack`"),
    ):
        if value := getattr(options, name):
            raise UserError(f"{as_typed(name, value)} is not for packed images, and {folder} holds such: {remedy}")


def read_small_pack(
    parts: dict[str, PackedPart], options: "DataOptions"
) -> tuple[dict[str, ResidentSet], SmallSet] | None:
    """(the images in memory, what is usual for them), or None for images that are cropped from the shards.

    None too with another image_size than theirs. Raises UserError for options that only images in memory can follow.
    """
    side = next(iter(parts.values())).side
    is_small = side <= LARGEST and all(bool((part.sizes == side).all()) for part in parts.values())
    other = given(options, "resident")
    if not is_small or options.image_size not in (0, side) or other:
        if asked := needs_resident(options):
            reason = f"--image-size {options.image_size}, and they have {side}" if is_small else f"they have {side}"
            reason = f"{other} is not for those" if other else reason
            if not is_small and side <= LARGEST:
                reason = f"these were resized to {side} from other sizes when they were packed"
            raise UserError(
                f"{asked} is for images in memory, squares of one size of at most {LARGEST} pixels; {reason}: drop it "
                f"({OVER_RECIPE})"
            )
        return None
    known = SMALL_SETS.get(next(iter(parts.values())).known, USUAL)
    return {name: _read(part) for name, part in parts.items()}, known


def _read(part: PackedPart) -> ResidentSet:
    try:
        shards = [np.load(path, allow_pickle=False) for path in part.shards]
    except (OSError, ValueError, MemoryError) as error:
        raise UserError(f"packed images in {shown(part.folder)} cannot be read ({error}): pack them again") from None
    return ResidentSet(part.classes, torch.from_numpy(np.concatenate(shards)), part.labels)
