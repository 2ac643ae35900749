"""Everything that needs a GPU, in one go: GPU tests, then benchmarks of losses, steps and teachers, then accuracy.

    python bench/gpu_gate.py                bench/results/<gpu>/<date>-gate.json, and a .md beside it
    python bench/gpu_gate.py --minutes 9    stops in time; the same line goes on where it stopped
    python bench/gpu_gate.py --quick        few rounds, without torch.compile

Every result is in the file at once. It is of one commit: another one begins a file of its own, unless --file names one.
Exit status 0: all tests pass and every result of fastkd is right. 1: not so; after a red test nothing is timed, and the
file says what failed. 2: no GPU here. 3: the time was up; the same line goes on.
Accuracy needs the files of Fashion-MNIST and tyro; all else torch, triton, torchvision, timm and pytest alone.
"""

import argparse
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

from fastkd.bench.cases import cases
from fastkd.bench.command import show
from fastkd.bench.common import commit, environment, write_json
from fastkd.bench.fashion import FOLDER
from fastkd.bench.forms import NETWORKS, measure
from fastkd.bench.gate_report import report
from fastkd.bench.measure import first_line
from fastkd.bench.pair import CIFAR, IMAGENET, Pair
from fastkd.bench.report import losses
from fastkd.bench.screen import log_rank0
from fastkd.bench.step import measure_step
from fastkd.bench.step_report import show_step

ROOT = Path(__file__).parent.parent
TESTS = {"gpu": ["-m", "gpu or every", "tests"]}
SEEDS = 3
GUESS = 60.0  # seconds of a job of which none has run
Job = tuple[str, str, Callable[[], dict]]


def options(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds, without torch.compile")
    parser.add_argument("--minutes", type=float, default=0, help="stop after so many; the same line goes on")
    parser.add_argument("--file", type=Path, help="the JSON; by default the newest of this commit, or a new one")
    parser.add_argument("--fashion", type=Path, default=FOLDER, help="folder of the files of Fashion-MNIST")
    return parser.parse_args(words)


def main() -> int:
    args = options()
    if not torch.cuda.is_available():
        print("gpu_gate: no CUDA device here; nothing was run", file=sys.stderr)
        return 2
    gpu, end = torch.cuda.get_device_name(), time.perf_counter() + 60 * (args.minutes or float("inf"))
    path = args.file or place(ROOT / "bench" / "results" / slug(gpu), args.quick)
    record = json.loads(path.read_text()) if path.is_file() else new_record(gpu, args.quick)
    device = torch.device("cuda")
    jobs = [("tests", name, partial(run_tests, words)) for name, words in TESTS.items()]
    jobs += [("losses", c.name, partial(losses, [c], device, args.quick)) for c in cases(device)]
    jobs += [("steps", pair.name, partial(run_step, pair, device, args.quick)) for pair in (*CIFAR, *IMAGENET)]
    jobs += [("forms", name, partial(measure, name, device)) for name in NETWORKS]
    jobs.append(("accuracy", "fashion", partial(run_accuracy, args.fashion, path, end)))
    status = work_off(jobs, record, path, end)
    log_rank0(f"{said(status, record)}; {path}")
    return status


def new_record(gpu: str, quick: bool) -> dict:
    about = {"gpu": gpu, "commit": commit(), "quick": quick, "environment": environment()}
    return about | {"tests": {}, "losses": {}, "steps": {}, "forms": {}, "accuracy": {}, "seconds": {}}


def place(folder: Path, quick: bool) -> Path:
    """The newest file of this commit, or a new one."""
    for path in sorted(folder.glob("*-gate.json"), reverse=True):
        record = json.loads(path.read_text())
        if "seconds" in record and (record["commit"], record["quick"]) == (commit(), quick):
            return path
    now = datetime.datetime.now()
    path = folder / f"{now:%Y-%m-%d}-gate.json"
    return path if not path.exists() else folder / f"{now:%Y-%m-%d-%H%M%S}-gate.json"


def work_off(jobs: list[Job], record: dict, path: Path, end: float) -> int:
    """Run what is not in `record` yet, keeping it at `path` as it comes; the exit status."""
    ran = 0
    for kind, name, work in jobs:
        if kind != "tests" and not green(record):
            break
        if f"{kind} {name}" in record["seconds"]:
            continue
        if ran and time.perf_counter() + expected(record, kind) > end:
            return 3
        log_rank0(f"{kind}: {name}")
        start = time.perf_counter()
        keep(record, kind, name, attempt(work))
        if not record[kind].get(name, {}).get("unfinished"):
            record["seconds"][f"{kind} {name}"] = round(time.perf_counter() - start, 1)
        write_json(path, record)
        path.with_suffix(".md").write_text(report(record))
        ran += 1
        if record[kind].get(name, {}).get("unfinished"):
            return 3
    return 0 if green(record) and all_right(record) else 1


def expected(record: dict, kind: str) -> float:
    """Seconds: the longest that a job of this kind has taken."""
    return max((s for job, s in record["seconds"].items() if job.split()[0] == kind), default=GUESS)


def attempt(work: Callable[[], dict]) -> dict:
    """What the job found; or, where it broke, why: the others go on."""
    try:
        return work()
    except Exception as error:
        return {"error": first_line(error)}
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def keep(record: dict, kind: str, name: str, found: dict) -> None:
    if kind != "losses":
        record[kind][name] = found
    elif "error" in found:
        record["losses"].setdefault("errors", {})[name] = found["error"]
    else:  # the cases of all are one list
        before = record["losses"].get("cases", []), record["losses"].get("errors", {})
        record["losses"] = found | {"cases": [*before[0], *found["cases"]], "errors": before[1]}
        show(found)


def run_tests(words: list[str]) -> dict:
    """Status, seconds and the end of what pytest printed."""
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "--color=no", *words]
    settings = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    start = time.perf_counter()
    run = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True)
    tail = (run.stdout + run.stderr).strip().splitlines()[-40:] or ["printed nothing"]
    log_rank0(f"pytest {' '.join(words)}: {tail[-1]}")
    seconds = round(time.perf_counter() - start, 1)
    return {"command": " ".join(command[1:]), "status": run.returncode, "seconds": seconds, "output": tail}


