"""The report of a step: two tables, notes, a picture, and the same as Markdown."""

from pathlib import Path

from fastkd.bench import Record, load_notes, log_rank0, markdown_table, show_table
from fastkd.bench.steps.baselines import BOUNDS
from fastkd.bench.steps.breakdown import PARTS

PART_COLUMNS = ["part of a step", "what", "ms", "%"]
BUSY = 1.5  # 80th over 20th percentile
WORDS = (
    "constant gradient: fastkd's eager step with fixed gradients into logits and maps in place of the loss; student "
    "only: cross-entropy without teacher and peers. Both are bounds, not baselines. x fastkd: the time as a multiple "
    "of that of fastkd's fastest way, above 1 is slower."
)


def medians(record: Record) -> dict[str, float]:
    """Milliseconds of a step, of the ways that have times; the fastest first."""
    found = {name: way["times"]["median"] for name, way in record["contenders"].items() if "times" in way}
    return dict(sorted(found.items(), key=lambda item: item[1]))


def ours(record: Record) -> str | None:
    """The name of fastkd's fastest way, or None."""
    return next((name for name in medians(record) if name.startswith("fastkd")), None)


def best_baseline(record: Record) -> str | None:
    """The name of the fastest other way that is not a bound, or None."""
    return next((name for name in medians(record) if not name.startswith("fastkd") and name not in BOUNDS), None)


def speed(record: Record, name: str, other: str | None) -> float | None:
    """How many times as fast `name` is as `other`; None if one of them has no time."""
    found = medians(record)
    return found[other] / found[name] if other and {name, other} <= found.keys() else None


def part_rows(record: Record) -> list[list[str]]:
    """The rows of the table of parts, by PART_COLUMNS."""
    parts = record["parts"]
    total = sum(parts[name]["median"] for name in PARTS)
    shown = [(name, what, parts[name]["median"]) for name, what in PARTS.items() if parts[name]["median"]]
    sums = [("sum", "of these medians", total), ("whole", "the same step, not cut", parts["whole"]["median"])]
    return [[name, what, f"{ms:.2f}", f"{100 * ms / total:.1f}"] for name, what, ms in (*shown, *sums)]


def columns(record: Record) -> list[str]:
    counts = ["operators", "syncs"] if record["device"] == "cpu" else ["kernels", "syncs", "peak MB"]
    return ["contender", "img/s", "ms a step", "20-80 %", "x fastkd", *counts]


def rows(record: Record) -> list[list[str]]:
    """The rows of the table of ways."""
    best, lines = ours(record), []
    for name, found in record["contenders"].items():
        shown: dict[str, str] = {key: f"{found[key]:,g}" for key in ("operators", "kernels", "syncs") if key in found}
        if "peak_mb" in found:
            shown["peak MB"] = f"{found['peak_mb']:,.0f}"
        line = [name, "-", found["status"], "-", "-"]
        if times := found.get("times"):
            ratio = f"{speed(record, best, name):.2f}x" if best else "-"
            spread = f"{times['p20']:.4g}-{times['p80']:.4g}"
            line = [name, f"{found['img_per_s']:,.0f}", f"{times['median']:.2f}", spread, ratio]
        lines.append([*line, *(shown.get(column, "-") for column in columns(record)[5:])])
    return lines


def notes(record: Record) -> list[str]:
    """What the table's words mean, the comparisons, which way got no time, and signs of other work on the machine."""
    lines = [WORDS]
    if loss := speed(record, "fastkd eager", "constant gradient"):
        low = [record["contenders"][name]["times"]["p20"] for name in ("constant gradient", "fastkd eager")]
        lines.append(
            f"fastkd's eager step runs at {loss:.3f} of the speed of that with a constant gradient, "
            f"by the 20th percentiles at {low[0] / low[1]:.3f}"
        )
    mine, other = ours(record), best_baseline(record)
    if mine and other:
        lines.append(f"{mine} is {speed(record, mine, other):.2f} times as fast as the best baseline, {other}")
    for name, found in record["contenders"].items():
        if "reason" in found:
            lines.append(f"{name} is {found['status']}: {found['reason']}")
        lines += [f"{name}: {note}" for note in found["notes"]]
    if not record["compiled"]:
        lines.append("torch.compile took no part; --compile asks for it")
    lines += load_notes(record)
    timed = {name: found["times"] for name, found in record["contenders"].items() if "times" in found}
    unsteady = [name for name, times in timed.items() if times["p80"] > BUSY * times["p20"]]
    if unsteady:
        lines.append(f"Unsteady, the 80th percentile is above {BUSY:g} times the 20th: {', '.join(unsteady)}")
    return lines


def heading(record: Record) -> str:
    shape = f"{record['batch_size']} images of {record['image_size']} px, {record['classes']} classes"
    return f"{record['pair']}, {shape}, {record['device']}, {record['dtype']}, noise for data"


def show_step(record: Record) -> None:
    log_rank0(heading(record))
    show_table(PART_COLUMNS, part_rows(record), numbers=2)
    show_table(columns(record), rows(record), numbers=len(columns(record)) - 1)
    log_rank0("\n".join(notes(record)))


def markdown(record: Record) -> str:
    """The same as Markdown."""
    tables = markdown_table(PART_COLUMNS, part_rows(record)), markdown_table(columns(record), rows(record))
    said = "\n".join(f"- {note}" for note in notes(record))
    return "\n\n".join([f"### {heading(record)}", *tables, said]) + "\n"


def draw_step(record: Record, path: Path) -> None:
    """Write a PNG: the parts of fastkd's eager step as a stacked bar, and below a bar of images/s for each way."""
    from matplotlib.figure import Figure

    found, start = {name: way for name, way in record["contenders"].items() if "times" in way}, 0.0
    figure = Figure(figsize=(9, 3.2 + 0.3 * len(found)), layout="constrained")
    upper, lower = figure.subplots(2, height_ratios=[1.2, 0.6 + 0.3 * len(found)])
    for number, name in enumerate(PARTS):
        if width := record["parts"][name]["median"]:
            upper.barh(0, width, left=start, color=f"C{number}", label=f"{name} {width:.2f}")
            start += width
    upper.legend(loc="upper center", bbox_to_anchor=(0.5, -0.35), ncols=4, frameon=False)
    upper.set(title=heading(record), xlabel="ms, fastkd's eager step", yticks=[])
    names = list(found)[::-1]
    colours = ["C0" if name.startswith("fastkd") else "lightgrey" if name in BOUNDS else "grey" for name in names]
    bars = lower.barh(names, [found[name]["img_per_s"] for name in names], color=colours)
    lower.bar_label(bars, fmt="{:,.0f}", padding=3)
    lower.margins(x=0.12)
    lower.set(xlabel="images/s")
    figure.savefig(path, format="png", dpi=110)
