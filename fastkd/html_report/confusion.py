"""The confusion matrix of a network, and the pairs of classes that it takes for one another."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .pictures import picture_uri

MOST_CELLS = 20  # classes a side; up to here each count is written
MOST_PIXELS = 250  # classes a side; with more, several classes share a pixel
CELL, GAP, LETTER, MARGIN = 30, 2, 6.6, 14  # pixels: of a cell with its gap, of the gap, of a letter, around the names
LONGEST = 14  # letters of a name beside a cell
RIGHT, WRONG = (46, 110, 210), (214, 84, 32)  # colours of the pixels, for light and dark pages


@dataclass(frozen=True)
class Cell:
    x: float
    y: float
    count: int
    share: float  # of the images of the true class, scaled so that single images can be seen
    right: bool
    tip: str


@dataclass(frozen=True)
class Pair:
    """Images of the class `true` that were taken for `predicted`; `share` in % of the images of the class."""

    true: str
    predicted: str
    count: int
    share: float
    length: float  # of its bar, as a share of the longest


class Name(NamedTuple):
    place: float
    short: str
    full: str


@dataclass(frozen=True)
class Matrix:
    """Few classes: `cells` and `names` of a drawing of `size` pixels a side, of which `left` is for the names.

    Many classes: `picture`, a data URI, of which each pixel stands for `step` x `step` classes.
    """

    classes: int
    pairs: list[Pair]
    size: float = 0
    left: float = 0
    cells: Sequence[Cell] = ()
    names: Sequence[Name] = ()
    picture: str = ""
    step: int = 1


def matrix_of(target: Tensor, prediction: Tensor, classes: Sequence[str]) -> Matrix:
    """The matrix of classes [N] int64 on the CPU: rows are the true classes, columns the predictions."""
    pairs = _pairs(target, prediction, classes, 10 if len(classes) <= MOST_CELLS else 30)
    if len(classes) > MOST_CELLS:
        step = -(-len(classes) // MOST_PIXELS)
        uri = picture_uri(_pixels(_counts(target // step, prediction // step, -(-len(classes) // step))))
        return Matrix(len(classes), pairs, picture=uri, step=step)
    names = [name if len(name) <= LONGEST else name[: LONGEST - 1] + "…" for name in classes]
    left = MARGIN + LETTER * max(map(len, names))
    places = [left + CELL * (i + 0.5) for i in range(len(classes))]
    labels = [Name(*each) for each in zip(places, names, classes, strict=True)]
    cells = _cells(_counts(target, prediction, len(classes)), classes, left)
    return Matrix(len(classes), pairs, left + CELL * len(classes) + 1, left, cells, labels)


def _counts(target: Tensor, prediction: Tensor, classes: int) -> Tensor:
    """[classes, classes] int64."""
    return torch.bincount(target * classes + prediction, minlength=classes**2).view(classes, classes)


def _scaled(counts: Tensor) -> Tensor:
    """The root of each row's shares: 1 image of 100 is as strong as a tenth of all."""
    return (counts / counts.sum(1, keepdim=True).clamp_min(1)).sqrt()


def _cells(counts: Tensor, classes: Sequence[str], left: float) -> list[Cell]:
    shares = _scaled(counts).tolist()
    cells = []
    for true, row in enumerate(counts.tolist()):
        for predicted, count in enumerate(row):
            tip = f"{classes[true]}, predicted {classes[predicted]}: {count:,} of {sum(row):,}"
            place = left + CELL * predicted, left + CELL * true
            cells.append(Cell(*place, count, round(shares[true][predicted], 3), true == predicted, tip))
    return cells


def _pixels(counts: Tensor) -> Tensor:
    """Bytes [C, C, 4]: a colour for what is right and one for what is wrong, the more opaque the more there is."""
    opacity = (_scaled(counts) * 255).round().byte()
    colours = torch.tensor([WRONG, RIGHT], dtype=torch.uint8)[torch.eye(len(counts), dtype=torch.int64)]
    return torch.cat([colours, opacity[..., None]], 2).contiguous()


def _pairs(target: Tensor, prediction: Tensor, classes: Sequence[str], most: int) -> list[Pair]:
    """The most frequent confusions; among equals, those of the smaller classes."""
    wrong = target != prediction
    codes, counts = torch.unique(target[wrong] * len(classes) + prediction[wrong], return_counts=True)
    sizes = torch.bincount(target, minlength=len(classes)).tolist()
    frequent = zip(codes.tolist(), counts.tolist(), strict=True)
    found = [(code // len(classes), code % len(classes), count) for code, count in frequent]
    found = sorted(found, key=lambda each: (-each[2], sizes[each[0]]))[:most]
    return [
        Pair(classes[true], classes[predicted], count, 100 * count / sizes[true], count / found[0][2])
        for true, predicted, count in found
    ]
