"""Labels of images in shards: numbers or texts to positions in the list of the classes."""

import os
from collections.abc import Iterable, Sequence

from ..errors import UserError
from ..foreign import parse_json, read_text
from .walk import some

LONGEST = 64 << 20  # bytes of the names of all classes
MOST = 1_000_000  # classes


def classes_of(labels: Iterable[int | str], names: Sequence[str], source: str) -> tuple[str, ...]:
    """The names of the classes, in label order.

    Numbers count in `names`; without names each is called by its number. Texts are their own names, and sorted.
    Raises UserError if the labels are of both kinds, or if a label has no name.
    """
    distinct = {*labels}
    numbers = {label for label in distinct if isinstance(label, int)}
    if len(numbers) not in (0, len(distinct)):
        raise UserError(f"{source}: some labels are numbers ({min(numbers)}) and some texts ({_text(distinct)!r})")
    if numbers:
        least, most = min(numbers), max(numbers)
        limit = len(names) or MOST
        if least < 0 or most >= limit:
            reason = f"there are names for {len(names):,} classes" if names else f"labels count from 0 to {MOST - 1:,}"
            raise UserError(f"{source}: the labels go from {least:,} to {most:,}, and {reason}")
        return tuple(names) if names else tuple(map(str, range(most + 1)))
    texts = sorted(str(label) for label in distinct)
    if names and (other := [text for text in texts if text not in {*names}]):
        raise UserError(f"{source}: labels that are no names of classes: {some(other)}")
    return tuple(names or texts)


def _text(labels: Iterable[int | str]) -> str:
    return next(label for label in labels if isinstance(label, str))


def positions(labels: Sequence[int | str], classes: Sequence[str]) -> list[int]:
    """The labels as numbers."""
    places = {name: number for number, name in enumerate(classes)}
    return [label if isinstance(label, int) else places[label] for label in labels]


def names_beside(shard: str) -> tuple[str, ...]:
    """The names in classes.json (a list) or classes.txt (a line each) beside a shard or one folder above; else ()."""
    folder = os.path.dirname(os.path.abspath(shard))
    for file in (os.path.join(place, name) for place in (folder, os.path.dirname(folder)) for name in FILES):
        if os.path.isfile(file):
            return _read_names(file)
    return ()


FILES = ("classes.json", "classes.txt")


def _read_names(file: str) -> tuple[str, ...]:
    try:
        text = read_text(file, LONGEST)
        names = parse_json(text) if file.endswith(".json") else text.splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{file!r} cannot be read as the names of the classes ({error})") from None
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"{file!r} is no list of the names of the classes, in label order: repair or remove it")
    if len({*names}) < len(names):
        raise UserError(f"{file!r} has a name twice: names of classes must differ")
    return tuple(names)
