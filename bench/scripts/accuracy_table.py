"""The record of accuracy.py as a table and as a picture: means, standard deviations, gains over the student alone."""

import math
import statistics
from pathlib import Path

from fastkd import bench
from fastkd.bench import Record
from fastkd.methods import METHODS

NAMES = {"teacher": "teacher", "ce": "student alone"}
MARK = "▼"
FOOTNOTE = (
    f"{MARK} more than two standard deviations below the student alone: the difference of the means, against the root "
    "of the mean of both variances."
)


def mean_and_deviation(values: list[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (n - 1); None for a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def scores(record: Record, name: str, what: str = "top1") -> dict[str, float]:
    """The values by seed, in the order of the seeds, without failed runs."""
    runs = record["pairs"].get(name, {})
    return {seed: runs[seed][what] for seed in sorted(runs, key=int) if what in runs[seed]}


def gains(record: Record, name: str) -> list[float]:
    """For each seed that both have: the method's accuracy minus that of the student alone."""
    own, alone = scores(record, name), scores(record, "ce")
    return [own[seed] - alone[seed] for seed in own if seed in alone]


def is_below_alone(record: Record, name: str) -> bool:
    """True if the mean is below that of the student alone by more than two standard deviations (see FOOTNOTE)."""
    own, alone = (list(scores(record, each).values()) for each in (name, "ce"))
    if min(len(own), len(alone)) < 2:
        return False
    deviation = math.sqrt((statistics.variance(own) + statistics.variance(alone)) / 2)
    return statistics.fmean(own) < statistics.fmean(alone) - 2 * deviation


def _shown(values: list[float], sign: str = "") -> str:
    if not values:
        return "-"
    mean, deviation = mean_and_deviation(values)
    return f"{mean:{sign}.2f}" + ("" if deviation is None else f" ± {deviation:.2f}")


def order(record: Record) -> list[str]:
    """The names in the order of the table."""
    return [name for name in dict.fromkeys(["teacher", "ce", *METHODS, *record["pairs"]]) if name in record["pairs"]]


def row(record: Record, name: str) -> list[str]:
    """The cells of a line of the table."""
    own, runs = list(scores(record, name).values()), record["pairs"][name]
    gain = [] if name in NAMES else gains(record, name)
    others = dict.fromkeys(key for run in runs.values() for key in run if key.endswith("_top1"))
    beside = [f"{key[:-5].replace('_', ' ')} {_shown([*scores(record, name, key).values()])}" for key in others]
    times = [list(scores(record, name, key).values()) for key in ("seconds", "cpu_seconds")]
    return [
        NAMES.get(name, name),
        str(len(own)),
        _shown(own),
        "" if name in NAMES else _shown(gain, "+") + f" {MARK}" * is_below_alone(record, name),
        " ".join(f"{value:+.2f}" for value in gain),
        ", ".join(beside),
        *(f"{statistics.fmean(values):.0f}" if values else "-" for values in times),
    ]


def table(record: Record) -> str:
    """As Markdown: mean ± standard deviation over the seeds; the gain is taken seed by seed.

    "beside it": accuracies of the networks trained beside the student, which are peers or an improved teacher.
    """
    columns = ["method", "n", "top-1 %", "gain over alone", "seed by seed", "beside it", "s per run", "CPU s"]
    lines = [bench.markdown_table(columns, [row(record, name) for name in order(record)])]
    if any(is_below_alone(record, name) for name in record["pairs"]):
        lines.append(f"\n{FOOTNOTE}")
    for name in order(record):
        failed = {seed: run["error"] for seed, run in record["pairs"][name].items() if "error" in run}
        lines += [f"\n{name}, seed {seed} failed: {error}" for seed, error in failed.items()]
    return "\n".join(lines)


def heading(record: Record) -> str:
    what, where = record["settings"], record["environment"]
    train, test = what["images"]
    precision = what.get("amp_dtype", "auto").replace("auto", "default precision")
    return (
        f"{what['data']}: {train:,} images to train, {test:,} to evaluate (one is {100 / test:.2f} %), "
        f"{what['epochs']} epochs, {what['teacher']} -> {what['student']}, {precision}, "
        f"{where['gpu'] or where['cpu']}, torch {where['torch']}, commit {(record['commit'] or 'unknown')[:12]}"
    )


def draw(record: Record, path: Path) -> None:
    """Write a PNG: a dot for each method's mean, a bar of one standard deviation, small dots for the seeds.

    Methods that `is_below_alone` marks are red.
    """
    from matplotlib.figure import Figure

    names = [name for name in order(record) if name not in NAMES and scores(record, name)][::-1]
    figure = Figure(figsize=(7, 1.6 + 0.32 * len(names)), layout="constrained")
    axes = figure.subplots()
    for place, name in enumerate(names):
        values, color = list(scores(record, name).values()), "C3" if is_below_alone(record, name) else "C0"
        mean, deviation = mean_and_deviation(values)
        axes.plot(values, [place] * len(values), ".", color=color, alpha=0.35)
        axes.errorbar(mean, place, xerr=deviation, fmt="o", color=color, capsize=3)
    for name, style in (("ce", "--"), ("teacher", ":")):
        if values := list(scores(record, name).values()):
            axes.axvline(statistics.fmean(values), color="black", linestyle=style, label=NAMES[name])
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(-0.7, len(names) - 0.3)
    axes.set(xlabel="top-1 %, mean and standard deviation over the seeds", title=record["settings"]["data"])
    axes.grid(axis="x", alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower center", ncols=2)  # where no dot can be
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=110)
