"""What people see of a run: the progress bar, a line per epoch, and the files of the run folder."""

import csv
import io
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn

from . import checkpoint, distributed
from .environment import environment
from .errors import UserError

FILES = """\
A run of fastkd.

    config.yaml           the effective options; `fastkd train --config config.yaml --out ELSEWHERE` repeats the run
    environment.json      versions, devices and the command
    history.csv, .jsonl   one row per epoch: learning rate, loss terms, accuracy in %, images/s
    curves.png            the same as a picture, at the end of the run
    last.pt               everything `fastkd train --out HERE --resume` needs, after the last finished epoch
    best.pt               the same after the epoch with the best accuracy; `fastkd eval --weights best.pt --model NAME`
    student.safetensors   the trained student after the last epoch; `fastkd eval --weights student.safetensors`
    peer1.safetensors     likewise a network that learnt beside the student; improved_teacher.safetensors: of SOKD
    autoencoder.safetensors, paraphraser.safetensors: the encoder of the teacher's maps, of iekd and ft
    teacher/, alone/      runs of their own, where a teacher or the student alone was trained for this one
"""


class Report:
    """One run's screen and folder. Only rank 0 prints and writes."""

    def __init__(self, config, about: dict, data: dict):
        self.config, self.out = config, Path(config.out)
        # What `fastkd eval` must know of the images; the digits have their own size and normalisation.
        names = () if about.get("data") == "digits" else ("image_size", "mean", "std")
        self.about = {"data": data, "input": {name: about[name] for name in names if name in about}}
        self.models = {"student": about.get("student", ""), "improved_teacher": about.get("teacher", "")}
        self.models |= {f"peer{number}": name for number, name in enumerate(about.get("peers", ()), 1)}
        self.main = distributed.rank() == 0
        board = board_class() if config.tensorboard and self.main else None
        if self.main:
            checkpoint.claim_folder(self.out, plain(asdict(config) | about), config.resume)
            checkpoint.write_atomic(self.out / "environment.json", json.dumps(environment(), indent=2) + "\n")
            checkpoint.write_atomic(self.out / "README.txt", FILES)
        self.board = board(self.out / "tensorboard") if board else None

    def epoch(self, history: list[dict]) -> None:
        """The line of the epoch, the history files, TensorBoard."""
        row = history[-1]
        log_rank0(
            f"epoch {row['epoch']:>3}/{self.config.epochs}  {terms_of(row)}{shares_of(row)}  "
            f"top-1 {row['top1']:.2f} %  val loss {row['val_loss']:.4f}  lr {row['lr']:.4g}  "
            f"{row['img_per_s']:,.0f} img/s"
        )
        self._write_history(history)
        if self.board:
            for name, value in row.items():
                self.board.add_scalar(name, value, row["epoch"])

    def _write_history(self, history: list[dict]) -> None:
        table = io.StringIO()
        names = dict.fromkeys(name for row in history for name in row)  # a term may be missing in an epoch
        writer = csv.DictWriter(table, fieldnames=list(names), lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
        checkpoint.write_atomic(self.out / "history.csv", table.getvalue())
        checkpoint.write_atomic(self.out / "history.jsonl", "".join(json.dumps(row) + "\n" for row in history))

    def finish(self, history: list[dict], networks: dict[str, nn.Module]) -> None:
        if not self.main:
            return
        from .curves import plot

        self._write_history(history)  # once more: the run may have been killed between its checkpoint and this file
        checkpoint.write_atomic(self.out / "curves.png", plot(history))
        for name, net in networks.items():
            about = self.about | {"model": self.models.get(name, "")}
            checkpoint.save_network(self.out / f"{name}.safetensors", net, about)
        if self.board:
            self.board.close()


def board_class() -> type:
    """TensorBoard's writer; raises UserError where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(f"--tensorboard: {error}; pip install 'fastkd[tensorboard]'") from None
    return SummaryWriter


class Bar:
    """The bar of a whole run: images/s of this epoch, loss terms, time left."""

    def __init__(self, epochs: int, epoch: int, steps: int):
        columns = [TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[shown]}")]
        columns += [TimeRemainingColumn(), TextColumn("left")]
        screen = console()
        self.progress = Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal)
        self.task = self.progress.add_task("", total=epochs * steps, completed=epoch * steps, shown="")
        self.epochs = epochs

    def start_epoch(self, epoch: int) -> None:
        self.progress.update(self.task, description=f"epoch {epoch + 1}/{self.epochs}")
        self.images, self.started, self.shown_at = 0, time.perf_counter(), time.perf_counter()

    def advance(self, images: int, meter) -> None:
        """Count a step; once a second read the device's counters for the display (the only sync between epochs)."""
        self.images += images * distributed.world_size()
        self.progress.advance(self.task)
        if self.progress.disable or time.perf_counter() < self.shown_at + 1:
            return
        self.shown_at = time.perf_counter()
        shown = f"{self.rates()['img_per_s']:,.0f} img/s  {terms_of(meter.read(everywhere=False))}"
        self.progress.update(self.task, shown=shown)

    def rates(self) -> dict[str, float]:
        seconds = time.perf_counter() - self.started
        return {"img_per_s": round(self.images / seconds, 1), "train_s": round(seconds, 2)}


def track(steps: Sequence, title: str) -> Iterable:
    """`steps` with a bar of their own, for what a method does before the first epoch."""
    log_rank0(title)
    screen = console()
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("left"),
    ]
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as progress:
        yield from progress.track(steps, description=title)


NOT_TERMS = ("epoch", "lr", "img_per_s", "train_s")
SCORES = ("top1", "top5", "val_loss", "share")  # with the name of a network or a gate before


def loss_terms(row: dict) -> dict[str, float]:
    return {name: x for name, x in row.items() if not (name in NOT_TERMS or name.endswith(SCORES))}


def terms_of(row: dict) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in loss_terms(row).items())


def shares_of(row: dict) -> str:
    shares = [f"{value:.2f}" for name, value in row.items() if name.endswith("share")]
    return f"  student's share {' '.join(shares)}" if shares else ""


def plain(config: dict) -> dict:
    """Tuples as lists: YAML's safe form."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}


def console() -> Console:
    """Where rank 0 prints; the other processes are silent."""
    return Console(quiet=distributed.rank() != 0)


def log_rank0(message: str) -> None:
    console().print(message, highlight=False, markup=False, soft_wrap=True)


def show_table(columns: list[str], rows: list[list[str]], numbers: int = 0) -> None:
    """A table on the screen; the last `numbers` columns are numbers and stand to the right."""
    table = Table()
    for place, column in enumerate(columns):
        justify = "left" if place < len(columns) - numbers else "right"
        table.add_column(column, justify=justify, overflow="fold")  # nothing is cut off
    for row in rows:
        table.add_row(*row)
    console().print(table)
