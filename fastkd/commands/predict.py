"""`fastkd predict IMAGE...`: the classes of pictures, by trained weights."""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, make_dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.decode import REMEDY
from ..data.walk import EXTENSIONS, Found, files_below, shown
from ..distributed import device_for
from ..errors import UserError, printable
from ..parser import run_parser, split_words
from ..report import show_table
from ..trained import Trained, load_trained
from ..weights_file import check_input

USAGE = """\
usage: fastkd predict IMAGE... --weights RUN [OPTIONS]

IMAGE is a picture, or a folder: then all pictures in it, at any depth.
RUN is a run folder, whose student.safetensors is taken, or a weights file.
Exit status: 2 if a picture cannot be read. The others are predicted, and each bad one is a line on stderr.
"""
BATCH = 32  # images per forward pass


@dataclass(frozen=True)
class PredictOptions:
    """Which network, and what to show. Pictures are decoded, resized, cropped and normalised as in evaluation."""

    weights: str
    """A run folder, its student.safetensors or its best.pt. It names the network, the classes and their images."""
    top: int = 5
    """Classes to show for each picture, the most probable first."""
    json: bool = False
    """Print one JSON list instead of a table: [{"image", "predictions": [{"class", "index", "probability"}]}]. A
    picture that cannot be read has "error" in the place of "predictions"."""
    model: str = ""
    """The network's name, if the file has none."""
    classes: tuple[str, ...] = ()
    """The names of the classes in the order of the logits, or their number, if the file has none."""
    image_size: int = 0
    """Side of the network's images, in pixels, if the file does not say it."""
    mean: tuple[float, ...] = ()
    """Mean of each channel of images in [0, 1], if the file does not say it."""
    std: tuple[float, ...] = ()
    """Standard deviation of each channel, if the file does not say it."""
    crop_pct: float = 0.0
    """Fraction of the shorter side that the centre crop keeps, if the file does not say it; 0: 0.875."""
    device: str = "auto"
    """cuda, cpu, or auto: CUDA when there is one."""

    def __post_init__(self) -> None:
        if self.top < 1:
            raise UserError(f"--top {self.top}: give at least 1")
        try:
            check_input({name: value for name, value in self.images.items() if value})
        except ValueError as error:
            raise UserError(f"the options of the images cannot be used: {error}") from None

    @property
    def images(self) -> dict[str, Any]:
        """What is given of the images that the network takes."""
        numbers = {"mean": list(self.mean), "std": list(self.std)}
        return {"image_size": self.image_size, "crop_pct": self.crop_pct} | numbers


Row = dict[str, Any]  # of one picture, as --json shows it


def run(arguments: list[str]) -> None:
    """The command: a table, or JSON. Exit status 2 if a picture was bad."""
    kind = make_dataclass("Predict", [("predict", PredictOptions)], frozen=True)
    if "--help" in arguments or "-h" in arguments:
        print(USAGE)
    places, given = split_words(arguments, kind)
    options: PredictOptions = run_parser(kind, given, "fastkd predict IMAGE...").predict
    if not places:
        raise UserError("predict needs pictures or folders: fastkd predict IMAGE... --weights FILE")
    trained = load_trained(Path(options.weights), options.model, classes=options.classes, **options.images)
    rows = list(_predictions(_pictures(places), trained, options))
    if options.json:
        print(json.dumps(rows, indent=2))
    elif good := [row for row in rows if "error" not in row]:
        _show(good)
    if len(rows) > sum("predictions" in row for row in rows):
        sys.exit(2)


def _pictures(places: list[str]) -> Iterator[Row]:
    """{"image": file} for each picture; with "error" for a place where there is none."""
    for place in places:
        if not os.path.exists(place):
            yield {"image": place, "error": f"{place!r} does not exist: give a picture or a folder of pictures"}
            continue
        if not os.path.isdir(place):
            yield {"image": place}
            continue
        found = Found()
        files = files_below(place, found)
        for note in found.notes(place):
            _complain(note)
        yield from ({"image": file} for file in files)
        yield from ({"image": file, "error": f"{file!r} {problem}"} for file, problem in found.wrong)
        if not files and not found.wrong:
            yield {"image": place, "error": f"{place!r} holds no pictures, which end in {' '.join(EXTENSIONS)}"}


def _predictions(rows: Iterator[Row], trained: Trained, options: PredictOptions) -> Iterator[Row]:
    """The rows with their predictions or errors. Errors are printed as they are met."""
    device = device_for(options.device)
    trained.net.to(device)
    while batch := list(islice(rows, BATCH)):
        images = [_read(row, trained) for row in batch]
        read = [image for image in images if image is not None]
        logits = _logits(torch.stack(read).to(device), trained) if read else torch.empty(0)
        numbers = iter(logits)
        for row, image in zip(batch, images, strict=True):
            if image is not None:
                row |= _best(next(numbers), trained.classes, options.top)
            if "error" in row:
                _complain(row["error"])
            yield row


def _read(row: Row, trained: Trained) -> Tensor | None:
    """uint8 [size, size, 3], or None, and the reason in the row."""
    try:
        return None if "error" in row else trained.preprocess.read(row["image"])
    except UserError as error:
        row["error"] = str(error).removesuffix(REMEDY)
        return None


@torch.inference_mode()
def _logits(images_NHWC: Tensor, trained: Trained) -> Tensor:
    """float32 [N, classes] on the CPU"""
    return trained.net(trained.preprocess.normalise(images_NHWC)).float().cpu()


def _best(logits: Tensor, classes: tuple[str, ...], top: int) -> Row:
    if not bool(logits.isfinite().all()):
        return {"error": "the network gives numbers that are not finite for a picture: its weights are damaged"}
    best = logits.softmax(0).topk(min(top, len(classes)))
    pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
    return {"predictions": [{"class": classes[i], "index": i, "probability": value} for value, i in pairs]}


def _show(rows: list[Row]) -> None:
    lines = []
    for row in rows:
        for place, each in enumerate(row["predictions"]):
            name = "" if place else shown(row["image"])
            lines.append([name, shown(each["class"]), f"{100 * each['probability']:.2f}"])
    show_table(["image", "class", "probability %"], lines, numbers=1)


def _complain(message: str) -> None:
    print(f"fastkd: {printable(message, getattr(sys.stderr, 'encoding', None))}", file=sys.stderr, flush=True)
