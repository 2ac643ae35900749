"""What a checkpoint costs the training: time, CPU time and memory.

    python bench/scripts/checkpoint_cost.py
    python bench/scripts/checkpoint_cost.py --rounds 12     on a quiet machine: whole epochs too

The state is that of resnet18 with the momentum of SGD. Each part of a checkpoint is measured by the clock and in CPU
time; other work on the machine disturbs the CPU time less.

    check    looking for numbers that are not finite, before each checkpoint
    held     what `Writer.save` takes from the loop: the copy of the state
    thread   what the thread does beside the steps: archive, hash, file. It shares the cores with them
    in all   check and held, and the thread's CPU time by the number of cores, as if the steps kept all of them busy

With `--rounds`, `fastkd.Trainer` trains epochs with `--checkpoint-every` and with "off" in turn. The difference by the
number of checkpoints is what one costs: `epochs`. An epoch's time ends when its last file is on the disk, before the
epoch's own checkpoint.
"""

import argparse
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command does, before torch is loaded

import numpy as np
import torch
from torch import Tensor

from fastkd import Trainer, TrainOptions
from fastkd.bench import Record, about_run, load_average, load_notes, script_parser, show_table, write_json
from fastkd.methods import CE
from fastkd.models import create_model
from fastkd.run.checkpoint import Writer
from fastkd.run.pace import Interval

MB = 1e6


class Times(NamedTuple):
    """Seconds by the clock, and of CPU time."""

    wall: float
    cpu: float


class Clocked:
    """A training loader of noise that times its epochs, and turns checkpoints on in every second one."""

    classes, samples = tuple("0123456789"), 0

    def __init__(self, steps: int, batch_size: int, side: int, every: int):
        self.images = torch.randn(batch_size, 3, side, side).contiguous(memory_format=torch.channels_last)
        self.target = torch.arange(batch_size) % 10
        self.steps, self.every, self.samples = steps, every, steps * batch_size
        self.trainer: Trainer | None = None
        self.epochs: list[dict[str, float]] = []

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if not self.trainer or not hasattr(self.trainer, "pace"):  # the batch that is tried before the training
            yield self.images, self.target
            return
        trainer, writer = self.trainer, self.trainer.writer
        writer.wait()
        on = len(self.epochs) % 2 == 1
        trainer.pace.every = Interval(self.every if on else 0)
        before = self._now(writer)
        for _ in range(self.steps):
            yield self.images, self.target
        writer.wait()
        self.epochs.append({name: value - before[name] for name, value in self._now(writer).items()})

    @staticmethod
    def _now(writer: Writer) -> dict[str, float]:
        return {
            "wall": time.perf_counter(),
            "cpu": time.process_time(),
            "held": writer.seconds,
            "checkpoints": writer.count,
        }

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass


class Peak:
    """The largest anonymous memory of this process while the block runs, in MB, above that at its start."""

    def __enter__(self) -> "Peak":
        self.before, self.most, self.ended = _anonymous(), 0.0, threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.cpu = 0.0  # seconds of CPU time that watching took
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.ended.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.ended.wait(0.005):
            self.most = max(self.most, _anonymous() - self.before)
            self.cpu = time.thread_time()


def _anonymous() -> float:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) * 1024 / MB


def trained(args: argparse.Namespace, folder: Path) -> tuple[Trainer, Clocked]:
    """A trainer after `args.rounds` pairs of epochs and a pair before, which warms up."""
    train = Clocked(args.steps if args.rounds else 2, 8, 64, args.every)
    options = TrainOptions(epochs=2 * args.rounds + 2, out=str(folder), checkpoint_every="off", device="cpu")
    student = create_model("torchvision/resnet18", num_classes=10)
    trainer = Trainer(CE(student), train, [(train.images, train.target)], options)
    train.trainer = trainer
    trainer.fit()
    return trainer, train


def parts(trainer: Trainer, folder: Path, times: int) -> tuple[dict[str, list[Times]], float]:
    """By name of a part: the times of each of so many checkpoints. And the peak of memory, in MB."""
    found: dict[str, list[Times]] = {"check": [], "held": [], "thread": []}
    peaks = []
    for number in range(times + 1):
        with Writer(folder) as writer, Peak() as peak:
            clock, cpu, main = time.perf_counter(), time.process_time(), time.thread_time()
            trainer.step.first_nonfinite()
            checked = time.perf_counter(), time.thread_time()
            writer.save({"history": [], "step": number, **trainer.step.state_dict()})
            held = time.perf_counter(), time.thread_time()
            writer.wait()
            end = time.perf_counter(), time.thread_time(), time.process_time() - cpu
        peaks.append(peak.most)
        found["check"].append(Times(checked[0] - clock, checked[1] - main))
        found["held"].append(Times(held[0] - checked[0], held[1] - checked[1]))
        found["thread"].append(Times(end[0] - held[0], end[2] - (end[1] - main) - peak.cpu))
    return {name: rows[1:] for name, rows in found.items()}, float(np.median(peaks[1:]))  # the first one warms up


def measure(args: argparse.Namespace, folder: Path) -> Record:
    torch.set_num_threads(1)
    trainer, train = trained(args, folder)
    found, peak = parts(trainer, folder, args.times)
    figures = {name: {"wall": median(rows, 0), "cpu": median(rows, 1)} for name, rows in found.items()}
    cores = len(os.sched_getaffinity(0))
    held = {way: figures["check"][way] + figures["held"][way] for way in ("wall", "cpu")}
    thread = figures["thread"]["cpu"] / cores
    figures["in all"] = {way: value + thread for way, value in held.items()}
    pairs = list(zip(train.epochs[2::2], train.epochs[3::2], strict=True))
    if pairs:
        count = round(pairs[0][1]["checkpoints"])
        more = {name: [(on[name] - off[name]) / count * 1e3 for off, on in pairs] for name in ("wall", "cpu")}
        figures["epochs"] = {name: float(np.median(values)) for name, values in more.items()}
    size = (folder / "last.pt").stat().st_size / MB
    return {"megabytes": size, "peak_mb": peak, "times": args.times, "ms": figures}


def median(rows: list[Times], way: int) -> float:
    return float(np.median([row[way] for row in rows])) * 1e3


def show(record: Record) -> None:
    print(
        f"state of {record['megabytes']:.0f} MB, median of {record['times']} checkpoints, "
        f"{record['environment']['cpus']} CPUs; a checkpoint takes {record['peak_mb']:.0f} MB beside the state"
    )
    rows = []
    for name, figure in record["ms"].items():
        whole = name in ("in all", "epochs")
        shares = [f"{figure['cpu'] / (100 * step):.2%}" if whole else "" for step in (250, 500, 1000)]
        rows.append([name, f"{figure['wall']:.0f}", f"{figure['cpu']:.0f}", *shares])
    show_table(["", "ms", "CPU ms", "100 x 0.25 s", "100 x 0.5 s", "100 x 1 s"], rows, numbers=5)
    print("The last columns are shares of 100 steps of so many seconds, of the CPU time")


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=0, help="pairs of epochs")
    parser.add_argument("--steps", type=int, default=20, help="of an epoch")
    parser.add_argument("--every", type=int, default=8, help="steps between two checkpoints that are measured")
    parser.add_argument("--times", type=int, default=15, help="checkpoints whose parts are measured")
    parser.add_argument("--json", help="where to write the figures")
    args = parser.parse_args()
    record = about_run(torch.device("cpu"), load_average())
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        record |= measure(args, Path(folder) / "run")
    show(record)
    print(*load_notes(record), sep="\n")
    if args.json:
        write_json(args.json, record)


if __name__ == "__main__":
    main()
