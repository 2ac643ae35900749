"""What the accuracies say: a table in Markdown and a picture."""

import io
import statistics
from pathlib import Path

from fastkd.methods import METHODS

NAMES = {"teacher": "teacher", "ce": "student alone"}


def mean_and_deviation(values: list[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation, divided by n - 1; a single value has none."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def scores(record: dict, name: str, what: str = "top1") -> dict[str, float]:
    """By seed; runs that failed have none."""
    return {seed: run[what] for seed, run in record["pairs"].get(name, {}).items() if what in run}


def gains(record: dict, name: str) -> list[float]:
    """Of each seed that both have: the method's accuracy less that of the student alone."""
    own, alone = scores(record, name), scores(record, "ce")
    return [own[seed] - alone[seed] for seed in own if seed in alone]


def shown(values: list[float], sign: str = "") -> str:
    if not values:
        return "-"
    mean, deviation = mean_and_deviation(values)
    return f"{mean:{sign}.2f}" + ("" if deviation is None else f" ± {deviation:.2f}")


def order(record: dict) -> list[str]:
    known = [name for name in ("teacher", "ce", *METHODS) if name in record["pairs"]]
    return [*dict.fromkeys(known), *(name for name in record["pairs"] if name not in known)]


def table(record: dict) -> str:
    """Mean ± standard deviation over the seeds; the gain is taken seed by seed against the student alone."""
    lines = ["| method | n | top-1 % | gain over alone | beside it | s per run |", "|---|---:|---:|---:|---|---:|"]
    for name in order(record):
        own = list(scores(record, name).values())
        gain = "" if name in NAMES else shown(gains(record, name), "+")
        seconds = list(scores(record, name, "seconds").values())
        time = f"{statistics.fmean(seconds):.0f}" if seconds else "-"
        beside = ", ".join(f"{net} {shown(values)}" for net, values in others(record, name).items())
        lines.append(f"| {NAMES.get(name, name)} | {len(own)} | {shown(own)} | {gain} | {beside} | {time} |")
    return "\n".join([*lines, *failures(record)])


def others(record: dict, name: str) -> dict[str, list[float]]:
    """Accuracies of what was trained beside the student: peers, an improved teacher."""
    runs = record["pairs"][name].values()
    found = dict.fromkeys(key for run in runs for key in run if key.endswith("_top1"))
    return {key.removesuffix("_top1").replace("_", " "): list(scores(record, name, key).values()) for key in found}


def failures(record: dict) -> list[str]:
    found = [(name, seed, run) for name, runs in record["pairs"].items() for seed, run in runs.items()]
    return [f"\n{name}, seed {seed} failed: {run['error']}" for name, seed, run in found if "error" in run]


def heading(record: dict) -> str:
    what, where = record["settings"], record["environment"]
    train, test = what["images"]
    return (
        f"{what['data']}: {train:,} images to train, {test:,} to evaluate (one is {100 / test:.2f} %), "
        f"{what['epochs']} epochs, {what['teacher']} -> {what['student']}, {where['gpu'] or where['cpu']}, "
        f"torch {where['torch']}, commit {(record['commit'] or 'unknown')[:12]}"
    )


def draw(record: dict, path: Path) -> None:
    """A dot for each method's mean, bars of one standard deviation, small dots for the seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [name for name in order(record) if name not in NAMES and scores(record, name)][::-1]
    figure = Figure(figsize=(7, 1.6 + 0.32 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for place, name in enumerate(names):
        values = list(scores(record, name).values())
        mean, deviation = mean_and_deviation(values)
        axes.plot(values, [place] * len(values), ".", color="C0", alpha=0.35)
        axes.errorbar(mean, place, xerr=deviation, fmt="o", color="C0", capsize=3)
    for name, style in (("ce", "--"), ("teacher", ":")):
        if values := list(scores(record, name).values()):
            axes.axvline(statistics.fmean(values), color="black", linestyle=style, label=NAMES[name])
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(-0.7, len(names) - 0.3)
    axes.set(xlabel="top-1 %, mean and standard deviation over the seeds", title=record["settings"]["data"])
    axes.grid(axis="x", alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower center", ncols=2)  # where no dot can be
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())
