"""A long run of a tiny network: do memory, open files, threads, child processes or objects grow?

    python tests/faults/soak.py --steps 200000 --minutes 20
    torchrun --standalone --nproc-per-node 2 tests/faults/soak.py --steps 20000

`kd` of two networks with one convolution, with checkpoints within each epoch, and an evaluation after it. Each process
is sampled at the start of an epoch, when the checkpoint before is on the disk and the garbage is collected. The drift
is that of a straight line through the samples after the warm-up, the first fifth: its rise from end to end, as a part
of its middle. Memory is that of this process alone (USS), which leaves out what it shares with others, and RSS.
"""

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny import TinyLoader, TinyNet  # noqa: E402

from fastkd import Trainer, TrainOptions, distributed  # noqa: E402
from fastkd.methods import KD  # noqa: E402
from fastkd.report import log_rank0, show_table  # noqa: E402
from fastkd.signals import Stopped  # noqa: E402

PARTS = ("uss_mb", "rss_mb", "handles", "threads", "children", "objects")
ALLOWED = 0.01


def sample(step: int) -> dict[str, float]:
    """What this process holds now, after `step` steps."""
    gc.collect()
    lines = (line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    kb = {words[0].rstrip(":"): int(words[1]) for words in lines}
    children = [Path(task, "children").read_text().split() for task in Path("/proc/self/task").iterdir()]
    return {
        "step": step,
        "uss_mb": (kb["Private_Clean"] + kb["Private_Dirty"]) / 1e3,
        "rss_mb": kb["Rss"] / 1e3,
        "handles": len(os.listdir("/proc/self/fd")),
        "threads": len(children),
        "children": sum(map(len, children)),
        "objects": len(gc.get_objects()),
    }


def drift(values: list[float]) -> float:
    """The rise of a straight line through the last four fifths of `values`, as a part of its middle; 0.01 is 1 %."""
    kept = np.asarray(values[len(values) // 5 :], dtype=float)
    if len(kept) < 2 or not kept.any():
        return 0.0
    slope, _ = np.polyfit(np.arange(len(kept)), kept, 1)
    return float(slope * (len(kept) - 1) / kept.mean())


class Sampled(TinyLoader):
    """A training loader that samples this process at the start of each epoch, and asks the run to stop in time."""

    def __init__(self, steps: int, minutes: float):
        super().__init__(samples=8 * 64, batch_size=8)
        self.steps, self.samples, self.end = steps, 8 * steps, time.monotonic() + 60 * minutes
        self.trainer: Trainer | None = None
        self.found: list[dict[str, float]] = []

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        trainer = self.trainer
        if trainer and hasattr(trainer, "pace"):
            trainer.writer.wait()
            self.found.append(sample(trainer.steps))
            if time.monotonic() > self.end:
                trainer.pace.request.name = trainer.pace.request.name or "SIGTERM"
        self.epoch += 1
        for number in range(self.steps):
            part = slice(8 * (number % 64), 8 * (number % 64) + 8)
            yield self.images[part], self.target[part]


def soak(folder: Path, args: argparse.Namespace) -> list[dict[str, float]]:
    """The samples of this process."""
    torch.set_num_threads(1)
    loader = Sampled(args.epoch, args.minutes)
    options = TrainOptions(
        epochs=max(1, args.steps // args.epoch),
        checkpoint_every=str(args.every),
        ema_decay=0.99,
        warmup_epochs=0,
        device="cpu",
        out=str(folder),
    )
    torch.manual_seed(0)
    val = TinyLoader(samples=17, seed=1, shuffle=False)
    loader.trainer = trainer = Trainer(KD(TinyNet(), TinyNet()), loader, val, options)
    try:
        trainer.fit()
    except Stopped as stop:
        log_rank0(f"{stop}, as the time is up")
    return loader.found


def show(rank: int, found: list[dict[str, float]]) -> bool:
    """Print a table of one process. True if everything drifts by less than 1 %."""
    rows, kept = [], found[len(found) // 5 :]
    drifts = {part: drift([each[part] for each in found]) for part in PARTS}
    for part in PARTS:
        values = [kept[0][part], kept[len(kept) // 2][part], kept[-1][part]]
        rows.append([part, *(f"{value:.1f}" for value in values), f"{drifts[part]:+.2%}"])
    log_rank0(f"process {rank}: {found[-1]['step']:,} steps, {len(found)} samples")
    show_table(["", f"step {kept[0]['step']:,}", "middle", "end", "drift"], rows, numbers=4)
    return all(abs(value) < ALLOWED for value in drifts.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200_000)
    parser.add_argument("--minutes", type=float, default=20, help="the run ends after so many at the latest")
    parser.add_argument("--epoch", type=int, default=500, help="steps of an epoch")
    parser.add_argument("--every", type=int, default=200, help="steps between two checkpoints within an epoch")
    parser.add_argument("--json", help="where to write the samples")
    args = parser.parse_args()
    distributed.device_for("cpu")
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        found = distributed.gather(soak(Path(distributed.from_rank_zero(str, folder)) / "run", args))
        seconds = time.monotonic() - start
    if distributed.rank() == 0:
        if args.json:
            Path(args.json).write_text(json.dumps(found) + "\n")
        log_rank0(f"{seconds:.0f} s")
        flat = [show(rank, samples) for rank, samples in enumerate(found)]
        sys.exit(not all(flat))


if __name__ == "__main__":
    main()
