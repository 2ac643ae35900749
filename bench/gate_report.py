"""What bench/gpu_gate.py has found, as Markdown."""

from fastkd.bench.forms import table as forms_table
from fastkd.bench.report import COLUMNS, heading, notes, rows
from fastkd.bench.step_report import best_baseline, markdown, ours, speed, table, timed

STEPS = ["step", "fastkd", "img/s", "best baseline", "times as fast", "official eager", "timm task", "best compile"]


def report(record: dict) -> str:
    about = f"{record['gpu']}, commit {(record['commit'] or 'unknown')[:12]}, torch {record['environment']['torch']}"
    parts = [f"# GPU gate: {about}", tests(record), losses(record), steps(record), forms(record), accuracy(record)]
    return "\n\n".join(part for part in parts if part) + "\n"


def tests(record: dict) -> str:
    lines = [[name, "passed" if run["status"] == 0 else "failed", f"{run['seconds']:.0f}", run["output"][-1]]
             for name, run in record["tests"].items() if "status" in run]  # fmt: skip
    return "## Tests\n\n" + table(["tests", "result", "s", "said"], lines) + errors(record["tests"])


def losses(record: dict) -> str:
    found = record["losses"]
    if not found.get("cases"):
        return ""
    lines = [row for case in found["cases"] for row in rows(case)]
    said = "\n".join(f"- {note}" for note in notes(found))
    return f"## Losses\n\n{heading(found)}\n\n{table(COLUMNS, lines)}\n\n{said}"


def steps(record: dict) -> str:
    """A row for each pair, then everything about each."""
    measured = {name: found for name, found in record["steps"].items() if "contenders" in found}
    if not record["steps"]:
        return ""
    lines = [step_row(name, found) for name, found in measured.items()]
    more = "\n".join(markdown(found) for found in measured.values())
    return f"## Steps\n\n{table(STEPS, lines)}{errors(record['steps'])}\n\n{more}".rstrip()


def step_row(name: str, found: dict) -> list[str]:
    mine, other = ours(found), best_baseline(found)
    if not mine:
        return [name, "-", *["-"] * 6]
    compiled = [way for way in timed(found) if way.startswith("compile")]
    fastest = max(compiled, key=lambda way: found["contenders"][way]["img_per_s"], default="")
    ratios = [speed(found, mine, way) for way in (other, "official eager", "timm task", fastest)]
    shown = [f"{ratio:.2f}x" if ratio else "-" for ratio in ratios]
    return [name, mine, f"{found['contenders'][mine]['img_per_s']:,.0f}", other or "-", *shown]


def forms(record: dict) -> str:
    """How many times as fast as the plain teacher each form is."""
    found = {name: forms for name, forms in record["forms"].items() if "plain" in forms}
    if not record["forms"]:
        return ""
    return f"## Forms of a teacher\n\n{forms_table(found).rstrip()}{errors(record['forms'])}"


def accuracy(record: dict) -> str:
    found = record["accuracy"].get("fashion")
    if not found:
        return ""
    said = found.get("skipped") or found.get("error") or "\n".join(found["output"])
    return f"## Accuracy on Fashion-MNIST\n\n{said}"


def errors(found: dict[str, dict]) -> str:
    return "".join(f"\n\n{name} failed: {run['error']}" for name, run in found.items() if "error" in run)
