"""Everything that needs a GPU, in order of worth: GPU tests, then benchmarks of steps, teacher forms and losses.

    python bench/scripts/gpu_gate.py                bench/results/<gpu>/<date>-gate.json, and a .md beside it
    python bench/scripts/gpu_gate.py --minutes 9    stops in time; the same line continues where it stopped
    python bench/scripts/gpu_gate.py --quick        few rounds, without torch.compile
    tests/null_device/run python bench/scripts/gpu_gate.py --dry-run --file FILE
                                                    every stage once, small, on a device that computes nothing

In a clone without git, in which nothing is installed, this line does the same. OUT is a folder that is kept; FILE is
the file of the last call, if there was one.

    ln -sfn ../kernels fastkd/kernels; ln -sfn ../bench fastkd/bench; cp FILE OUT/gate.json
    PYTHONPATH=. python bench/scripts/gpu_gate.py --minutes 9 --commit HASH --file OUT/gate.json

Each job has a process and a time limit of its own, and its result is written at once: what is red, hangs or breaks the
device does not stop the jobs after it. A file holds one commit and one GPU. Exit status: 0 if all tests pass and every
result of fastkd is right; 1 if not; 2 if nothing could be run; 3 if the time was up, and the same line continues.
Needed are torch, triton, torchvision, timm and pytest. Accuracy also needs tyro and the files of Fashion-MNIST.
"""

import datetime
import json
import os
import sys
import time
from pathlib import Path

import torch

from fastkd import bench
from fastkd.bench import ROOT, Record, log_rank0
from fastkd.bench.scripts.gate_jobs import Job, all_jobs, dry_jobs
from fastkd.bench.scripts.gate_report import KINDS, all_right, report, summary
from fastkd.bench.scripts.isolated import Keep, run_isolated
from fastkd.errors import UserError

LIMITS = {"tests": 420.0, "steps": 480.0, "forms": 240.0, "losses": 300.0, "accuracy": float("inf")}  # seconds
GUESS = 60.0  # seconds of a job, if none of its kind has run
Commit = str | None


def main() -> int:
    parser = bench.script_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="few rounds, without torch.compile")
    parser.add_argument("--minutes", type=float, default=0, help="stop after so many; the same line continues")
    parser.add_argument("--file", type=Path, help="the JSON; by default the newest of this commit, or a new one")
    parser.add_argument("--commit", help="what is measured, where there is no git")
    parser.add_argument("--fashion", type=Path, help="folder of the files of Fashion-MNIST")
    parser.add_argument("--dry-run", action="store_true", help="on the null device, into --file; nothing is judged")
    args = parser.parse_args()
    args.file = args.file and args.file.resolve()
    end = time.perf_counter() + 60 * (args.minutes or float("inf"))
    try:
        about = check_device(args.dry_run, args.file)
        about |= {"quick": args.quick or args.dry_run, "dry_run": args.dry_run}
        path, record = opened(about, args.file, args.commit)
    except UserError as error:
        print(f"gpu_gate: {error}; nothing was run", file=sys.stderr)
        return 2
    bench.write_json(path, record)  # a kill in the first job must not lose the commit
    jobs = dry_jobs() if args.dry_run else all_jobs(args.quick, args.fashion, path, end)
    status = work_off(jobs, record, path, end)
    said = {0: "green", 1: "something of fastkd is wrong or broke", 3: "the time is up, the same line goes on"}[status]
    log_rank0(f"{said}; {path}")
    return status


def check_device(dry: bool, file: Path | None) -> Record:
    """The GPU and the environment. Raises UserError if nothing can be run. This process must not touch CUDA itself."""
    if os.environ.get("TRITON_INTERPRET"):
        raise UserError("TRITON_INTERPRET is set, so kernels would run on the CPU; unset it")
    if dry and (file is None or file.is_relative_to(ROOT / "bench" / "results")):
        raise UserError(f"--dry-run needs a --file outside of bench/results, got {file}: its figures mean nothing")

    def about(keep: Keep) -> Record:
        return {"gpu": torch.cuda.get_device_name(), "environment": bench.environment()}

    if dry != ("NULL_DEVICE" in os.environ):
        hint = "start it by tests/null_device/run" if dry else "on that one, give --dry-run and --file"
        raise UserError(f"--dry-run is for the device that computes nothing and for no other; {hint}")
    found = run_isolated(about, 120, lambda line: None)
    if "error" in found:
        raise UserError(f"no CUDA device here ({found['error']})")
    return found


