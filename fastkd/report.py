"""Screen output of a run (progress bar, one line per epoch) and the files of the run folder."""

import csv
import io
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn

from . import checkpoint, distributed
from .curves import loss_terms, plot
from .environment import environment
from .errors import UserError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from .engine import TrainOptions
    from .metrics import Meter

T = TypeVar("T")
Row = dict[str, Any]  # one epoch of the history

FILES = """\
This folder holds one run of fastkd.

    config.yaml           the effective options; `fastkd train --config config.yaml --out OTHER` repeats the run
    environment.json      versions, devices and the command
    history.csv, .jsonl   one row per epoch: learning rate, loss terms, accuracy in %, images/s
    curves.png            the history as a picture, drawn at the end of the run
    last.pt               checkpoint of the last finished epoch; `fastkd train --out FOLDER --resume` continues it
    best.pt               checkpoint of the epoch with the best accuracy; `fastkd eval --weights best.pt --model NAME`
    student.safetensors   the student after the last epoch; `fastkd eval --weights student.safetensors`

Some methods and options add files:

    peer1.safetensors             the first network that learned beside the student, after the last epoch
    improved_teacher.safetensors  the improved teacher of sokd
    autoencoder.safetensors, paraphraser.safetensors    the encoder of the teacher's features, of iekd and ft
    teacher/, alone/              the runs that trained the teacher and the student alone
    tensorboard/                  the history for TensorBoard (--tensorboard)
"""


class Report:
    """Writes the lines, the files and the TensorBoard log of one run. Only rank 0 prints and writes.

    `about`: options beside the training options, for config.yaml; `student`, `teacher` and `peers` name the networks.
    `data`: a description of the data set, saved with each network. Raises UserError if the folder holds another run.
    """

    def __init__(self, config: "TrainOptions", about: dict[str, Any], data: dict[str, Any]):
        self.config, self.out = config, Path(config.out)
        # `fastkd eval` needs these to prepare images. The digits have a fixed size and normalisation.
        names = () if about.get("data") == "digits" else ("image_size", "mean", "std")
        self.about = {"data": data, "input": {name: about[name] for name in names if name in about}}
        self.models = {"student": about.get("student", ""), "improved_teacher": about.get("teacher", "")}
        self.models |= {f"peer{number}": name for number, name in enumerate(about.get("peers", ()), 1)}
        self.main = distributed.rank() == 0
        board = board_class() if config.tensorboard and self.main else None
        if self.main:
            checkpoint.claim_folder(self.out, _tuples_as_lists(asdict(config) | about), config.resume)
            checkpoint.write_atomic(self.out / "environment.json", json.dumps(environment(), indent=2) + "\n")
            checkpoint.write_atomic(self.out / "README.txt", FILES)
        self.board = board(self.out / "tensorboard") if board else None

    def epoch(self, history: list[Row]) -> None:
        """Print the line of the last epoch, and write the history files and TensorBoard."""
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

    def _write_history(self, history: list[Row]) -> None:
        table = io.StringIO()
        names = dict.fromkeys(name for row in history for name in row)  # an epoch may lack a term
        writer = csv.DictWriter(table, fieldnames=list(names), lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
        checkpoint.write_atomic(self.out / "history.csv", table.getvalue())
        checkpoint.write_atomic(self.out / "history.jsonl", "".join(json.dumps(row) + "\n" for row in history))

    def finish(self, history: list[Row], networks: dict[str, nn.Module]) -> None:
        """Write the history, the picture of it and the weights of every network in `networks`."""
        if not self.main:
            return
        self._write_history(history)  # again: a killed run may have written its checkpoint but not this file
        checkpoint.write_atomic(self.out / "curves.png", plot(history))
        for name, net in networks.items():
            about = self.about | {"model": self.models.get(name, "")}
            checkpoint.save_network(self.out / f"{name}.safetensors", net, about)
        if self.board:
            self.board.close()


def board_class() -> type["SummaryWriter"]:
    """The class of TensorBoard's writer. Raises UserError if TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(f"--tensorboard: {error}; pip install 'fastkd[tensorboard]'") from None
    return SummaryWriter


class Bar:
    """Progress bar over all epochs: images/s of this epoch, loss terms, time left."""

    def __init__(self, epochs: int, epoch: int, steps: int):
        shown, screen = TextColumn("{task.fields[shown]}"), console()
        columns = (TextColumn("{task.description}"), BarColumn(), shown, TimeRemainingColumn(), TextColumn("left"))
        self.progress = Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal)
        self.task = self.progress.add_task("", total=epochs * steps, completed=epoch * steps, shown="")
        self.epochs = epochs

    def start_epoch(self, epoch: int) -> None:
        """Set the title to `epoch` (from 0) and restart the clock."""
        self.progress.update(self.task, description=f"epoch {epoch + 1}/{self.epochs}")
        self.images, self.started, self.shown_at = 0, time.perf_counter(), time.perf_counter()

    def advance(self, images: int, meter: "Meter") -> None:
        """Count one step of `images` images per process.

        Once a second, read the counters from the device for display. Nothing else synchronises within an epoch.
        """
        self.images += images * distributed.world_size()
        self.progress.advance(self.task)
        if self.progress.disable or time.perf_counter() < self.shown_at + 1:
            return
        self.shown_at = time.perf_counter()
        shown = f"{self.rates()['img_per_s']:,.0f} img/s  {terms_of(meter.read(everywhere=False))}"
        self.progress.update(self.task, shown=shown)

    def rates(self) -> dict[str, float]:
        """Training images/s over all processes, and seconds, since the epoch began."""
        seconds = time.perf_counter() - self.started
        return {"img_per_s": round(self.images / seconds, 1), "train_s": round(seconds, 2)}


def track(steps: Sequence[T], title: str) -> Iterable[T]:
    """Yield `steps` and show a progress bar, for the work of a method before the first epoch."""
    log_rank0(title)
    screen = console()
    count, left = MofNCompleteColumn(), TimeRemainingColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), count, left, TextColumn("left"))
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as progress:
        yield from progress.track(steps, description=title)


def terms_of(row: Row) -> str:
    """The loss terms of a row as text."""
    return "  ".join(f"{name} {value:.4f}" for name, value in loss_terms(row).items())


def shares_of(row: Row) -> str:
    """The shares of steps in which the student's own blocks ran, as text; empty for methods without them."""
    shares = [f"{value:.2f}" for name, value in row.items() if name.endswith("share")]
    return f"  student's share {' '.join(shares)}" if shares else ""


def _tuples_as_lists(config: dict[str, Any]) -> dict[str, Any]:  # YAML's safe form has no tuples
    return {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}


def console() -> Console:
    """A console that prints on rank 0 and is silent on the other processes."""
    return Console(quiet=distributed.rank() != 0)


def log_rank0(message: str) -> None:
    """Print one line, on rank 0 only."""
    console().print(message, highlight=False, markup=False, soft_wrap=True)


def show_table(columns: list[str], rows: list[list[str]], numbers: int = 0) -> None:
    """Print a table. The last `numbers` columns hold numbers and are aligned to the right."""
    table = Table()
    for place, column in enumerate(columns):
        justify: Literal["left", "right"] = "left" if place < len(columns) - numbers else "right"
        table.add_column(column, justify=justify, overflow="fold")  # wrap, never truncate
    for row in rows:
        table.add_row(*row)
    console().print(table)