def run_step(pair: Pair, device: torch.device, quick: bool) -> dict:
    found = measure_step(pair, device, quick, not quick, log_rank0)
    show_step(found)
    return found


def run_accuracy(folder: Path, path: Path, end: float) -> dict:
    """bench/accuracy.py, which keeps a file of its own beside the gate's and goes on by itself."""
    missing = [name for name in ("tyro", "rich", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing or not any(folder.glob("train-images-idx3-ubyte*")):
        return {"skipped": f"not run: {', '.join(missing)} missing" if missing else f"not run: no files in {folder}"}
    own, left = path.with_name(path.stem + "-accuracy-fashion.json"), (end - time.perf_counter()) / 60
    command = [sys.executable, "bench/accuracy.py", "--data", "fashion", "--seeds", SEEDS, "--folder", folder]
    command += ["--file", own, *(["--minutes", max(left - 1, 0.1)] if left < float("inf") else [])]
    run = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    lines = (run.stdout + run.stderr).strip().splitlines()
    if run.returncode:
        return {"error": lines[-1] if lines else f"bench/accuracy.py ended with {run.returncode}"}
    table = [line for line in lines if line.startswith("|")]
    unfinished = any("are over" in line for line in lines)
    return {"runs": json.loads(own.read_text()), "output": table} | ({"unfinished": True} if unfinished else {})


def green(record: dict) -> bool:
    """No test was red so far."""
    return all(tests.get("status") == 0 for tests in record["tests"].values())


def all_right(record: dict) -> bool:
    """Nothing broke, and every way of fastkd gives the right result."""
    whole = [case["contenders"]["fastkd"] for case in record["losses"].get("cases", [])]
    for found in record["steps"].values():
        whole += [way for name, way in found.get("contenders", {}).items() if name.startswith("fastkd")]
    others = ("tests", "steps", "forms", "accuracy")
    broken = [run for kind in others for run in record[kind].values() if "error" in run]
    return not broken and not record["losses"].get("errors") and all(found["status"] == "right" for found in whole)


def said(status: int, record: dict) -> str:
    if status == 3:
        return "the time is up, the same line goes on"
    if not green(record):
        return "a test is red, so nothing was timed"
    return "green" if status == 0 else "something of fastkd is wrong or broke"


def slug(gpu: str) -> str:
    """NVIDIA H100 80GB HBM3 -> h100-80gb-hbm3"""
    return gpu.lower().removeprefix("nvidia ").replace(" ", "-")


if __name__ == "__main__":
    sys.exit(main())
