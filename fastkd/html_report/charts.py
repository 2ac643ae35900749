"""The curves of a history: lines and ticks in the coordinates of a drawing. page.html draws them as SVG."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..curves import is_loss_term


class Box(NamedTuple):
    """A drawing, and the edges of the area that the lines may use; in pixels where it is not scaled."""

    width: float
    height: float
    left: float
    top: float
    right: float
    bottom: float


History = Sequence[dict[str, Any]]
COLOURS = 8  # in style.css
MOST_TIPS = 100  # places of a chart that show their values under the mouse
FEW_POINTS = 30  # up to here each point is marked
BOX = Box(width=380, height=210, left=46, top=8, right=370, bottom=186)


class Tick(NamedTuple):
    place: float
    text: str


class Line(NamedTuple):
    """A line of a chart. `parts`: the points of each stretch without a gap, as SVG takes them."""

    name: str
    colour: str  # a class of style.css
    parts: list[str]
    dots: list[tuple[float, float]]
    last: str


class Level(NamedTuple):
    """A dashed line across a chart."""

    name: str
    place: float
    text: str


class Tip(NamedTuple):
    """What the mouse shows at x: a strip of the chart of this width."""

    x: float
    width: float
    text: str


@dataclass(frozen=True)
class Chart:
    """A drawing in BOX."""

    title: str
    note: str
    lines: list[Line]
    levels: list[Level]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    tips: list[Tip]


class Series(NamedTuple):
    """Values by epoch; NaN where there is none."""

    name: str
    colour: str
    epochs: list[float]
    values: list[float]


def charts_of(history: History, alone: History = (), teacher: float | None = None) -> list[Chart]:
    """The charts of a history, one row per epoch. `alone`: that of the student alone; `teacher`: its top-1 in %."""
    names = list(dict.fromkeys(name for row in history for name in row))
    accuracy = _series(history, [name for name in names if name.endswith(("top1", "top5"))])
    if alone:
        accuracy.append(_series(alone, ["top1"])[0]._replace(name="student alone", colour="quiet"))
    gates = [name for name in names if name.endswith("share")]
    bad = ["bad_steps"] if any(row.get("bad_steps") for row in history) else []
    found = [
        _chart("Accuracy", "validation, %", accuracy, levels={} if teacher is None else {"teacher": teacher}),
        _chart("Training loss", "weighted terms", _series(history, [n for n in names if is_loss_term(n)]), log=True),
        _chart("Validation loss", "", _series(history, [n for n in names if n.endswith("val_loss")]), log=True),
        _chart("Learning rate", "", _series(history, ["lr"])),
        _chart("Speed", "images/s", _series(history, ["img_per_s"]), zero=True),
        _chart("Data wait", "ms per step", _series(history, ["data_wait_ms"]), zero=True),
        _chart("Selection", "share of steps", _series(history, gates)),
        _chart("Bad steps", "skipped", _series(history, bad), zero=True),
    ]
    return [chart for chart in found if chart]


def _series(history: History, names: list[str]) -> list[Series]:
    """The columns `names` of a history; what is not finite is a gap."""
    epochs = [float(row["epoch"]) for row in history]
    found = []
    for number, name in enumerate(names):
        values = [float(row.get(name, math.nan)) for row in history]
        values = [value if math.isfinite(value) else math.nan for value in values]
        found.append(Series(_words(name), f"c{number % COLOURS}", epochs, values))
    return found


def _words(column: str) -> str:
    """The name of a column as a legend has it; a chart of one line has its title already."""
    words = {"lr": "last", "img_per_s": "last", "data_wait_ms": "last", "bad_steps": "last", "val_loss": "student"}
    return words.get(column, column.replace("_", " ").replace("top1", "top-1").replace("top5", "top-5"))


def _chart(
    title: str,
    note: str,
    series: list[Series],
    log: bool = False,
    zero: bool = False,
    levels: dict[str, float] | None = None,
) -> Chart | None:
    """A chart of `series`, or None if there is nothing to draw. `log`: on a logarithmic scale if all is above 0."""
    levels = levels or {}
    values = [value for each in series for value in each.values if not math.isnan(value)]
    if not values:
        return None
    log = log and min(values) > 0
    values += [*levels.values(), *([0.0] if zero else [])]
    y = Axis.around(min(values), max(values), log, BOX.bottom, BOX.top)
    epochs = [epoch for each in series for epoch in each.epochs]
    x = Axis(min(epochs), max(max(epochs), min(epochs) + 1), False, BOX.left, BOX.right)
    return Chart(
        title=title,
        note=", ".join(filter(None, [note, "log scale" if log else ""])),
        lines=[_line(each, x, y) for each in series],
        levels=[Level(name, y.place(value), f"{value:.2f}") for name, value in levels.items()],
        x_ticks=[Tick(x.place(value), f"{value:g}") for value in ticks(x.low, x.high, 6) if value == int(value)],
        y_ticks=y.ticks(),
        tips=_tips(series, x),
    )


def _line(series: Series, x: "Axis", y: "Axis") -> Line:
    parts: list[list[tuple[float, float]]] = [[]]
    for epoch, value in zip(series.epochs, series.values, strict=True):
        if not math.isnan(value):
            parts[-1].append((x.place(epoch), y.place(value)))
        elif parts[-1]:
            parts.append([])
    dots = [point for part in parts for point in part]
    lines = [" ".join(f"{left:.1f},{top:.1f}" for left, top in part) for part in parts if len(part) > 1]
    last = next((value for value in reversed(series.values) if not math.isnan(value)), math.nan)
    return Line(series.name, series.colour, lines, dots if len(dots) <= FEW_POINTS else [], number(last))


def _tips(series: list[Series], x: "Axis") -> list[Tip]:
    """The values of all lines, for every epoch or for MOST_TIPS of them."""
    values = {epoch: "" for each in series for epoch in each.epochs}
    for each in series:
        for epoch, value in zip(each.epochs, each.values, strict=True):
            values[epoch] += "" if math.isnan(value) else f"\n{each.name}  {number(value)}"
    epochs = sorted(values)
    epochs = epochs[:: -(-len(epochs) // MOST_TIPS)]
    width = (BOX.right - BOX.left) / max(1, len(epochs) - 1)
    return [Tip(x.place(epoch) - width / 2, width, f"epoch {epoch:g}{values[epoch]}") for epoch in epochs]


class Axis(NamedTuple):
    """Values from `low` to `high`, drawn from `start` to `end`."""

    low: float
    high: float
    log: bool
    start: float
    end: float

    @classmethod
    def around(cls, low: float, high: float, log: bool, start: float, end: float) -> "Axis":
        """An axis with room around the values."""
        if log:
            room = max((high / low) ** 0.06, 1.02)
            return cls(low / room, high * room, True, start, end)
        room = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
        return cls(0.0 if low == 0 else low - room, high + room, False, start, end)

    def place(self, value: float) -> float:
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        share = ((math.log(value) if self.log else value) - low) / (high - low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[Tick]:
        values = log_ticks(self.low, self.high) if self.log else ticks(self.low, self.high, 5)
        return [Tick(self.place(value), number(value)) for value in values]


def ticks(low: float, high: float, most: int) -> list[float]:
    """At most `most` + 1 round values from `low` to `high`: multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    return [step * i for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round values from `low` to `high`, both above 0: powers of ten, with 2 and 5 times them if there is room."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        values = [factor * 10.0**power for power in powers for factor in factors]
        values = [value for value in values if low <= value <= high]
        if len(values) <= 6:
            return values if len(values) > 1 else ticks(low, high, 4)
    return values[:: -(-len(values) // 6)]


def number(value: float) -> str:
    """A value for people: 12,345 and 98.6 and 0.0123 and 1.2e-07."""
    if math.isnan(value):
        return ""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 10 else f"{value:.4g}"
