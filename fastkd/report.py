"""The output of a run: messages, a line per epoch, and the files of the run folder.

Messages go through Python's logging, to the logger "fastkd". They are printed on stdout if it has no other handler.
"""

import csv
import io
import json
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from . import distributed, weights_file
from .callbacks import Callbacks, EpochEnd
from .curves import plot, terms_of
from .engine import TrainOptions
from .engine.precision import Precision
from .environment import continued, environment
from .errors import UserError, printable
from .evaluate import Batches
from .files import write_atomic
from .html_report.compare import compare
from .html_report.page import Page
from .loggers import check_loggers, open_loggers
from .methods.frozen import is_absent
from .models.own_input import OwnInput, plain_network
from .run import lock
from .run.folder import claim_folder, write_settings
from .run.readme import readme_of

LOGGER = logging.getLogger("fastkd")
OF_A_START = ("resume", "extend")  # options of one start, not of the run


class Report:
    """Prints the epochs of a run and writes its folder: `with report:` around it. Only rank 0 prints and writes.

    config: the options of the training. about: further options for config.yaml. data: a description of the data set.
    image: of the images that the networks take: size, mean, std, and whether they are resident (see `input_of`).
    callbacks: of the caller; those of `config.log` come before them.
    """

    def __init__(
        self,
        config: TrainOptions,
        about: dict[str, Any],
        data: dict[str, Any],
        image: dict[str, Any],
        callbacks: Sequence[object] = (),
    ) -> None:
        self.config, self.out = config, Path(config.out)
        # `fastkd eval` reads these from the weights file.
        self.about = {"data": data, "input": weights_file.about_input(about) | image}
        self.models = {"student": about.get("student", "")}
        self.models["improved_teacher"] = next(iter(about.get("teacher", ())), "")  # sokd's, of its one teacher
        self.models |= {f"peer{number}": name for number, name in enumerate(about.get("peers", ()), 1)}
        alike = [name for name, model in self.models.items() if model == self.models["student"]]
        self.kwargs = dict.fromkeys(alike, about.get("model_kwargs", ()))
        self.kwargs["improved_teacher"] = about.get("teacher_kwargs", ())
        self.main, self.owns_lock = distributed.rank() == 0, False
        self.callbacks = Callbacks(callbacks)
        self.history: list[dict[str, Any]] = []
        self.page: Page | None = None
        if self.main:
            check_loggers(config.log)
        options = {name: value for name, value in (asdict(config) | about).items() if name not in OF_A_START}
        options |= {name: list(value) for name, value in options.items() if isinstance(value, tuple)}  # for YAML
        self.options = options
        if self.main:
            self.environment = environment(distributed.world_size())
            self.owns_lock = claim_folder(self.out, options, config.resume, log_rank0, config.extend)
            LOGGER.debug(f"options: {options}")
            if config.report:
                self.page = Page(self.out, options, data, image, self.environment, log_rank0)

    def __enter__(self) -> "Report":
        """Start what `config.log` names, on rank 0."""
        if self.main:
            loggers = open_loggers(self.config.log, self.out, self.options)
            self.callbacks = Callbacks([*loggers, *self.callbacks.callbacks])
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Tell the callbacks that the run ended, by `error` or well, and give the folder back."""
        try:
            self.callbacks.on_end(self.history, self.out, error, log_rank0)
        finally:
            self.release()

    def accept(self) -> None:
        """Write what the run was started with: config.yaml, environment.json, README.txt.

        A resumed run does so when its state is known to fit: a resume that is refused changes no file.
        """
        if self.main:
            write_settings(self.out, self.options)
            path, now = self.out / "environment.json", self.environment
            write_atomic(path, json.dumps(continued(path, now) if self.config.resume else now, indent=2) + "\n")
            write_atomic(self.out / "README.txt", readme_of(self.options))

    def epoch(self, history: list[dict[str, Any]]) -> None:
        """Report the last row of the history: print its line, write the history files, call the callbacks."""
        self.history, row = history, history[-1]
        rates = " ".join(f"{value:.2f}" for name, value in row.items() if name.endswith("share"))  # of IAKD's blocks
        share = f"  student's share {rates}" if rates else ""
        log_rank0(
            f"epoch {row['epoch']:>3}/{self.config.epochs}  {terms_of(row)}{share}  "
            f"top-1 {row['top1']:.2f} %  val loss {row['val_loss']:.4f}  lr {row['lr']:.4g}  "
            f"{row['img_per_s']:,.0f} img/s  data wait {row['data_wait_ms']:.3g} ms/step, "
            f"{row['data_wait_percent']:.0f} %"
        )
        self._write_history(history)
        if self.page:
            self.page.epoch(history)
        self.callbacks.on_epoch(EpochEnd(row["epoch"], self.config.epochs, dict(row)))

    def _write_history(self, history: list[dict[str, Any]]) -> None:
        table = io.StringIO()
        names = dict.fromkeys(name for row in history for name in row)  # an epoch may lack a term
        writer = csv.DictWriter(table, fieldnames=list(names), lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
        write_atomic(self.out / "history.csv", table.getvalue())
        write_atomic(self.out / "history.jsonl", "".join(json.dumps(row) + "\n" for row in history))

    def finish(self, history: list[dict[str, Any]], networks: dict[str, nn.Module]) -> None:
        """Write the history and the weights of the networks, and draw curves.png last."""
        self.history = history
        if not self.main:
            return
        self._write_history(history)  # again, because a killed run may have a checkpoint that is newer than this file
        for name, net in networks.items():
            about = self.about | {"model": self.models.get(name, "")}
            about |= {"kwargs": list(kwargs)} if (kwargs := self.kwargs.get(name)) else {}
            about |= weights_file.about_accuracy(history, self.config.epochs, name)
            if isinstance(net, OwnInput):
                about["input"] = self.about["input"] | net.wanted.as_dict()
            weights_file.save_network(self.out / f"{name}.safetensors", plain_network(net), about)
        self._draw(history)

    def examine(
        self,
        networks: dict[str, nn.Module],
        teacher: nn.Module | None,
        loader: Batches,
        precision: Precision,
        stop: Callable[[], bool],
    ) -> None:
        """Compare the student with its teacher, or else with a peer, on the validation images; then write report.html.

        It comes after `finish`. Every process must call it. `stop` is asked after each batch: a signal costs the
        comparison.
        """
        if not self.config.report:
            return
        others = {} if teacher is None or is_absent(teacher) else {"teacher": teacher}
        nets: dict[str, nn.Module] = {"student": networks["student"]} | others | networks
        started = time.perf_counter()
        found = compare(dict(islice(nets.items(), 2)), loader, precision, stop)
        if self.page:
            self.page.finish(self.history, found, time.perf_counter() - started)

    def release(self) -> None:
        """Let other processes use the folder, unless a caller of the trainer locked it."""
        if self.owns_lock:
            lock.release(self.out)

    def _draw(self, history: list[dict[str, Any]]) -> None:
        """Write curves.png. The weights are on the disk by now, so that a broken matplotlib costs the picture alone."""
        try:
            picture = plot(history)
        except Exception as error:  # of an installation without fonts, of a cache folder that cannot be written, ...
            log_rank0(f"curves.png is not drawn: {type(error).__name__}: {error}".splitlines()[0])
            return
        write_atomic(self.out / "curves.png", picture)


def titles(about: Mapping[str, Any]) -> dict[str, str]:
    """By role, what errors call a network, such as {"student": "the student resnet8"}."""
    peers = {f"peer{number}": f"the peer {name}" for number, name in enumerate(about.get("peers", ()), 1)}
    named = {role: about[role] for role in ("student", "teacher") if about.get(role)}
    lists = {role: [name] if isinstance(name, str) else name for role, name in named.items()}
    return {role: f"the {role} {' '.join(names)}" for role, names in lists.items()} | peers


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Let the command say it: rich would end the program without a word."""
        raise BrokenPipeError


