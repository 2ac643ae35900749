"""The GPU gate's record as Markdown, whether all of it is right, and which defaults of fastkd would be the best."""

from fastkd.bench import Record, markdown_table
from fastkd.bench.losses.measure import COLUMNS, heading, notes, rows
from fastkd.bench.steps.baselines import SETTINGS
from fastkd.bench.steps.report import best_baseline, markdown, medians, ours, speed
from fastkd.engine import TrainOptions

KINDS = ("tests", "steps", "forms", "losses", "accuracy")
DRY = "Dry run on a device that computes nothing: no figure here is a measurement."
STEPS = ["step", "fastkd", "img/s", "best baseline", "times as fast", "official eager", "timm task", "best compile"]
DEFAULTS = ["pair", "best", "dtype", "teacher form", "graph", "compile", "img/s", "speed of the default"]
CLOSE = 0.98  # a default that reaches this part of the best speed counts as the best


def all_right(record: Record) -> bool:
    """True if every test passed, no job failed and every way of fastkd gives the right result."""
    if any("error" in run for kind in KINDS for run in record[kind].values()):
        return False
    if any(run["failed"] for run in record["tests"].values()):
        return False
    ways = [case["contenders"]["fastkd"] for run in record["losses"].values() for case in run["cases"]]
    for run in record["steps"].values():
        ways += [way for name, way in run["contenders"].items() if name.startswith("fastkd")]
    return all(way["status"] == "right" for way in ways)


def report(record: Record) -> str:
    """The record as Markdown."""
    about = f"{record['gpu']}, commit {(record['commit'] or 'unknown')[:12]}, torch {record['environment']['torch']}"
    parts = [f"# GPU gate: {about}", *[DRY] * record["dry_run"], "## Tests", tests(record["tests"])]
    if record["steps"]:
        parts += ["## Steps", steps(record["steps"]), "## Which defaults are the best", defaults(record["steps"])]
    if record["forms"]:
        parts += ["## Forms of the teacher", forms(record["forms"])]
    if record["losses"]:
        parts += ["## Losses", losses(record["losses"])]
    if found := record["accuracy"].get("fashion"):
        text = found.get("skipped") or found.get("error") or "\n".join(found["output"])
        parts += ["## Accuracy on Fashion-MNIST", text]
    if record["steps"]:
        tables = (markdown(found) for found in record["steps"].values() if "contenders" in found)
        parts += ["## Every step", "\n".join(tables).rstrip()]
    return "\n\n".join(parts) + "\n"


def summary(kind: str, found: Record) -> str:
    """One line about the result of a job."""
    if "error" in found:
        return f"failed: {found['error']}"
    if kind == "tests":
        return f"{found['passed']} passed, {len(found['failed'])} failed, {found['skipped']} skipped"
    if kind == "steps" and (mine := ours(found)):
        other = best_baseline(found)
        times = f", {speed(found, mine, other):.2f} times as fast as {other}" if other else ""
        return f"{mine}: {found['contenders'][mine]['img_per_s']:,.0f} img/s{times}"
    return "done"


def tests(runs: Record) -> str:
    counts = ["passed", "failed", "skipped"]
    counts += ["wrong values"] * any(run.get("wrong values") for run in runs.values())
    lines = [[name, *(str(len(run[c]) if c == "failed" else run[c]) for c in counts)]
             for name, run in runs.items() if "passed" in run]  # fmt: skip
    failed = [f"- {test}: {said}" for run in runs.values() for test, said in run.get("failed", {}).items()]
    failed += [f"- still running when the time was up: {test}"
               for run in runs.values() if "timed_out" in run for test in run.get("running", [])]  # fmt: skip
    return (
        markdown_table(["tests", *counts], lines, len(counts))
        + errors(runs)
        + "\n\n" * bool(failed)
        + "\n".join(failed)
    )


