"""Losses: is every way right, how long does it take, and what the figures say. A wrong way gets no time.

Right means that value and gradients agree with the eager formulation in float64. The first call is compared and the
second, which gets the tensors as the first has left them.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fastkd import bench
from fastkd.bench import Record
from fastkd.bench.losses.cases import COMPILED, Case, ways
from fastkd.bench.timing import Work, clocks, copy_rate, graphed, interleaved, kernels, works
from fastkd.engine.precision import Precision

Log = Callable[[str], None]

# Relative error in the L2 norm: of the value, of a gradient. A gradient in bf16 is rounded to 8 bits. In fp32 the sign
# of a difference near 0 may flip.
TOLERANCE = {torch.float32: (1e-4, 2e-3), torch.bfloat16: (5e-3, 1e-2)}
COLUMNS = ["case", "fastkd ms", "eager", "compiled", "best baseline", "verdict", "% copy"]
SPREAD = 1.5
WORDS = (
    "eager: eager torch against eager fastkd; compiled: compiled torch against compiled fastkd; best baseline: the "
    "fastest way without fastkd, against eager fastkd; even: the middle 60 % of the times overlap with the best "
    f"baseline's; ?: the 80th percentile of one of the two is above {SPREAD:g} times the 20th; % copy: what part of "
    "the speed of copying fastkd reaches, by the bytes that must be moved"
)


def leaves(tensors: list[Tensor], learners: int, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Copies, floating ones in `dtype` if it is given; the first `learners` require a gradient."""
    copies = [x.detach().to(dtype if dtype and x.is_floating_point() else x.dtype, copy=True) for x in tensors]
    return [x.requires_grad_(place < learners) for place, x in enumerate(copies)]


def results(function: Callable[..., Tensor], tensors: list[Tensor], learners: int) -> list[Tensor]:
    """The value, then the gradients."""
    value = function(*tensors)
    gradients = torch.autograd.grad(value, tensors[:learners]) if learners else ()
    return [value.detach(), *gradients]


def difference(found: list[Tensor], wanted: list[Tensor], dtype: torch.dtype) -> str:
    """What is wrong with `found`, or the empty string."""
    for place, (x, right) in enumerate(zip(found, wanted, strict=True)):
        allowed = TOLERANCE[dtype][place > 0] if x.dim() == 0 or place else TOLERANCE[dtype][1]
        error = ((x.double() - right).norm() / right.norm()).item()
        if not error <= allowed:
            name = f"gradient {place}" if place else "value"
            return f"{name} is off by {error:.2g} of its norm, {allowed:g} is allowed"
    return ""


def judge(case: Case, functions: dict[str, Callable[..., Tensor]], tensors: list[Tensor]) -> dict[str, Record]:
    """For each way its status: right, wrong or unavailable; and the reason."""
    precision = Precision("auto", tensors[0].device)
    wanted = results(case.eager, leaves(tensors, case.learners, torch.float64), case.learners)
    verdicts: dict[str, Record] = {}
    with precision.autocast():  # as in training: with bf16 tensors torch computes softmaxes, norms and sums in fp32
        for name, function in functions.items():
            copies, reason = leaves(tensors, case.learners), ""
            try:
                for _ in range(2):
                    reason = reason or difference(results(function, copies, case.learners), wanted, precision.dtype)
                verdicts[name] = {"status": "wrong", "reason": reason} if reason else {"status": "right"}
            except Exception as error:  # a missing compiler, an unfit package: the reason is reported
                verdicts[name] = {"status": "unavailable", "reason": bench.first_line(error)}
    return verdicts


def measure(case: Case, device: torch.device, seconds: float, compiled: bool, bandwidth: float) -> Record:
    """The record of a case. `bandwidth`: copy_rate() of the device.

    The least bytes to move: each tensor is read once (`augment` writes its batch), each gradient is written once.
    """
    precision, functions = Precision("auto", device), ways(case, compiled)
    tensors = leaves(case.make(device, precision.dtype), case.learners)
    found, moved = judge(case, functions, tensors), sum(x.nbytes for x in (*tensors, *tensors[: case.learners]))
    right = {name: works(functions[name], tensors, case.learners) for name in found if found[name]["status"] == "right"}
    with precision.autocast():
        time_all(found, right, device, seconds)
    for contender in found.values():
        if "times" in contender:
            whole = list(contender["times"].values())[-1]
            per_second = moved / ((whole.get("graph") or whole["call"])["median"] / 1e3)
            contender["copy_rate_percent"] = 100 * per_second / bandwidth
    return {"case": case.name, "least_bytes": moved, "contenders": found}


