"""The runs of accuracy.py: what all share, and one of them. A module of its own, so that other processes find it."""

import contextlib
import io
import json
import math
import os
import resource
import tempfile
import time
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from fastkd import bench
from fastkd.bench import Record
from fastkd.bench.fashion import PAD, create_fashion
from fastkd.config import parse
from fastkd.data import create_loaders
from fastkd.data.base import Loader
from fastkd.data.order import Shard
from fastkd.engine.precision import Precision
from fastkd.errors import UserError
from fastkd.evaluate import evaluate_networks
from fastkd.methods import METHODS
from fastkd.models import create_model
from fastkd.train import Trainer

TEACHER, STUDENT = "resnet20", "resnet8"
IMAGES = (18_000, 10_000)  # of Fashion-MNIST: to train, to evaluate
WATCHED = 500  # test images, or a few more, evaluated after each epoch: all would cost a quarter of a student's run
RECIPES = {
    "digits": "--recipe digits --epochs 6",
    "fashion": "--data fashion-mnist --batch-size 64 --epochs 8 --lr 0.05 --opt nesterov --weight-decay 5e-4 "
    "--sched multistep --decay-milestones 5 6 7 --decay-rate 0.1",
}
SEEDS = {"digits": 5, "fashion": 3}
NOT_SETTINGS = ("seed", "out", "resume", "device", "log", "log_interval", "extend", "report")


class Unit(NamedTuple):
    """A run. `name` is its line in the table."""

    name: str
    seed: int
    method: str
    options: dict[str, Any]


class Study:
    """What all runs share. `epochs`: 0 is the usual number. `images` of Fashion-MNIST, to train and to evaluate."""

    def __init__(
        self,
        data: str,
        epochs: int,
        device: torch.device,
        folder: Path,
        images: tuple[int, int] = IMAGES,
        amp_dtype: str = "auto",
    ):
        words = RECIPES[data].split() + (["--data-dir", str(folder)] if data == "fashion" else [])
        config = parse(["--method", "ce", *words, "--amp-dtype", amp_dtype], lambda line: None)
        train = config.train.stretched(epochs) if epochs else config.train
        self.name, self.data, self.train = data, config.data, replace(train, device=str(device))
        self.device, self.folder, self.images = device, folder, images

    def loaders(self, seed: int) -> tuple[Loader, Loader]:
        dtype = Precision(self.train.amp_dtype, self.device).dtype
        if self.name == "digits":
            return create_loaders(self.data, self.device, seed=seed, dtype=dtype, log=lambda line: None)
        return create_fashion(self.data.batch_size, self.device, Shard(seed, dtype=dtype), self.images, self.folder)

    def settings(self) -> Record:
        """What must be equal in all runs of one table."""
        train, val = self.loaders(0)
        options = {name: value for name, value in asdict(self.train).items() if name not in NOT_SETTINGS}
        named = {"data": self.name, "teacher": TEACHER, "student": STUDENT}
        counts = {"images": [train.samples, val.samples], "batch_size": self.data.batch_size}
        counts |= {"pad": PAD} if self.name == "fashion" else {}
        return dict(json.loads(json.dumps(named | counts | options)))


def train_one(this: Study, work: Path, unit: Unit) -> Record:
    """Accuracies of a method's networks after the last epoch, and the times. "teacher" writes `teacher_of` its seed."""
    train, val = this.loaders(unit.seed)
    watched = list(islice(val, math.ceil(WATCHED / this.data.batch_size)))
    kind = METHODS[unit.method]
    is_teacher, file = unit.name == "teacher", teacher_of(work, unit.seed)

    def network(name: str, number: int = 0, weights: Path | None = None) -> nn.Module:
        torch.manual_seed(unit.seed + number)  # the same initial weights in all methods; a peer has others
        return create_model(name, len(train.classes), weights)

    teacher = network(TEACHER, weights=file) if kind.needs_teacher else None
    peers = [network(STUDENT, number=1)] if kind.needs_peers else []
    options = kind.Options(**unit.options)
    method = kind(network(TEACHER if is_teacher else STUDENT), teacher, options, peers)
    start, cpu = time.perf_counter(), _cpu_seconds()
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()) as printed:
        trainer = Trainer(method, train, watched, replace(this.train, seed=unit.seed, out=f"{out}/run"))
        result = trainer.fit()
        found = evaluate_networks(trainer.networks, val, Precision(this.train.amp_dtype, this.device))
        if is_teacher:
            _copy(result.student, file)
    record: Record = {key: value for key, value in found.items() if key.endswith(("top1", "val_loss"))}
    warnings = [line for line in printed.getvalue().splitlines() if line.startswith("warning")]
    seconds = {"seconds": time.perf_counter() - start, "cpu_seconds": _cpu_seconds() - cpu}
    record |= {name: round(value, 1) for name, value in seconds.items()} | {"options": asdict(options)}
    return record | ({"warnings": warnings} if warnings else {})


def _cpu_seconds() -> float:
    """Time of this process and its threads in user code: other work on the machine does not count."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_utime


def _copy(source: Path, target: Path) -> None:
    """Copy a file, whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}")
    part.write_bytes(source.read_bytes())
    os.replace(part, target)


def teacher_of(work: Path, seed: int) -> Path:
    return work / f"teacher{seed}.safetensors"


def try_one(this: Study, work: Path, unit: Unit) -> Record:
    """`train_one`; a run that fails has an "error"."""
    try:
        found = train_one(this, work, unit)
    except UserError as error:
        found = {"error": str(error)}
    return found | {"commit": bench.commit(), "load_average": bench.load_average()}
