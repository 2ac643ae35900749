"""Everything that needs a GPU: GPU tests, then benchmarks of losses and steps, then accuracy.

    python bench/scripts/gpu_gate.py                bench/results/<gpu>/<date>-gate.json, and a .md beside it
    python bench/scripts/gpu_gate.py --minutes 9    stops in time; the same line continues where it stopped
    python bench/scripts/gpu_gate.py --quick        few rounds, without torch.compile

Each result is written at once. A file holds one commit; another commit starts a new file, unless --file names one.
Exit status: 0 if all tests pass and every result of fastkd is right; 1 if not (after a red test nothing is timed, and
the file says what failed); 2 without a GPU; 3 if the time was up, and the same line continues.
Accuracy needs tyro and the files of Fashion-MNIST. The rest needs torch, triton, torchvision, timm and pytest.
"""

import datetime
import gc
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from fastkd import bench
from fastkd.bench import ROOT, Record, log_rank0, markdown_table
from fastkd.bench.fashion import FOLDER
from fastkd.bench.losses.cases import cases
from fastkd.bench.losses.measure import COLUMNS, heading, measure_losses, notes, rows, show_losses
from fastkd.bench.steps.measure import measure_step
from fastkd.bench.steps.report import best_baseline, markdown, medians, ours, show_step, speed
from fastkd.bench.steps.workload import CIFAR, IMAGENET

TESTS = {"gpu": ["-m", "gpu or every", "tests"]}
SEEDS = 3
GUESS = 60.0  # seconds of a job, if none of its kind has run
STEPS = ["step", "fastkd", "img/s", "best baseline", "times as fast", "official eager", "timm task", "best compile"]
Job = tuple[str, str, Callable[[], Record]]  # kind, name and work


def main() -> int:
    parser = bench.script_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="few rounds, without torch.compile")
    parser.add_argument("--minutes", type=float, default=0, help="stop after so many; the same line continues")
    parser.add_argument("--file", type=Path, help="the JSON; by default the newest of this commit, or a new one")
    parser.add_argument("--fashion", type=Path, help="folder of the files of Fashion-MNIST")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_gate: no CUDA device here; nothing was run", file=sys.stderr)
        return 2
    gpu, end = torch.cuda.get_device_name(), time.perf_counter() + 60 * (args.minutes or float("inf"))
    path = args.file or place(bench.results_folder(gpu), args.quick)
    record = json.loads(path.read_text()) if path.is_file() else new_record(gpu, args.quick)
    device, quick = torch.device("cuda"), args.quick
    jobs: list[Job] = [("tests", name, partial(run_tests, words)) for name, words in TESTS.items()]
    jobs += [("losses", c.name, partial(shown, show_losses, measure_losses, [c], device, quick)) for c in cases(device)]
    steps = partial(shown, show_step, measure_step)
    jobs += [("steps", w.name, partial(steps, w, device, quick, not quick)) for w in (*CIFAR, *IMAGENET)]
    jobs.append(("accuracy", "fashion", partial(run_accuracy, args.fashion, path, end)))
    status = work_off(jobs, record, path, end)
    said = "green" if status == 0 else "something of fastkd is wrong or broke"
    if status == 3:
        said = "the time is up, the same line goes on"
    elif not green(record):
        said = "a test is red, so nothing was timed"
    log_rank0(f"{said}; {path}")
    return status


def new_record(gpu: str, quick: bool) -> Record:
    about = {"gpu": gpu, "commit": bench.commit(), "quick": quick, "environment": bench.environment()}
    return about | {"tests": {}, "losses": {}, "steps": {}, "accuracy": {}, "seconds": {}}


def place(folder: Path, quick: bool) -> Path:
    """The newest file of this commit and `quick`, or a new one."""
    for path in sorted(folder.glob("*-gate.json"), reverse=True):
        record = json.loads(path.read_text())
        if "seconds" in record and (record["commit"], record["quick"]) == (bench.commit(), quick):
            return path
    now = datetime.datetime.now()
    path = folder / f"{now:%Y-%m-%d}-gate.json"
    return path if not path.exists() else folder / f"{now:%Y-%m-%d-%H%M%S}-gate.json"


def work_off(jobs: list[Job], record: Record, path: Path, end: float) -> int:
    """Run the jobs that are not in `record` yet and write each result to `path`. Gives the exit status."""
    ran = 0
    for kind, name, work in jobs:
        if kind != "tests" and not green(record):
            break
        if f"{kind} {name}" in record["seconds"]:
            continue
        seconds = [s for job, s in record["seconds"].items() if job.split()[0] == kind]
        if ran and time.perf_counter() + max(seconds, default=GUESS) > end:  # the longest of its kind so far
            return 3
        log_rank0(f"{kind}: {name}")
        start = time.perf_counter()
        try:
            found = work()
        except Exception as error:  # the other jobs go on
            found = {"error": bench.first_line(error)}
        gc.collect()
        torch.cuda.empty_cache()  # does nothing without a GPU
        record[kind][name] = found
        if not found.get("unfinished"):
            record["seconds"][f"{kind} {name}"] = round(time.perf_counter() - start, 1)
        bench.write_json(path, record)
        path.with_suffix(".md").write_text(report(record))
        if found.get("unfinished"):
            return 3
        ran += 1
    return 0 if green(record) and all_right(record) else 1