def time_all(found: dict[str, Record], right: dict[str, dict[str, Work]], device: torch.device, seconds: float) -> None:
    """Write `times` [mode][clock] and, on CUDA, the kernels of a call into `found`."""
    for mode in next(iter(right.values()), {}):
        calls = {name: modes[mode] for name, modes in right.items()}
        for kind, clock in clocks(device).items():
            ready = calls if kind == "call" else captured(calls, found)
            for name, times in interleaved(ready, clock, seconds).items():
                found[name].setdefault("times", {}).setdefault(mode, {})[kind] = bench.summary(times)
    if device.type == "cuda":
        for name in right:
            found[name]["kernels"] = kernels(list(right[name].values())[-1])


def captured(calls: dict[str, Work], found: dict[str, Record]) -> dict[str, Work]:
    """The calls as CUDA graphs. One that cannot be captured is left out; `found` gets the reason."""
    graphs = {}
    for name, work in calls.items():
        try:
            graphs[name] = graphed(work)
        except Exception as error:
            torch.cuda.synchronize()
            found[name]["no_graph"] = bench.first_line(error)
    return graphs


def measure_losses(
    chosen: list[Case], device: torch.device, quick: bool, log: Log, keep: Callable[[Record], None] | None = None
) -> Record:
    """The record of a run over the `chosen` cases. `quick`: few rounds, without torch.compile.

    `keep` gets the record after each case.
    """
    rate, load = copy_rate(device, megabytes=64 if quick else 512), bench.load_average()
    records: list[Record] = []
    run = bench.about_run(device, load) | {"copy_gb_per_s": rate / 1e9, "quick": quick, "cases": records}
    for case in chosen:
        log(f"{len(records) + 1}/{len(chosen)}  {case.name}")
        records.append(measure(case, device, 0.05 if quick else 1.0, not quick, rate))
        if keep:
            keep(run)
    return run


def times_by_way(record: Record, clock: str) -> dict[str, dict[str, float]]:
    """The summary of each way's times, of forward and backward if there is a backward."""
    whole = {name: list(c["times"].values())[-1] for name, c in record["contenders"].items() if "times" in c}
    return {name: clocked[clock] for name, clocked in whole.items() if clock in clocked}


def ratios(record: Record, clock: str) -> dict[str, float]:
    """For each baseline its time as a multiple of eager fastkd's; empty if fastkd has no time."""
    found = times_by_way(record, clock)
    found.pop(COMPILED, None)
    ours = found.pop("fastkd", None)
    return {name: times["median"] / ours["median"] for name, times in found.items()} if ours else {}


def verdict(record: Record, clock: str) -> str:
    """Eager fastkd is "faster" or "slower" than the best baseline, or "even"; else why there is no verdict.

    A question mark means that one of the two was unsteady.
    """
    found, ours = times_by_way(record, clock), record["contenders"]["fastkd"]
    if ours["status"] != "right":
        return str(ours["status"])
    others = [times for name, times in found.items() if name not in ("fastkd", COMPILED)]
    if "fastkd" not in found or not others:
        return "no time" if "fastkd" not in found else "no baseline"
    both = found["fastkd"], min(others, key=lambda times: times["median"])
    return compared(*both) + " ?" * any(times["p80"] > SPREAD * times["p20"] for times in both)


def compared(fused: dict[str, float], other: dict[str, float]) -> str:
    """How fastkd's times compare with a baseline's."""
    if fused["p80"] < other["p20"]:
        return "faster"
    return "slower" if fused["p20"] > other["p80"] else "even"


