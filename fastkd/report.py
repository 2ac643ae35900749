"""The output of a run: the progress bar, a line per epoch, and the files of the run folder."""

import csv
import io
import json
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from torch import nn

from . import checkpoint, distributed
from .data.wait import DataWait
from .engine import TrainOptions
from .engine.step import Meter
from .environment import environment
from .errors import UserError, printable
from .models.own_input import OwnInput, plain_network

FILES = """\
This folder holds one run of fastkd. FOLDER stands for its path.

    config.yaml           All options of the run. Repeat it: fastkd train --config FOLDER/config.yaml --out NEW_FOLDER
    environment.json      The command, the versions and the devices.
    history.csv, .jsonl   One row per epoch: learning rate, loss terms, accuracy in %, images/s,
                          data_wait_ms: what a step waited for its images.
    curves.png            The history as a picture. It is drawn at the end of the run.
    last.pt               The state after the last finished epoch. Continue: fastkd train --out FOLDER --resume
    best.pt               The state after the epoch with the best accuracy.
                          Evaluate it: fastkd eval --weights FOLDER/best.pt
    student.safetensors   The student after the last epoch.
                          Evaluate it: fastkd eval --weights FOLDER/student.safetensors
    teacher/, alone/      The runs that trained the teacher and the student alone, if this run needed them.
                          Another run with this teacher: --teacher-weights FOLDER/teacher/student.safetensors

Some methods save more networks:

    peer1.safetensors             dml, dcm, iedml: a network that was trained together with the student
    improved_teacher.safetensors  sokd: the teacher with the trained bridge
    autoencoder.safetensors       iekd: the encoder of the teacher's feature maps
    paraphraser.safetensors       ft: the encoder of the teacher's feature maps
"""


NOT_TERMS = ("epoch", "lr", "img_per_s", "train_s", "data_wait_ms", "data_wait_percent")
SCORES = ("top1", "top5", "val_loss", "share")  # the name of a network or a gate may stand before them