def steps(runs: Record) -> str:
    """A row for each workload."""
    lines = []
    for name, found in runs.items():
        if "contenders" not in found:
            continue
        row, mine, other = ["-"] * 7, ours(found), best_baseline(found)
        if mine:
            compiled = next((way for way in medians(found) if way.startswith("compile")), "")
            ratios = [speed(found, mine, way) for way in (other, "official eager", "timm task", compiled)]
            row = [mine, f"{found['contenders'][mine]['img_per_s']:,.0f}", other or "-"]
            row += [f"{ratio:.2f}x" if ratio else "-" for ratio in ratios]
        lines.append([name, *row])
    return markdown_table(STEPS, lines) + errors(runs)


def defaults(runs: Record) -> str:
    """For each pair the fastest right way in both number formats, beside fastkd's default."""
    dtype, form, graph, compiled = default()
    lines = [row for pair in dict.fromkeys(run["pair"] for run in runs.values() if "contenders" in run)
             if (row := best_row(runs, pair))]  # fmt: skip
    best = sum(float(row[-1]) >= CLOSE for row in lines if row[-1] != "-")
    said = (
        f"fastkd's default is {dtype}, teacher form {form}, graph {graph}, compile {compiled}. It is the best, or "
        f"within {1 - CLOSE:.0%} of it, in {best} of {len(lines)} pairs."
    )
    return f"{said}\n\n{markdown_table(DEFAULTS, lines, 2)}"


def best_row(runs: Record, pair: str) -> list[str] | None:
    """The row of a pair, by DEFAULTS; None if no way of fastkd has a time."""
    found: dict[tuple[str, ...], tuple[str, str, float]] = {}  # by settings: name of the way, form, images/s
    for run in runs.values():
        for name, way in run.get("contenders", {}).items() if run.get("pair") == pair else ():
            if name in SETTINGS and "img_per_s" in way:
                found.setdefault((run["dtype"], *SETTINGS[name]), (name, form_of(name, way), way["img_per_s"]))
    if not found:
        return None
    (dtype, _, graph, compiled), (name, form, rate) = max(found.items(), key=lambda item: item[1][2])
    now = found.get(default())
    return [pair, name, dtype, form, graph, compiled, f"{rate:,.0f}", f"{now[2] / rate:.2f}" if now else "-"]


def form_of(name: str, way: Record) -> str:
    """The form of the teacher that a way took: "auto (fused)"."""
    wanted, mark = SETTINGS[name][0], "teacher form: "
    chosen = [note.removeprefix(mark) for note in way["notes"] if note.startswith(mark)]
    return f"{wanted} ({chosen[-1]})" if wanted == "auto" and chosen else wanted


def default() -> tuple[str, str, str, str]:
    """dtype, teacher form, graph and compile of `fastkd train` on a GPU without options."""
    options = TrainOptions()
    dtype = "bfloat16" if options.amp_dtype == "auto" else options.amp_dtype
    return (
        dtype,
        options.teacher_form,
        "on" if options.graph == "auto" else options.graph,
        "off" if options.compile == "off" else "on",  # auto: in long runs
    )


def forms(runs: Record) -> str:
    found = [(f"{name} {dtype}", form) for name, run in runs.items() for dtype, each in run.get("forms", {}).items()
             for form in each]  # fmt: skip
    lines = [[name, form["name"], f"{form['milliseconds']:.2f}", f"{form['error']:.1e}",
              f"{form['agreement']:.1%}", form["reason"] or "right"] for name, form in found]  # fmt: skip
    columns = ["teacher", "form", "ms", "error of a probability", "same top class", ""]
    return markdown_table(columns, lines) + errors(runs)


def losses(runs: Record) -> str:
    """A table for each group, under its heading, and what the figures mean."""
    parts = []
    for run in runs.values():
        if run.get("cases"):
            table = markdown_table(COLUMNS, [row for case in run["cases"] for row in rows(case)])
            parts += [heading(run), table, "\n".join(f"- {note}" for note in notes(run))]
    return ("\n\n".join(parts) + errors(runs)).strip()


def errors(found: Record) -> str:
    return "".join(f"\n\n{name} failed: {run['error']}" for name, run in found.items() if "error" in run)