def console(stderr: bool = False) -> Console:
    """The terminal of rank 0. The consoles of other processes print nothing. In a notebook it prints plain text."""
    is_terminal = False if in_notebook() else None  # a kernel's stdout says that it is one
    return _Console(quiet=distributed.rank() != 0, stderr=stderr, force_jupyter=False, force_terminal=is_terminal)


def in_notebook() -> bool:
    """True in a Jupyter kernel."""
    try:
        return get_ipython().__class__.__name__ == "ZMQInteractiveShell"  # type: ignore[name-defined]
    except NameError:
        return False


class Printer(logging.Handler):
    """Prints messages as they are. `to_stderr`: stdout is for the result alone."""

    to_stderr = False

    def emit(self, record: logging.LogRecord) -> None:
        screen = console(self.to_stderr)
        screen.print(_text(record.getMessage(), screen.file), soft_wrap=True)


PRINTER = Printer()
if not LOGGER.handlers:  # the caller has not chosen where the messages go
    LOGGER.addHandler(PRINTER)
    LOGGER.propagate = False
if LOGGER.level == logging.NOTSET:
    LOGGER.setLevel(logging.INFO)


def set_output(quiet: bool = False, verbose: bool = False, result_alone: bool = False) -> None:
    """What a command prints. quiet: the result, and warnings on stderr; verbose: debug messages as well.

    result_alone: messages are on stderr, so that stdout can be read by a program. Raises UserError for both of
    quiet and verbose.
    """
    if quiet and verbose:
        raise UserError("--quiet and --verbose exclude each other: drop one")
    LOGGER.setLevel(logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO)
    PRINTER.to_stderr = quiet or result_alone


def is_quiet() -> bool:
    return not LOGGER.isEnabledFor(logging.INFO)


def log_rank0(message: str) -> None:
    """Log a line, on rank 0 only. One that begins with WARNING is a warning."""
    if distributed.rank() == 0:
        text = printable(message, "utf-8", keep="\n\t")  # a handler that writes a file could not write other bytes
        LOGGER.log(logging.WARNING if message.startswith("WARNING") else logging.INFO, text)


def show_table(columns: list[str], rows: list[list[str]], numbers: int = 0, whole: int = 0) -> None:
    """Print a table. The last `numbers` columns are numbers and are right-aligned; the first `whole` never wrap."""
    table = Table()
    for place, column in enumerate(columns):
        justify: Literal["left", "right"] = "left" if place < len(columns) - numbers else "right"
        table.add_column(_text(column), justify=justify, overflow="fold", no_wrap=place < whole)
    for row in rows:
        table.add_row(*map(_text, row))
    console().print(table)


def printable_here(text: str, stream: Any = None) -> str:
    """The text with escapes for what the stream, or stdout, cannot show."""
    return printable(text, getattr(stream or sys.stdout, "encoding", None), keep="\n\t")


def _text(text: str, stream: Any = None) -> Text:
    """The text letter by letter. In a str, rich would drop "[dali]" and would replace ":x:" by a picture."""
    return Text(printable_here(text, stream))
