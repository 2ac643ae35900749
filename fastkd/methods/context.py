"""What a method may know of the run around it, and the options of a method that has none."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn


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
    track: Callable[[Sequence, str], Iterable] = lambda steps, title: steps
    """Shows a progress bar around the steps of `prepare`."""
    log: Callable[[str], None] = lambda line: None
    """Prints a line on rank 0."""


@dataclass(frozen=True)
class NoOptions:
    """This method has no options."""