def run_tests(words: list[str]) -> Record:
    """Exit status, seconds and the last lines of pytest."""
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "--color=no", *words]
    settings = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    start = time.perf_counter()
    run = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True)
    seconds = round(time.perf_counter() - start, 1)
    tail = (run.stdout + run.stderr).strip().splitlines()[-40:] or ["printed nothing"]
    log_rank0(f"pytest {' '.join(words)}: {tail[-1]}")
    return {"command": " ".join(command[1:]), "status": run.returncode, "seconds": seconds, "output": tail}


def shown(show: Callable[[Record], None], measure: Callable[..., Record], *given: object) -> Record:
    """The record of `fastkd bench loss` or `step`, which is also printed."""
    found = measure(*given, log_rank0)
    show(found)
    return found


def run_script(words: list[object]) -> list[str]:
    """The lines that a script of this folder prints. Raises RuntimeError if it fails."""
    command = [sys.executable, *map(str, words)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = (run.stdout + run.stderr).strip().splitlines()
    if run.returncode:
        raise RuntimeError(lines[-1] if lines else f"{words[0]} ended with {run.returncode}")
    return lines


def run_accuracy(folder: Path | None, path: Path, end: float) -> Record:
    """accuracy.py, whose file lies beside the gate's. It resumes by itself."""
    missing = [name for name in ("tyro", "rich", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing or not any((folder or FOLDER).glob("train-images-idx3-ubyte*")):
        reason = f"{', '.join(missing)} missing" if missing else f"no files in {folder or FOLDER}"
        return {"skipped": f"not run: {reason}"}
    own, left = path.with_name(path.stem + "-accuracy-fashion.json"), (end - time.perf_counter()) / 60
    words = ["bench/scripts/accuracy.py", "--data", "fashion", "--seeds", SEEDS, "--folder", folder or FOLDER]
    words += ["--file", own, *(["--minutes", max(left - 1, 0.1)] if left < float("inf") else [])]
    lines = run_script(words)
    table = [line for line in lines if line.startswith("|")]
    unfinished = any("are over" in line for line in lines)
    return {"runs": json.loads(own.read_text()), "output": table} | ({"unfinished": True} if unfinished else {})


def green(record: Record) -> bool:
    """True if no test has failed so far."""
    return all(tests.get("status") == 0 for tests in record["tests"].values())


def all_right(record: Record) -> bool:
    """True if no job failed and every way of fastkd gives the right result."""
    kinds = ("tests", "losses", "steps", "accuracy")
    if any("error" in run for kind in kinds for run in record[kind].values()):
        return False
    ours = [run["cases"][0]["contenders"]["fastkd"] for run in record["losses"].values()]
    for run in record["steps"].values():
        ours += [way for name, way in run.get("contenders", {}).items() if name.startswith("fastkd")]
    return all(way["status"] == "right" for way in ours)


def report(record: Record) -> str:
    """The record as Markdown."""
    about = f"{record['gpu']}, commit {(record['commit'] or 'unknown')[:12]}, torch {record['environment']['torch']}"
    parts = [f"# GPU gate: {about}", "## Tests", tests(record["tests"])]
    if record["losses"]:
        parts += ["## Losses", losses(record["losses"])]
    if record["steps"]:
        parts += ["## Steps", steps(record["steps"])]
    if found := record["accuracy"].get("fashion"):
        text = found.get("skipped") or found.get("error") or "\n".join(found["output"])
        parts += ["## Accuracy on Fashion-MNIST", text]
    return "\n\n".join(parts) + "\n"


def tests(runs: Record) -> str:
    lines = [[name, "passed" if run["status"] == 0 else "failed", f"{run['seconds']:.0f}", run["output"][-1]]
             for name, run in runs.items() if "status" in run]  # fmt: skip
    return markdown_table(["tests", "result", "s", "said"], lines) + errors(runs)


def losses(runs: Record) -> str:
    """One table of all cases, under the heading of the first."""
    measured = [run for run in runs.values() if "cases" in run]
    if not measured:
        return errors(runs).strip()
    whole = measured[0] | {"cases": [case for run in measured for case in run["cases"]]}
    table = markdown_table(COLUMNS, [row for case in whole["cases"] for row in rows(case)])
    said = "\n".join(f"- {note}" for note in notes(whole))
    return f"{heading(whole)}\n\n{table}{errors(runs)}\n\n{said}"


def steps(runs: Record) -> str:
    """A row for each workload, then its tables."""
    measured = {name: found for name, found in runs.items() if "contenders" in found}
    lines = []
    for name, found in measured.items():
        row, mine, other = ["-"] * 7, ours(found), best_baseline(found)
        if mine:
            compiled = next((way for way in medians(found) if way.startswith("compile")), "")
            ratios = [speed(found, mine, way) for way in (other, "official eager", "timm task", compiled)]
            row = [mine, f"{found['contenders'][mine]['img_per_s']:,.0f}", other or "-"]
            row += [f"{ratio:.2f}x" if ratio else "-" for ratio in ratios]
        lines.append([name, *row])
    more = "\n".join(markdown(found) for found in measured.values())
    return f"{markdown_table(STEPS, lines)}{errors(runs)}\n\n{more}".rstrip()


def errors(found: Record) -> str:
    return "".join(f"\n\n{name} failed: {run['error']}" for name, run in found.items() if "error" in run)


if __name__ == "__main__":
    sys.exit(main())