class Report:
    """Prints the epochs of a run and writes its folder. Only rank 0 prints and writes.

    config: the options of the training. about: further options for config.yaml. data: a description of the data set.
    image: of the images that the networks take: size, mean, std, and whether they are resident (see `input_of`).
    """

    def __init__(
        self, config: TrainOptions, about: dict[str, Any], data: dict[str, Any], image: dict[str, Any]
    ) -> None:
        self.config, self.out = config, Path(config.out)
        # `fastkd eval` reads these from the weights file.
        self.about = {"data": data, "input": checkpoint.about_input(about) | image}
        self.models = {"student": about.get("student", "")}
        self.models["improved_teacher"] = next(iter(about.get("teacher", ())), "")  # sokd's, of its one teacher
        self.models |= {f"peer{number}": name for number, name in enumerate(about.get("peers", ()), 1)}
        self.main = distributed.rank() == 0
        board = board_class() if config.tensorboard and self.main else None
        if self.main:
            options = asdict(config) | about
            options |= {name: list(value) for name, value in options.items() if isinstance(value, tuple)}  # for YAML
            checkpoint.claim_folder(self.out, options, config.resume)
            checkpoint.write_atomic(self.out / "environment.json", json.dumps(environment(), indent=2) + "\n")
            checkpoint.write_atomic(self.out / "README.txt", FILES)
        self.board = board(self.out / "tensorboard") if board else None

    def epoch(self, history: list[dict[str, Any]]) -> None:
        """Report the last row of the history: print its line, write the history files and TensorBoard's events."""
        row = history[-1]
        rates = " ".join(f"{value:.2f}" for name, value in row.items() if name.endswith("share"))  # of IAKD's blocks
        share = f"  student's share {rates}" if rates else ""
        log_rank0(
            f"epoch {row['epoch']:>3}/{self.config.epochs}  {terms_of(row)}{share}  "
            f"top-1 {row['top1']:.2f} %  val loss {row['val_loss']:.4f}  lr {row['lr']:.4g}  "
            f"{row['img_per_s']:,.0f} img/s  data wait {row['data_wait_ms']:.3g} ms/step, "
            f"{row['data_wait_percent']:.0f} %"
        )
        self._write_history(history)
        if self.board:
            for name, value in row.items():
                self.board.add_scalar(name, value, row["epoch"])

    def _write_history(self, history: list[dict[str, Any]]) -> None:
        table = io.StringIO()
        names = dict.fromkeys(name for row in history for name in row)  # an epoch may lack a term
        writer = csv.DictWriter(table, fieldnames=list(names), lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
        checkpoint.write_atomic(self.out / "history.csv", table.getvalue())
        checkpoint.write_atomic(self.out / "history.jsonl", "".join(json.dumps(row) + "\n" for row in history))

    def finish(self, history: list[dict[str, Any]], networks: dict[str, nn.Module]) -> None:
        """Write the history and the weights of the networks, and draw curves.png last."""
        if not self.main:
            return
        self._write_history(history)  # again, because a killed run may have a checkpoint that is newer than this file
        for name, net in networks.items():
            about = self.about | {"model": self.models.get(name, "")}
            if isinstance(net, OwnInput):
                about["input"] = self.about["input"] | net.wanted.as_dict()
            checkpoint.save_network(self.out / f"{name}.safetensors", plain_network(net), about)
        self._draw(history)
        if self.board:
            self.board.close()

    def _draw(self, history: list[dict[str, Any]]) -> None:
        """Write curves.png. The weights are on the disk by now, so that a broken matplotlib costs the picture alone."""
        try:
            picture = plot(history)
        except Exception as error:  # of an installation without fonts, of a cache folder that cannot be written, ...
            log_rank0(f"curves.png is not drawn: {type(error).__name__}: {error}".splitlines()[0])
            return
        checkpoint.write_atomic(self.out / "curves.png", picture)


def board_class() -> type[Any]:
    """The class of TensorBoard's writer. Raises UserError if TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(f"--tensorboard: {error}; pip install 'fastkd[tensorboard]'") from None
    return SummaryWriter


class Bar:
    """The progress bar of a run: images/s and wait of this epoch, loss terms, remaining time."""

    def __init__(self, epochs: int, epoch: int, steps: int) -> None:
        """`epochs` of the whole run, of which `epoch` are done; `steps` per epoch."""
        self.progress = progress_with(TextColumn("{task.fields[shown]}", markup=False))
        self.task = self.progress.add_task("", total=epochs * steps, completed=epoch * steps, shown="")
        self.epochs, self.wait, self.warned = epochs, DataWait(), False

    def start_epoch(self, epoch: int) -> None:
        self.progress.update(self.task, description=f"epoch {epoch + 1}/{self.epochs}")
        self.images, self.started, self.shown_at = 0, time.perf_counter(), time.perf_counter()

    def advance(self, images: int, meter: Meter) -> None:
        """Count a step. Once a second, read the meter for the display: this is the only host sync within an epoch."""
        self.images += images * distributed.world_size()
        self.progress.advance(self.task)
        if self.progress.disable or time.perf_counter() < self.shown_at + 1:
            return
        self.shown_at = time.perf_counter()
        seconds = self.shown_at - self.started
        rates = f"{self.images / seconds:,.0f} img/s  data wait {100 * self.wait.seconds / seconds:.0f} %"
        self.progress.update(self.task, shown=f"{rates}  {terms_of(meter.read(everywhere=False))}")

    def rates(self) -> dict[str, float]:
        """Of the epoch that ends here: images/s of all processes, seconds, and the wait for the data (data/wait.py).

        Logs once in a run that the wait is large. Every process must call it.
        """
        seconds = time.perf_counter() - self.started
        rates = {"img_per_s": round(self.images / seconds, 1), "train_s": round(seconds, 2)}
        waits = self.wait.rates(seconds, distributed.gather)
        if any(distributed.gather(self.wait.is_large(seconds))) and not self.warned:
            self.warned = True
            log_rank0(
                f"the steps waited for their images for {waits['data_wait_percent']:.0f} % of the epoch: the loader "
                "limits this run; `fastkd bench data` compares loaders and numbers of workers"
            )
        return rates | waits


def progress_with(column: ProgressColumn) -> Progress:
    """A bar on the terminal of rank 0: description, bar, `column`, remaining time."""
    screen = console()
    title = TextColumn("{task.description}", markup=False)  # else rich would drop "[dali]"
    columns = (title, BarColumn(), column, TimeRemainingColumn(), TextColumn("left"))
    return Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal)


def track(steps: Sequence, title: str) -> Iterable:
    """Iterate over `steps` with a progress bar, for the work of a method before the first epoch."""
    log_rank0(title)
    with progress_with(MofNCompleteColumn()) as progress:
        yield from progress.track(steps, description=_text(title).plain)


def is_loss_term(name: str) -> bool:
    """True if a column of the history is a weighted loss term."""
    return not (name in NOT_TERMS or name.endswith(SCORES))


def terms_of(row: dict[str, float]) -> str:
    """The loss terms of a row of the history, as text."""
    return "  ".join(f"{name} {value:.4f}" for name, value in row.items() if is_loss_term(name))


def plot(history: list[dict[str, float]]) -> bytes:
    """Draw a history, one row per epoch, and return the picture as PNG bytes.

    IAKD's selection rates have a panel of their own.
    """
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for row in history for name in row))
    panels = {
        "loss terms, weighted": [name for name in names if is_loss_term(name) or name.endswith("val_loss")],
        "validation accuracy, %": [name for name in names if name.endswith(("top1", "top5"))],
        "learning rate": ["lr"],
        "share of steps": [name for name in names if name.endswith("share")],
    }
    panels = {title: lines for title, lines in panels.items() if lines}
    figure = Figure(figsize=(4.4 * len(panels), 3.8), layout="constrained")
    epochs = [row["epoch"] for row in history]
    for axes, (title, lines) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for name in lines:
            values = [row.get(name, float("nan")) for row in history]
            axes.plot(epochs, values, label=name, marker="." if len(history) < 30 else None)
        axes.set(title=title, xlabel="epoch")
        axes.grid(alpha=0.3)
        if len(lines) > 1:
            axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def console() -> Console:
    """The terminal of rank 0. The consoles of other processes print nothing."""
    return Console(quiet=distributed.rank() != 0)


def log_rank0(message: str) -> None:
    """Print a line, on rank 0 only."""
    console().print(_text(message), soft_wrap=True)


def show_table(columns: list[str], rows: list[list[str]], numbers: int = 0, whole: int = 0) -> None:
    """Print a table. The last `numbers` columns are numbers and are right-aligned; the first `whole` never wrap."""
    table = Table()
    for place, column in enumerate(columns):
        justify: Literal["left", "right"] = "left" if place < len(columns) - numbers else "right"
        table.add_column(_text(column), justify=justify, overflow="fold", no_wrap=place < whole)
    for row in rows:
        table.add_row(*map(_text, row))
    console().print(table)


def _text(text: str) -> Text:
    """The text letter by letter, with escapes for what stdout cannot show.

    In a str, rich would drop "[dali]" and would replace ":x:" by a picture.
    """
    return Text(printable(text, getattr(sys.stdout, "encoding", None), keep="\n\t"))
