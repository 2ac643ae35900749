"""What the measurements say: rows of ratios, notes, a picture."""

import io
import re
from pathlib import Path

import torch

from fastkd.bench.cases import Case, cases
from fastkd.bench.clock import copy_rate
from fastkd.bench.common import commit, environment, load_average
from fastkd.bench.measure import measure, precision

COLUMNS = ["case", "fastkd ms", "eager", "best baseline", "verdict", "% copy"]
SPREAD = 1.5
WORDS = (
    "even: the middle 60 % of the times overlap with the best baseline's; ?: the 80th percentile of one of the two is "
    f"above {SPREAD:g} times the 20th; % copy: what part of the speed of copying fastkd reaches, by the bytes "
    "that must be moved"
)
QUICK = "torch.compile was left out (--quick)"


def losses(chosen: list[Case], device: torch.device, quick: bool, tell=lambda line: None) -> dict:
    """The record of a run: where, with what, every case."""
    rate = copy_rate(device, megabytes=64 if quick else 512)
    load = load_average()
    records = []
    for case in chosen:
        tell(f"{len(records) + 1}/{len(chosen)}  {case.name}")
        records.append(measure(case, device, 0.05 if quick else 1.0, not quick, rate))
    return {
        "environment": environment(),
        "commit": commit(),
        "load_average": load,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": str(precision(device)).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "copy_gb_per_s": rate / 1e9,
        "quick": quick,
        "cases": records,
    }


def choose(part: str, device: torch.device) -> list[Case]:
    """Those in whose name a word begins so: KD is not DKD."""
    begins = re.compile(rf"(?<![\w-]){re.escape(part)}", re.IGNORECASE)
    return [case for case in cases(device) if begins.search(case.name)]


def medians(record: dict, way: str) -> dict[str, dict]:
    """By contender, of the whole operation: forward and backward, or what there is."""
    whole = {name: list(c["times"].values())[-1] for name, c in record["contenders"].items() if "times" in c}
    return {name: ways[way] for name, ways in whole.items() if way in ways}


def ratios(record: dict, way: str) -> dict[str, float]:
    """By baseline, how many times fastkd's time it takes; empty where fastkd has none."""
    found = medians(record, way)
    ours = found.pop("fastkd", None)
    return {name: times["median"] / ours["median"] for name, times in found.items()} if ours else {}


def verdict(record: dict, way: str) -> str:
    """faster or slower than the best baseline, even where their middle 60 % overlap; or why there is none.

    With a question mark where one of the two was unsteady.
    """
    found, ours = medians(record, way), record["contenders"]["fastkd"]
    if ours["status"] != "right":
        return ours["status"]
    others = [times for name, times in found.items() if name != "fastkd"]
    if "fastkd" not in found or not others:
        return "no time" if "fastkd" not in found else "no baseline"
    both = found["fastkd"], min(others, key=lambda times: times["median"])
    return compared(*both) + " ?" * any(times["p80"] > SPREAD * times["p20"] for times in both)


def compared(fused: dict, other: dict) -> str:
    if fused["p80"] < other["p20"]:
        return "faster"
    return "slower" if fused["p20"] > other["p80"] else "even"


def colour(record: dict, way: str, name: str) -> str:
    """Of the bar of a baseline: blue where fastkd is faster, red where it is slower, grey where they are even."""
    found = medians(record, way)
    return {"faster": "C0", "slower": "C3", "even": "grey"}[compared(found["fastkd"], found[name])]


def rows(record: dict) -> list[list[str]]:
    """One row for the calls and, on CUDA, one for the graphs."""
    ways = ["call", "graph"] if any(medians(record, "graph")) else ["call"]
    return [row(record, way) for way in ways]


def row(record: dict, way: str) -> list[str]:
    name = record["case"] + " (graph)" * (way == "graph")
    ours, others = medians(record, way).get("fastkd"), ratios(record, way)
    if not ours:
        return [name, "-", "-", "-", verdict(record, way), "-"]
    best = min(others, key=others.get, default=None)
    eager = f"{others['eager']:.2f}x" if "eager" in others else "-"
    least = f"{others[best]:.2f}x {best}" if best else "-"
    share = f"{record['contenders']['fastkd']['copy_rate_percent']:.0f}"
    return [name, f"{ours['median']:.3f}", eager, least, verdict(record, way), share]


def notes(run: dict) -> list[str]:
    """What the table's words mean; what disturbed the figures; what got no time, and why."""
    lines = [WORDS, *disturbances(run)] + [QUICK] * run["quick"]
    for record in run["cases"]:
        for name, contender in record["contenders"].items():
            if "reason" in contender:
                lines.append(f"{record['case']}: {name} is {contender['status']}: {contender['reason']}")
            if "no_graph" in contender:
                lines.append(f"{record['case']}: {name} cannot be captured: {contender['no_graph']}")
    return lines


def disturbances(run: dict) -> list[str]:
    """Where other work seems to have shared the machine."""
    load, cpus, lines = run["load_average"], run["environment"]["cpus"], []
    if load > cpus:
        lines.append(f"Other work disturbed these figures: the load before was {load:.1f} on {cpus} CPUs")
    doubtful = [r["case"] for r in run["cases"] if any(verdict(r, way).endswith("?") for way in ("call", "graph"))]
    if doubtful:
        lines.append(f"Other work may have disturbed {', '.join(doubtful)}: measure again")
    return lines


def heading(run: dict) -> str:
    return (
        f"Forward and backward, {run['device']}, {run['dtype']}; copying moves {run['copy_gb_per_s']:.0f} GB/s here; "
        f"load of the machine before: {run['load_average']:.1f} on {run['environment']['cpus']} CPUs. "
        "2.00x takes twice fastkd's time."
    )


def draw(run: dict, path: Path) -> None:
    """A bar for each case and baseline: its time as a multiple of fastkd's."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

    way = "graph" if any(medians(record, "graph") for record in run["cases"]) else "call"
    bars = [
        (f"{r['case']}, {name}", x, colour(r, way, name)) for r in run["cases"] for name, x in ratios(r, way).items()
    ]
    figure = Figure(figsize=(9, 1.5 + 0.25 * len(bars)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    names, times, colours = ([bar[i] for bar in bars[::-1]] for i in range(3))
    axes.barh(names, [x - 1 for x in times], left=1, color=colours)
    for place, x in enumerate(times):
        axes.annotate(f"{x:.2f}", (max(x, 1), place), (4, 0), textcoords="offset points", va="center")
    axes.axvline(1, color="black", linewidth=1)
    axes.margins(x=0.15, y=0.01)
    axes.set(xscale="log", title=f"{run['device']}, {run['dtype']} ({way}): above 1, fastkd is faster; grey: even")
    axes.set(xlabel="time, as a multiple of fastkd's")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())