def opened(about: Record, file: Path | None, commit: Commit) -> tuple[Path, Record]:
    """The file to write, and what it holds. Raises UserError if it holds something else than what is to be run."""
    path = file or place(bench.results_folder(about["gpu"]), about["quick"], commit or bench.commit())
    if not path.is_file():
        return path, new_record(about, commit or bench.commit())
    record: Record = json.loads(path.read_text())
    if not {"gpu", "commit", "quick", "dry_run", "seconds", *KINDS} <= record.keys():
        raise UserError(f"{path} is no file of this gate; name another --file")
    now = commit or bench.commit()  # without git it is the file's, unless it is given
    wanted = {name: about[name] for name in ("gpu", "quick", "dry_run")} | ({"commit": now} if now else {})
    for name, value in wanted.items():
        if record[name] != value:
            raise UserError(f"{path} has {name} {record[name]!r}, now it is {value!r}; name another --file")
    return path, record


def new_record(about: Record, commit: Commit) -> Record:
    return about | {"commit": commit} | {kind: {} for kind in KINDS} | {"seconds": {}}


def place(folder: Path, quick: bool, commit: Commit) -> Path:
    """The newest file of this commit and `quick`, or a new one."""
    for path in sorted(folder.glob("*-gate.json"), reverse=True):
        record = json.loads(path.read_text())
        if "dry_run" in record and (record["commit"], record["quick"]) == (commit, quick):
            return path
    now = datetime.datetime.now()
    path = folder / f"{now:%Y-%m-%d}-gate.json"
    return path if not path.exists() else folder / f"{now:%Y-%m-%d-%H%M%S}-gate.json"


def work_off(jobs: list[Job], record: Record, path: Path, end: float) -> int:
    """Run the jobs that are not in `record` yet and write each result to `path`. Gives the exit status."""
    first = True
    for job in jobs:
        if job.key in record["seconds"]:
            continue
        seconds = [s for key, s in record["seconds"].items() if key.split()[0] == job.kind]
        if not first and time.perf_counter() + max(seconds, default=GUESS) > end:  # the longest of its kind so far
            return 3
        log_rank0(f"{job.kind}: {job.name}")
        start = time.perf_counter()
        found = run_isolated(job.work, min(LIMITS[job.kind], max(end - start, 1.0)), log_rank0)
        cut_short = found.get("timed_out") and start + LIMITS[job.kind] > end
        if found.get("unfinished") or (cut_short and not first):  # the first of a slice had the whole of it
            finish(job, found, None, record, path)
            return 3
        finish(job, found, time.perf_counter() - start, record, path)
        first = False
    return 0 if all_right(record) else 1


def finish(job: Job, found: Record, seconds: float | None, record: Record, path: Path) -> None:
    """Write a result; without `seconds` it is run again in the next slice."""
    if "commit" in found:
        found["commit"] = record["commit"]  # without git the job does not know it
    log_rank0(f"{job.kind}: {job.name}: {summary(job.kind, found)}")
    record[job.kind][job.name] = found
    if seconds is not None:
        record["seconds"][job.key] = round(seconds, 1)
    bench.write_json(path, record)
    text = path.with_suffix(".md")
    part = text.with_name(f".{text.name}")
    try:
        part.write_text(report(record))
    except Exception as error:  # the figures are in the JSON; rented time goes on
        part.write_text(f"The report failed: {bench.first_line(error)}\n")
    part.replace(text)


if __name__ == "__main__":
    sys.exit(main())
