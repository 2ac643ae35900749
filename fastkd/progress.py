"""How far a run is: a bar on a terminal or in a notebook, elsewhere a line in the log every --log-interval seconds."""

import html
import time
from collections.abc import Iterable, Sequence, Sized
from datetime import timedelta
from typing import Any, TypeVar

from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from . import distributed
from .callbacks import Callbacks, StepEnd
from .curves import terms_of
from .data.wait import DataWait
from .engine.meter import Meter
from .report import console, in_notebook, is_quiet, log_rank0, printable_here

INTERVAL_S = 30.0
LIVE_S = 1.0  # a bar is drawn anew so often; each time the loss terms are read, which waits for the device

D = TypeVar("D", bound="Display")


class Display:
    """Shows `done` of `total` on rank 0: `if display.is_due(): display.show(title, text, done)`. Nothing if quiet."""

    def __init__(self, total: int, interval: float = INTERVAL_S, done: int = 0, title: str = ""):
        self.total, self.first = total, done
        self.started = self.shown_at = time.perf_counter()
        is_shown = distributed.rank() == 0 and not is_quiet()
        self.notebook = Notebook() if is_shown and in_notebook() else None
        self.bar = progress_with(Shortened("{task.fields[shown]}", markup=False, table_column=Column()))
        self.task = self.bar.add_task(printable_here(title), total=total, completed=done, shown="")
        is_live = bool(self.notebook) or not self.bar.disable
        self.every = float("inf") if not is_shown else LIVE_S if is_live else interval

    def __enter__(self: D) -> D:
        if not self.bar.disable:  # else rich before 14 would print an empty line
            self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if not self.bar.disable:
            self.bar.stop()

    def is_due(self) -> bool:
        return time.perf_counter() >= self.shown_at + self.every

    def show(self, title: str, text: str, done: int) -> None:
        self.shown_at = time.perf_counter()
        line = "  ".join(filter(None, (title, text, self._left(done))))
        if self.notebook:
            self.notebook.show(line, done, self.total)
        elif not self.bar.disable:
            self.bar.update(self.task, description=printable_here(title), shown=text, completed=done)
        else:
            log_rank0(line)

    def _left(self, done: int) -> str:
        """The time that is left if everything goes on as since the start."""
        if done <= self.first or done >= self.total:
            return ""
        seconds = (time.perf_counter() - self.started) / (done - self.first) * (self.total - done)
        return f"{timedelta(seconds=round(seconds))} left"


class Notebook:
    """One bar below the cell, drawn in place. It needs nothing but IPython, which every notebook has."""

    def __init__(self) -> None:
        self.handle: Any = None

    def show(self, line: str, done: int, total: int) -> None:
        from IPython.display import display

        bar = f'<progress value="{done}" max="{total}"></progress>'
        data = {"text/plain": line, "text/html": f"{bar} <code>{html.escape(line)}</code>"}
        if self.handle:
            self.handle.update(data, raw=True)
        else:
            self.handle = display(data, raw=True, display_id=True)


