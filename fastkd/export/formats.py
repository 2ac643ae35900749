"""The formats by name, and `export`, which writes several of them."""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from ..errors import UserError, nearest
from ..files import sync_folder
from ..trained import Trained
from . import hf, int8, library, onnx, program
from .verify import difference

Write = Callable[[Trained, Path, Tensor | None], nn.Module]
"""Writes a network to a path and reads it back. The tensor is the images that int8 is calibrated with."""


@dataclass(frozen=True)
class Format:
    """A kind of file, or of folder."""

    file: str  # its name in the folder of the export
    tolerance: float  # of the logits, as a fraction of the largest
    check: Callable[[Trained], None]  # raises UserError for a network that it is not for, and for a missing library
    write: Write


FORMATS = {
    "timm": Format("timm.safetensors", 1e-5, library.check_timm, library.write_timm),
    "torchvision": Format("torchvision.safetensors", 1e-5, library.check_torchvision, library.write_torchvision),
    "hf": Format("hf", 1e-5, hf.check, hf.write),
    "onnx": Format("model.onnx", 1e-3, onnx.check, onnx.write),
    "torch-export": Format("model.pt2", 1e-5, program.check, program.write),
    "int8": Format("model-int8.pt2", 0.5, int8.check, int8.write),  # only a broken file is that far away
}


@dataclass(frozen=True)
class Exported:
    """What was written."""

    name: str  # of the format
    path: Path
    size: int  # bytes
    difference: float  # of the logits, as a fraction of the largest
    net: nn.Module  # as it was read from the file


def check_formats(trained: Trained, names: Sequence[str], out: Path) -> None:
    """Raise UserError if a format is not known or not for this network, a library is missing, or a file is there."""
    if unknown := next((name for name in names if name not in FORMATS), None):
        raise UserError(f"--format {unknown}: give some of {', '.join(FORMATS)}{nearest(unknown, FORMATS)}")
    for name in dict.fromkeys(names):
        FORMATS[name].check(trained)
        if os.path.lexists(path := out / FORMATS[name].file):
            raise UserError(f"--out {out}: {path} is there already; remove it, or choose another folder")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; choose a folder")


def export(trained: Trained, names: Sequence[str], out: str | Path, images: Tensor | None = None) -> list[Exported]:
    """Write the network in these formats into the folder `out`: all of them, or nothing.

    Each is read again and compared before it gets its name. `images`: float32 [N, 3, H, W], normalised, for int8.
    Raises UserError if a file cannot be written, or differs.
    """
    names, out = [names] if isinstance(names, str) else names, Path(out)
    check_formats(trained, names, out)
    unfinished = out / ".export.tmp"
    try:
        shutil.rmtree(unfinished, ignore_errors=True)  # of an export that was killed
        unfinished.mkdir(parents=True)
        written = [_write(trained, name, unfinished, images) for name in dict.fromkeys(names)]
        for each in written:
            os.replace(each.path, out / each.path.name)
        sync_folder(out)
    except OSError as error:
        raise UserError(
            f"cannot write to --out {out}: {error.strerror or error}; make room or choose another"
        ) from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return [replace(each, path=out / each.path.name) for each in written]


def _write(trained: Trained, name: str, folder: Path, images: Tensor | None) -> Exported:
    kind = FORMATS[name]
    path = folder / kind.file
    net = kind.write(trained, path, images)
    gap = difference(trained.net, net, trained.preprocess.image_size)
    if not gap <= kind.tolerance:  # NaN is refused too
        raise UserError(
            f"--format {name}: the logits of what was written differ by {gap:.1e} of the largest, and "
            f"{kind.tolerance:.0e} is allowed; nothing is kept: leave this format out"
        )
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    for file in files:
        with file.open("rb") as content:
            os.fsync(content.fileno())
    return Exported(name, path, sum(file.stat().st_size for file in files), gap, net)
