"""What a method may know of the run around it, and the options of a method that has none."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

State = dict[str, Any]
"""Tensors, numbers, strings and containers of them."""


class FirstPhase:
    """A training before the first epoch. This one begins at its start and keeps no states; see run/phase.py.

    with phase:
        kept = phase.kept(network.state_dict())
        for epoch in range(phase.epoch, epochs):
            phase.begin_epoch()
            for step, batch in enumerate(batches(phase.step), phase.step):
                phase.look(step, state)
                ...
            phase.end_epoch()
    phase.done()
    """

    epoch = step = 0

    def __enter__(self) -> "FirstPhase":
        return self

    def __exit__(self, *error: object) -> None:
        """Wait until the states are on the disk."""

    def kept(self, fresh: State) -> tuple[State, State] | None:
        """What `look` was given, of an earlier start; None if there is nothing. Sets `epoch` and `step`.

        `fresh`: the network's state before the first step, which has the names and shapes.
        """

    def begin_epoch(self) -> None:
        """Before the batches of an epoch are asked for."""

    def look(self, step: int, state: Callable[[], tuple[State, State]]) -> None:
        """Before each step: save the state if it is time. Raises `Stopped` if a signal came.

        `state` gives what is equal in all processes, with the network as "network", and what is not.
        """

    def end_epoch(self) -> None:
        """After the last step of an epoch."""
        self.epoch, self.step = self.epoch + 1, 0

    def done(self) -> None:
        """The result is on the disk: the states can go."""


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """The run as `Method.check` and `Method.prepare` see it. All fields are given by name."""

    epochs: int = 1
    steps_per_epoch: int = 1
    """Batches per epoch on this process."""
    drops: tuple[float, ...] = ()
    """Epochs at which the learning rate drops; empty if it falls steadily."""
    seed: int = 0
    device: torch.device = torch.device("cpu")
    folder: Path | None = None
    """Where `prepare` may write files; the same folder when the run is resumed. None: write nothing."""
    autocast: Callable[[], AbstractContextManager] = nullcontext
    """The autocast context of the training step."""
    parallel: Callable[[nn.Module], nn.Module] = lambda net: net
    """Wraps a network that `prepare` trains in DDP."""
    phase: Callable[[str, State], FirstPhase] = lambda name, about: FirstPhase()
    """The training that `prepare` makes: its name, and what it depends on as JSON values."""
    track: Callable[[Sequence, str], Iterable] = lambda steps, title: steps
    """Shows a progress bar around the steps of `prepare`."""
    log: Callable[[str], None] = lambda line: None
    """Prints a line on rank 0."""


@dataclass(frozen=True)
class NoOptions:
    """This method has no options."""
