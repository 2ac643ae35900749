"""Top-1 of the teacher, the student alone and every method: same networks, same recipe, same number of epochs.

    python bench/scripts/accuracy.py --jobs 2                  Fashion-MNIST, 3 seeds: 3 hours on two cores
    python bench/scripts/accuracy.py --jobs 2 --minutes 30     stops in time; the same line continues
    python bench/scripts/accuracy.py --jobs 2 --study iakd     options of IAKD instead of all methods
    python bench/scripts/accuracy.py --table                   table and picture of the finished runs

resnet20 teaches resnet8; peers are resnet8. Each method has its default options. Of Fashion-MNIST, the first 1,800
images of each class are for training; all 10,000 test images are evaluated, once, after the last epoch. The schedule is
that of the CIFAR-100 benchmark (batch 64, SGD at 0.05, a tenth of it at 5/8, 6/8 and 7/8 of the run; RepDistiller),
over 8 epochs, which are 2,256 steps. `--data digits` takes the embedded digits with the recipe `digits`.

All methods of a seed share one teacher; their students start with the same weights and see the same batches. --jobs 2
runs two processes of one thread each on two cores: one process with two threads needs 38 % more CPU time. Each finished
run is written at once to bench/results/<device>/<date>-accuracy-<data>.json; table and picture are written beside it.
"""

import argparse
import datetime
import hashlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as on the command line, before torch is loaded

import torch

from fastkd import bench
from fastkd.bench import Record
from fastkd.bench.fashion import FOLDER
from fastkd.bench.scripts.accuracy_runs import IMAGES, RECIPES, SEEDS, Study, Unit, teacher_of, try_one
from fastkd.bench.scripts.accuracy_table import draw, heading, table
from fastkd.bench.scripts.isolated import die_with_parent
from fastkd.errors import UserError, nearest
from fastkd.methods import METHODS

STUDIES: dict[str, list[dict[str, Any]]] = {
    "iakd": [
        *({"schedule": "linear", "p": (p,)} for p in (0.5, 0.8, 0.9)),
        *({"schedule": "review", "p": (p,)} for p in (0.8, 0.9)),
        {"schedule": "uniform", "p": (0.8,), "finish_epochs": 2.0},
        {"schedule": "review", "p": (0.8,), "teacher_bn": "batch"},
        {"schedule": "review", "p": (0.8,), "kd_weight": 1.0},
    ],
    "dcm": [{"cross_stage": 0.0}, {"kl_weight": 0.3}],
}
"""By method: options that are compared, with those of kd and of the student alone."""


Work = Callable[[Unit], Record]


def run_all(this: Study, path: Path, names: dict[str, tuple[str, dict[str, Any]]], args: argparse.Namespace) -> Record:
    """Run what is missing in the file at `path`, the teachers first, and write each result at once."""
    record = _open(path, this.settings())
    key = hashlib.blake2b(json.dumps(record["settings"]).encode(), digest_size=4).hexdigest()
    work, done, start = args.work / f"{args.data}-{key}", record["pairs"], time.perf_counter()
    units = [Unit("teacher", seed, "ce", {}) for seed in range(args.seeds)]
    units += [Unit(name, seed, *names[name]) for seed in range(args.seeds) for name in names]

    def is_missing(unit: Unit) -> bool:
        there = str(unit.seed) in done.get(unit.name, {})
        if unit.name == "teacher":
            return not (there and teacher_of(work, unit.seed).is_file())
        return args.again or not there

    def is_over() -> bool:
        return bool(args.minutes) and time.perf_counter() - start > 60 * args.minutes

    def is_ready(unit: Unit) -> bool:
        return not METHODS[unit.method].needs_teacher or str(unit.seed) in trained

    missing = [unit for unit in units if is_missing(unit)]
    trained = {str(seed) for seed in range(args.seeds)} - {str(unit.seed) for unit in missing if unit.name == "teacher"}
    count = len(units) - len(missing)
    for unit, found in results(missing, args.jobs, partial(try_one, this, work), is_ready, is_over):
        count += 1
        done.setdefault(unit.name, {})[str(unit.seed)] = found
        bench.write_json(path, record)
        shown = f"top-1 {found['top1']:6.2f} %  {found['seconds']:6.1f} s" if "top1" in found else found["error"]
        print(f"{count:3}/{len(units)}  seed {unit.seed}  {unit.name:12} {shown}", flush=True)
        if unit.name == "teacher":
            if "error" in found:
                raise UserError(f"the teacher of seed {unit.seed} failed: {found['error']}")
            trained.add(str(unit.seed))
    if count < len(units):
        print(f"--minutes {args.minutes:g} are over; the same command goes on", flush=True)
    return record


