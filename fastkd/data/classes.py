"""Class names: those that a weights file notes, against those of the data."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..errors import UserError
from .base import Loader
from .walk import some


def class_order(noted: Sequence[str], found: Sequence[str], source: str, ignore: bool = False) -> list[int] | None:
    """For each class `found` in the data, its position in the classes `noted` in the weights; None if they are equal.

    The data may lack some of the classes. With `ignore` names do not count, and classes belong together by position.
    Raises UserError, which names the `source` of the weights, for other names or, with `ignore`, another number.
    """
    if ignore and len(noted) != len(found):
        raise UserError(
            f"--ignore-class-names: {source} has {len(noted)} classes and the data {len(found)}: by position, their "
            "numbers must be equal"
        )
    places = {name: place for place, name in enumerate(noted)}
    unknown = [name for name in found if name not in places]
    if ignore or list(noted) == list(found):
        return None
    if unknown:
        names = {*found}
        lacking = [name for name in noted if name not in names]
        raise UserError(
            f"{source} has other classes than the data (only in the data: {some(unknown)}; only in the weights: "
            f"{some(lacking) or 'none'}): give data with the same class names"
            + (", or add --ignore-class-names to go by position" if len(noted) == len(found) else "")
        )
    return [places[name] for name in found]


def class_note(noted: Sequence[str], found: Sequence[str], source: str, ignore: bool = False) -> str:
    """A line to log about a difference that `class_order` accepts; "" if there is none."""
    if list(noted) == list(found):
        return ""
    if ignore:
        pairs = [f"{theirs} is {ours}" for theirs, ours in zip(found, noted, strict=True) if theirs != ours]
        return f"classes: the names differ from those of {source}, and go by position (in the data, {some(pairs)})"
    if len(found) < len(noted):
        names = {*found}
        lacking = [name for name in noted if name not in names]
        return f"classes: the data has {len(found)} of the {len(noted)} of {source} (it lacks {some(lacking)})"
    return f"classes: the data has them in another order than {source}; they are compared by name"


class Relabelled:
    """An evaluation loader whose labels are the positions in `classes`: label i becomes order[i]."""

    def __init__(self, loader: Loader, classes: Sequence[str], order: list[int], device: torch.device):
        self.loader, self.classes, self.samples = loader, tuple(classes), loader.samples
        self.order = torch.tensor(order, device=device)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, target in self.loader:
            yield images, self.order[target]