def bars_of(record: Record, clock: str) -> list[tuple[str, float, str]]:
    """(label, multiple of fastkd's time, colour) of each baseline: blue if fastkd is faster, red if it is slower.

    Eager baselines are compared with eager fastkd, compiled PyTorch with compiled fastkd.
    """
    found, bars = times_by_way(record, clock), []
    colours = {"faster": "C0", "slower": "C3", "even": "grey"}
    eager, compiled = found.pop("fastkd", None), found.pop(COMPILED, None)
    for name, times in found.items():
        ours = compiled if name == "compile" and compiled else eager
        if ours:
            multiple = times["median"] / ours["median"]
            bars.append((f"{record['case']}, {name}", multiple, colours[compared(ours, times)]))
    return bars


def rows(record: Record) -> list[list[str]]:
    """One row for the calls and, on CUDA, one for the graphs."""
    return [row(record, clock) for clock in ("call", "graph")[: 1 + any(times_by_way(record, "graph"))]]


def row(record: Record, clock: str) -> list[str]:
    """One row of the table, by COLUMNS."""
    name = record["case"] + " (graph)" * (clock == "graph")
    found, others = times_by_way(record, clock), ratios(record, clock)
    best, compiled = min(others, key=lambda name: others[name], default=None), "-"
    if {COMPILED, "compile"} <= found.keys():
        compiled = f"{found['compile']['median'] / found[COMPILED]['median']:.2f}x"
    if "fastkd" not in found:
        return [name, "-", "-", compiled, "-", verdict(record, clock), "-"]
    eager = f"{others['eager']:.2f}x" if "eager" in others else "-"
    least = f"{others[best]:.2f}x {best}" if best else "-"
    share = f"{record['contenders']['fastkd']['copy_rate_percent']:.0f}"
    return [name, f"{found['fastkd']['median']:.3f}", eager, compiled, least, verdict(record, clock), share]


def notes(run: Record) -> list[str]:
    """What the table's words mean, signs of other work on the machine, and which way got no time and why."""
    doubtful = [r["case"] for r in run["cases"] if any(verdict(r, way).endswith("?") for way in ("call", "graph"))]
    lines = [WORDS, *bench.load_notes(run)]
    if doubtful:
        lines.append(f"Other work may have disturbed {', '.join(doubtful)}: measure again")
    if run["quick"]:
        lines.append("torch.compile was left out (--quick)")
    for record in run["cases"]:
        for name, contender in record["contenders"].items():
            if "reason" in contender:
                lines.append(f"{record['case']}: {name} is {contender['status']}: {contender['reason']}")
            if "no_graph" in contender:
                lines.append(f"{record['case']}: {name} cannot be captured: {contender['no_graph']}")
    return lines


def heading(run: Record) -> str:
    return (
        f"Forward and backward, {run['device']}, {run['dtype']}; copying moves {run['copy_gb_per_s']:.0f} GB/s here; "
        f"load of the machine before: {run['load_average']:.1f} on {run['environment']['cpus']} CPUs. "
        "2.00x takes twice fastkd's time."
    )


def show_losses(run: Record) -> None:
    bench.log_rank0(heading(run))
    bench.show_table(COLUMNS, [row for record in run["cases"] for row in rows(record)], numbers=6)
    bench.log_rank0("\n".join(notes(run)))


def draw_losses(run: Record, path: Path) -> None:
    """Write a PNG with a bar for each case and baseline: its time as a multiple of fastkd's."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

    way = "graph" if any(times_by_way(record, "graph") for record in run["cases"]) else "call"
    bars = [bar for record in run["cases"] for bar in bars_of(record, way)]
    bars.reverse()
    figure = Figure(figsize=(9, 1.5 + 0.25 * len(bars)), layout="constrained")
    axes = figure.subplots()
    axes.barh([name for name, _, _ in bars], [x - 1 for _, x, _ in bars], left=1, color=[shade for *_, shade in bars])
    for place, (_, x, _) in enumerate(bars):
        axes.annotate(f"{x:.2f}", (max(x, 1), place), (4, 0), textcoords="offset points", va="center")
    axes.axvline(1, color="black", linewidth=1)
    axes.margins(x=0.15, y=0.01)
    axes.set(xscale="log", title=f"{run['device']}, {run['dtype']} ({way}): above 1, fastkd is faster; grey: even")
    axes.set(xlabel="time, as a multiple of fastkd's")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    figure.savefig(path, format="png", dpi=110)