class Bar(Display):
    """The progress of a run: images/s and wait of this epoch, loss terms, remaining time.

    `epochs` of the whole run, of `steps` each; `done` steps of the run are over. Used as `with bar:`.
    """

    def __init__(
        self,
        epochs: int,
        steps: int,
        done: int,
        interval: float = INTERVAL_S,
        callbacks: Callbacks | None = None,
    ) -> None:
        super().__init__(epochs * steps, interval, done)
        self.epochs, self.steps, self.done, self.wait, self.warned = epochs, steps, done, DataWait(), False
        self.callbacks = callbacks or Callbacks()

    def start_epoch(self, epoch: int) -> None:
        """`epoch` counts from 0."""
        self.epoch, self.images, self.epoch_started = epoch, 0, time.perf_counter()
        self.bar.update(self.task, description=f"epoch {epoch + 1}/{self.epochs}")

    def advance(self, images: int, meter: Meter, lr: float) -> None:
        """Count a step. The meter is read if the display is due: this is the only host sync within an epoch."""
        images *= distributed.world_size()
        self.images, self.done = self.images + images, self.done + 1
        read = lambda: meter.read(everywhere=False)  # noqa: E731
        if self.callbacks.follow_steps:
            rate = self.images / max(time.perf_counter() - self.epoch_started, 1e-9)
            self.callbacks.on_step(StepEnd(self.epoch + 1, self.done, self.total, lr, images, rate, read))
        if self.is_due():
            seconds = time.perf_counter() - self.epoch_started
            wait = f"data wait {100 * self.wait.seconds / seconds:.0f} %"
            place = f"step {self.done - self.epoch * self.steps:,}/{self.steps:,}"
            rates = f"{self.images / seconds:,.0f} img/s  {wait}"
            self.show(f"epoch {self.epoch + 1}/{self.epochs}", f"{place}  {rates}  {terms_of(read())}", self.done)

    def start_evaluation(self, title: str, loader: Iterable, networks: int = 1) -> "Bar":
        """`title` stands before the number of the batch. After the steps: `with bar.start_evaluation(...):`."""
        self.evaluated, self.batches = 0, len(loader) * networks if isinstance(loader, Sized) else 0
        self.title = title
        self.bar.update(self.task, description=printable_here(title), shown="evaluation")
        return self

    def advance_evaluation(self) -> None:
        """Count a batch of an evaluation."""
        self.evaluated += 1
        if self.is_due():
            of = f"/{self.batches:,}" if self.batches else ""
            self.show(self.title, f"evaluation: batch {self.evaluated:,}{of}", self.done)

    def rates(self) -> dict[str, float]:
        """Of the epoch that ends here: images/s of all processes, seconds, and the wait for the data (data/wait.py).

        Logs once in a run that the wait is large. Every process must call it.
        """
        seconds = time.perf_counter() - self.epoch_started
        rates = {"img_per_s": round(self.images / seconds, 1), "train_s": round(seconds, 2)}
        waits = self.wait.rates(seconds, distributed.gather)
        if any(distributed.gather(self.wait.is_large(seconds))) and not self.warned:
            self.warned = True
            log_rank0(
                f"the steps waited for their images for {waits['data_wait_percent']:.0f} % of the epoch: the loader "
                "limits this run; `fastkd bench data` compares loaders and numbers of workers"
            )
        return rates | waits


class Shortened(TextColumn):
    """Text that is cut where a terminal is narrow; the other columns keep their width."""

    def render(self, task: Task) -> Text:
        text = super().render(task)
        text.no_wrap, text.overflow = True, "ellipsis"
        return text


def progress_with(column: ProgressColumn) -> Progress:
    """A bar on the terminal of rank 0: description, bar, `column`, remaining time."""
    screen = console()
    title = TextColumn("{task.description}", markup=False)  # else rich would drop "[dali]"
    columns = (title, BarColumn(20), column, TimeRemainingColumn(), TextColumn("left"))
    return Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal or is_quiet())


def track(steps: Sequence, title: str, interval: float = INTERVAL_S) -> Iterable:
    """Iterate over `steps` and show how many are done, for the work of a method before the first epoch."""
    log_rank0(title)
    with Display(len(steps), interval, title=title) as display:
        for number, step in enumerate(steps):
            yield step
            if display.is_due():
                display.show(title, f"{number + 1:,}/{len(steps):,}", number + 1)


class Counter(Display):
    """The progress of an evaluation: `with Counter(title, loader) as count: evaluate(..., stop=count)`."""

    def __init__(self, title: str, loader: Iterable, interval: float = INTERVAL_S):
        super().__init__(len(loader) if isinstance(loader, Sized) else 0, interval, title=title)
        self.title, self.number = title, 0

    def __call__(self) -> bool:
        """After each batch. It gives False: nothing is to stop."""
        self.number += 1
        if self.is_due():
            self.show(self.title, f"batch {self.number:,}/{self.total:,}", self.number)
        return False
