"""report.html: what the page says, and its file."""

import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UserError, count_of
from ..files import write_atomic
from .charts import BOX, History, charts_of
from .compare import Comparison
from .confusion import CELL, GAP, Matrix, matrix_of
from .pictures import SMALL, denormalised, picture_uri

FILE = "report.html"
REFRESH_S = 20  # of a browser that shows a run which goes on


class Table(NamedTuple):
    """A table as on the terminal."""

    columns: list[str]
    rows: list[list[str]]


class Guess(NamedTuple):
    """A class that a network gives a probability, in [0, 1]."""

    name: str
    share: float
    right: bool


class Picture(NamedTuple):
    """An image, its class, and the likely classes by network."""

    uri: str
    pixelated: bool
    true: str
    difference: float  # in %
    guesses: dict[str, list[Guess]]


@dataclass
class Page:
    """The page of the run in `folder`. `log` gets a warning if it cannot be written; the run goes on without it.

    options: of the run, by name. data: its images and classes. image: mean and std of the networks' images, if they are
    known. environment: the content of environment.json.
    """

    folder: Path
    options: Mapping[str, Any]
    data: Mapping[str, Any]
    image: Mapping[str, Any]
    environment: Mapping[str, Any]
    log: Callable[[str], None]
    history: History = ()
    table: Table | None = None
    alone: History = ()
    comparison: Comparison | None = None
    problem: str = ""
    seconds: float = 0.0
    finished: bool = False
    failed: bool = field(default=False, init=False)

    def epoch(self, history: History) -> None:
        """Write the page after an epoch."""
        self.history = history
        if not self.failed:
            self._write()

    def finish(self, history: History, found: Comparison | str, seconds: float) -> None:
        """Write the page of the whole run, with what `compare` found in so many seconds."""
        self.history, self.seconds, self.finished = history, seconds, True
        if isinstance(found, Comparison):
            self.comparison = found
        else:
            self.problem = found
            self.log(f"WARNING: {FILE} has neither confusion matrix nor images: {found}")
        self._write()

    def add_table(self, columns: list[str], rows: list[list[str]], alone: History = ()) -> None:
        """Write the page again, with the table of all networks and the history of the student alone."""
        self.table, self.alone = Table(columns, rows), alone
        self._write()

    def _write(self) -> None:
        """Write the file. What goes wrong costs the page alone."""
        try:
            write_atomic(self.folder / FILE, self.render().encode("utf-8", "backslashreplace"))
        except Exception as error:
            self.failed = True
            reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            self.log(f"WARNING: {FILE} is not written: {reason}".splitlines()[0])

    def render(self) -> str:
        """The page as HTML. The template escapes every text."""
        return str(_template().render(self.content()))

    def content(self) -> dict[str, Any]:
        """What the template gets."""
        names = self.options
        teachers = names.get("teacher") or ()
        found = self.comparison
        return {
            "method": names.get("method", ""),
            "student": names.get("student") or "student",
            "teacher": " and ".join([teachers] if isinstance(teachers, str) else teachers),
            "facts": self._facts(),
            "numbers": self._numbers(),
            "table": self.table,
            "alone": bool(self.alone),
            "charts": charts_of(self.history, self.alone, self._teacher_top1()) if self.history else [],
            "box": BOX,
            "matrix": self._matrix(),
            "cell_side": CELL - GAP,
            "other": found.names[1] if found and len(found.names) > 1 else "",
            "pictures": self._pictures(),
            "options": {name: _text(value) for name, value in names.items()},
            "environment": _flat(self.environment),
            "command": command_of(self.environment),
            "folder": str(self.folder),
            "refresh": 0 if self.finished else REFRESH_S,
            "problem": self.problem,
            "seconds": self.seconds,
            "written": time.strftime("%Y-%m-%d %H:%M"),
        }

    def _facts(self) -> list[str]:
        """Data, size and length of the run, in a few words each."""
        data, epochs, last = self.data, self.options.get("epochs", 0), len(self.history)
        name, classes = Path(str(self.options.get("data") or "")).name, len(data.get("classes", ()))
        images = f"{data.get('images', 0):,} training images"
        if self.comparison:
            images = f"{data.get('images', 0):,} training and {len(self.comparison.target):,} validation images"
        length = count_of(last, "epoch") if self.finished else f"epoch {last} of {epochs}, still training"
        seconds = sum(row.get("train_s", 0) for row in self.history)
        return [
            fact for fact in (name, f"{classes:,} classes", images, length, f"{_duration(seconds)} of training") if fact
        ]

    def _numbers(self) -> list[tuple[str, str, str]]:
        """The most important numbers: (name, number, remark)."""
        if not self.history:
            return []
        last, found = self.history[-1], self.comparison
        best = max(self.history, key=lambda row: row.get("top1", 0))
        remark = f"best {best['top1']:.2f} in epoch {best['epoch']}"
        if self.alone:
            remark = f"{_gain(last['top1'], self.alone[-1]['top1'])} points over the student alone"
        numbers = [("student, top-1", f"{last['top1']:.2f}", remark)]
        if found and len(found.names) > 1:
            remark = f"the student: {_gain(found.top1(0), found.top1(1))} points"
            numbers.append((f"{found.names[1]}, top-1", f"{found.top1(1):.2f}", remark))
            remark = f"of the images get the {found.names[1]}'s class"
            numbers.append(("agreement", f"{found.agreement:.2f}", remark))
        return numbers

    def _teacher_top1(self) -> float | None:
        found = self.comparison
        return found.top1(1) if found and found.names[1:] == ["teacher"] else None

    def _matrix(self) -> Matrix | None:
        found = self.comparison
        return found and matrix_of(found.target, found.predictions[0], self._classes())

    def _classes(self) -> Sequence[str]:
        return [str(name) for name in self.data.get("classes", ())]

    def _pictures(self) -> list[Picture]:
        """The images that the networks see most differently; those on which they agree are left out."""
        if not self.comparison:
            return []
        names, shown, classes = self.comparison.names, self.comparison.shown, self._classes()
        pixels = denormalised(shown.pixels, self.image.get("mean"), self.image.get("std"))
        pictures = []
        for place, difference in enumerate(shown.difference.tolist()):
            true = int(shown.target[place])
            likely = [
                [Guess(classes[number], p, number == true) for p, number in zip(*each, strict=True)]
                for each in zip(shown.probabilities[place].tolist(), shown.classes[place].tolist(), strict=True)
            ]
            uri, is_small = picture_uri(pixels[place]), max(pixels.shape[1:3]) <= SMALL
            guesses = dict(zip(names, likely, strict=True))
            pictures.append(Picture(uri, is_small, classes[true], 100 * difference, guesses))
        return pictures


@cache
def _template() -> Any:
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    options: dict[str, Any] = {"undefined": jinja2.StrictUndefined, "trim_blocks": True}
    return jinja2.Environment(loader=loader, autoescape=True, **options).get_template("page.html")


def command_of(environment: Mapping[str, Any]) -> str:
    """The command of environment.json as one would type it."""
    program, *words = [str(word) for word in environment.get("command") or [""]]
    path = Path(program)
    name = path.parent.name if path.name == "__main__.py" else path.name
    return shlex.join([name, *words]) if name else ""


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else "" if value is None else str(value)


def _flat(values: Mapping[str, Any]) -> dict[str, str]:
    """Names and texts of nested values, without those that are empty; the command has a place of its own."""
    found: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= {f"{name}: {key}": text for key, text in _flat(value).items()}
        elif name != "command" and _text(value):
            found[name] = _text(value)
    return found


def _gain(top1: float, other: float) -> str:
    """The difference of two accuracies as they are shown."""
    return f"{round(top1, 2) - round(other, 2):+.2f}".replace("-", "−")


def _duration(seconds: float) -> str:
    """42 s, 12 min, 3 h 20 min"""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
