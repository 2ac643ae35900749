"""What the readers of the small data sets share: what they found, and the MD5 of bytes."""

import hashlib
import os
from typing import NamedTuple

import numpy as np

from ..errors import UserError, no_folder
from .walk import some


class FoundSet(NamedTuple):
    """Images uint8 [N, H, W, C] and target int64 [N] of one part of a data set; where they are from."""

    classes: tuple[str, ...]
    images: np.ndarray
    target: np.ndarray
    source: str  # a file or a folder
    checked: str  # how its content was verified


def md5_of(data: bytes) -> str:
    """In hexadecimal."""
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def check_md5(data: bytes, wanted: str, what: str) -> None:
    """Raise UserError unless the bytes have this MD5. `what` names the file."""
    found = md5_of(data)
    if found != wanted:
        raise UserError(
            f"{what} is not the published file: its MD5 is {found}, expected {wanted} ({len(data):,} bytes); it is "
            "damaged or another data set, so download it again"
        )


def check_target(target: np.ndarray, classes: int, what: str) -> None:
    """Raise UserError for labels that are no classes."""
    if len(target) and not 0 <= target.min() <= target.max() < classes:
        wrong = target[(target < 0) | (target >= classes)][0]
        raise UserError(f"{what} holds the label {wrong}, and there are {classes} classes (0 to {classes - 1})")


def holds(folder: str) -> str:
    """What is in a folder, for an error. Raises UserError if there is no such folder."""
    if not os.path.isdir(folder):
        raise UserError(f"--data-dir {folder!r}: {no_folder(folder)}; give the one with the files of the data set")
    return some(sorted(os.listdir(folder))) or "nothing"