def results(
    units: list[Unit], jobs: int, work: Work, is_ready: Callable[[Unit], bool], is_over: Callable[[], bool]
) -> Iterator[tuple[Unit, Record]]:
    """Each unit's record when it is finished. `jobs` run side by side; none begins when `is_over`."""
    if jobs == 1:
        for unit in units:
            if is_over():
                return
            yield unit, work(unit)
        return
    waiting, running = list(units), dict[Future[Record], Unit]()
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(jobs, context, _begin, (max(1, len(os.sched_getaffinity(0)) // jobs),)) as pool:
        while True:
            while len(running) < jobs and not is_over() and (ready := next(filter(is_ready, waiting), None)):
                waiting.remove(ready)
                running[pool.submit(work, ready)] = ready
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()


def _begin(threads: int) -> None:
    """In each process of the pool."""
    die_with_parent()
    torch.set_num_threads(threads)


def _open(path: Path, settings: Record) -> Record:
    """The record at `path`, or a new one. Raises UserError if it has other settings."""
    if not path.is_file():
        return {"settings": settings, "environment": bench.environment(), "commit": bench.commit(), "pairs": {}}
    record: Record = json.loads(path.read_text())
    if record["settings"] != settings:
        other = [name for name in settings if record["settings"].get(name) != settings[name]]
        raise UserError(f"{path} was made with other settings ({', '.join(other)}): give another --file")
    print(f"{path}: {sum(map(len, record['pairs'].values()))} runs are there already", flush=True)
    return record


def runs_of(args: argparse.Namespace) -> dict[str, tuple[str, dict[str, Any]]]:
    """The lines of the table: (method, options). Raises UserError for an unknown method."""
    if args.study:
        shown = {" ".join(f"{key}={_text(value)}" for key, value in each.items()): each for each in STUDIES[args.study]}
        return {"ce": ("ce", {}), "kd": ("kd", {})} | {name: (args.study, each) for name, each in shown.items()}
    names = args.methods.split(",")
    for name in names:
        if name not in METHODS:
            raise UserError(f"--methods: unknown {name!r}{nearest(name, METHODS)}; there are {', '.join(METHODS)}")
    return {name: (name, {}) for name in names}


def _text(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def find_file(folder: Path, name: str, settings: Record | None) -> Path:
    """The newest record of this name, of these settings unless they are None; else the path of a new one."""
    for path in sorted(folder.glob(f"*-{name}.json"), reverse=True):
        if settings is None or json.loads(path.read_text())["settings"] == settings:
            return path
    return folder / f"{datetime.date.today()}-{name}.json"


def main(words: list[str] | None = None) -> None:
    args = _parser().parse_args(words)
    args.seeds = args.seeds or SEEDS[args.data]
    for name, least in (("seeds", 1), ("jobs", 1), ("epochs", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} must be {least} or more, got {getattr(args, name)}")
    device = torch.device(args.device)
    folder = bench.results_folder(torch.cuda.get_device_name(device) if device.type == "cuda" else None)
    name = f"accuracy-{args.data}" + (f"-{args.study}" if args.study else "")
    if args.table:
        path = args.file or find_file(folder, name, None)
        if not path.is_file():
            raise UserError(f"--table: there is no {path}; run without --table first")
        record = json.loads(path.read_text())
    else:
        names = runs_of(args)
        this = Study(args.data, args.epochs, device, args.folder, tuple(args.images), args.amp_dtype)
        record = run_all(this, path := args.file or find_file(folder, name, this.settings()), names, args)
    text = f"{heading(record)}\n\n{table(record)}"
    print(text)
    draw(record, path.with_suffix(".png"))
    path.with_suffix(".md").write_text(f"{text}\n")


def _parser() -> argparse.ArgumentParser:
    parser = bench.script_parser(__doc__)
    parser.add_argument("--data", choices=tuple(RECIPES), default="fashion")
    parser.add_argument("--seeds", type=int, default=0, help=f"0, 1, ... up to this number of seeds; {SEEDS}")
    parser.add_argument("--methods", default=",".join(METHODS), help="some of them, with commas between")
    parser.add_argument("--study", choices=tuple(STUDIES), help="options of this method instead of --methods")
    parser.add_argument("--epochs", type=int, default=0, help="of every run, with the schedule stretched to them")
    parser.add_argument(
        "--images", type=int, nargs=2, default=IMAGES, help="of fashion, to train and to evaluate; 0 all"
    )
    parser.add_argument("--amp-dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="as of training")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side; they share the cores")
    parser.add_argument("--minutes", type=float, default=0, help="begin no new run after so many")
    parser.add_argument("--again", action="store_true", help="run --methods again where the file has them")
    parser.add_argument("--table", action="store_true", help="train nothing: table and picture from the file")
    parser.add_argument("--file", type=Path, help="the JSON, by default the newest of these settings, or a new one")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the files of Fashion-MNIST")
    parser.add_argument("--work", type=Path, default=Path("runs/accuracy"), help="where the teachers are kept")
    parser.add_argument("--device", default=str(bench.default_device()))
    return parser


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"accuracy: {error}", file=sys.stderr)
        sys.exit(2)
