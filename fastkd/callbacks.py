"""What a caller of the trainer may follow: `Trainer(..., callbacks=[Print()]).fit()`.

class Print:  # an object with any of these three methods
    def on_step(self, step: StepEnd): ...
    def on_epoch(self, epoch: EpochEnd): ...
    def on_end(self, end: RunEnd): ...

They get data and cannot change the run; docs/guide.md says how one stops it early. Only rank 0 calls them, between two
steps, so their time is the run's. An exception in `on_step` or `on_epoch` ends the run with its own traceback, as in
other trainers. What was saved before is intact: `on_epoch` comes after the state of its epoch, and a resume goes on
from there.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from . import distributed
from .errors import UserError
from .signals import Stopped

HOOKS = ("on_step", "on_epoch", "on_end")


@dataclass(frozen=True)
class StepEnd:
    """After a training step is queued. On a GPU it may still run: nothing here waits for it, but `loss_terms`."""

    epoch: int
    """From 1."""
    step: int
    """Of the run, from 1."""
    steps: int
    """Of the whole run."""
    lr: float
    """Learning rate of this step."""
    images: int
    """Images of the step, of all processes."""
    images_per_s: float
    """Of this epoch so far, by the clock of the host."""
    read: Callable[[], dict[str, float]] = field(repr=False, compare=False)

    def loss_terms(self) -> dict[str, float]:
        """The weighted loss terms by name: means over the epoch's steps so far, on this process.

        Waits until the device has done every step that is queued. At each step this costs what running ahead gains;
        once a second or at every hundredth step it costs nothing that can be measured.
        """
        return self.read()


@dataclass(frozen=True)
class EpochEnd:
    """After an epoch, its evaluation, and the state on its way to the disk."""

    epoch: int
    """From 1."""
    epochs: int
    row: Mapping[str, float]
    """The epoch's row of history.csv: lr, loss terms, top1 and top5 in %, val_loss, img_per_s, ..."""


@dataclass(frozen=True)
class RunEnd:
    """After the run, however it ended."""

    status: Literal["finished", "stopped", "failed"]
    """stopped: by a signal or Ctrl-C, with its state saved; failed: by an exception."""
    history: Sequence[Mapping[str, float]]
    """One row per epoch."""
    out: Path
    """The folder of the run."""


class Callbacks:
    """Calls those of `callbacks` that have the method, in their order, on rank 0. Raises UserError for other things."""

    def __init__(self, callbacks: Sequence[object] = ()):
        check_callbacks(callbacks)
        self.callbacks = list(callbacks) if distributed.rank() == 0 else []
        self.follow_steps = any(hasattr(each, "on_step") for each in self.callbacks)

    def on_step(self, step: StepEnd) -> None:
        self._call("on_step", step)

    def on_epoch(self, epoch: EpochEnd) -> None:
        self._call("on_epoch", epoch)

    def on_end(self, history: list[dict[str, Any]], out: Path, error: BaseException | None, log: Callable) -> None:
        """Every callback gets it. If the run failed, its `error` is raised by the caller: theirs are logged."""
        stopped = isinstance(error, (Stopped, KeyboardInterrupt))
        status: Any = "stopped" if stopped else "failed" if error else "finished"
        end = RunEnd(status, [dict(row) for row in history], out)
        raised: list[Exception] = []
        for each in self.callbacks:
            try:
                if hasattr(each, "on_end"):
                    each.on_end(end)
            except Exception as problem:
                raised.append(problem)
                log(f"WARNING: on_end of {type(each).__name__}: {type(problem).__name__}: {problem}")
        if raised and error is None:
            raise raised[0]

    def _call(self, name: str, data: object) -> None:
        for each in self.callbacks:
            if hasattr(each, name):
                getattr(each, name)(data)


def check_callbacks(callbacks: Sequence[object]) -> None:
    """Raise UserError for what is no list, for objects that nothing would call, and for misspelt methods."""
    if not isinstance(callbacks, Iterable):
        raise UserError(f"callbacks must be a list of objects, got a {type(callbacks).__name__}: [callback]")
    for each in callbacks:
        if isinstance(each, type) or not any(callable(getattr(each, name, None)) for name in HOOKS):
            what = f"the class {each.__name__}" if isinstance(each, type) else f"a {type(each).__name__}"
            raise UserError(f"callbacks holds {what}: give objects with one of {', '.join(HOOKS)}")
        lacking = [name for name in HOOKS if not hasattr(each, name)]
        for name in (name for name in dir(each) if name.startswith("on_") and callable(getattr(each, name, None))):
            if name not in HOOKS and (near := get_close_matches(name, lacking, 1, 0.8)):
                what = f"{type(each).__name__}.{name}"
                raise UserError(f"callbacks: {what} would never be called: did you mean {near[0]}?")
