"""What `--extend` changes at a resume: the options that are named, and what follows from them."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from ..data.base import EpochLoader, Loader
from ..engine import Step, TrainOptions
from ..engine.ema import decay_at
from ..engine.launch import compiles
from ..engine.optim import lr_factor
from ..methods.base import Method
from .folder import EXTENDABLE


def extension(was: Mapping[str, Any], now: TrainOptions, step: Step, loader: Loader, done: int) -> Iterator[str]:
    """Log lines: what a run does otherwise with the options `now` than with those of its state, after `done` steps.

    `was`: the options of the state. Nothing is said of what both would do alike.
    """
    saved: dict[str, Any] = {name: was[name] for name in EXTENDABLE if name in was}
    saved = {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
    old = replace(now, **saved)
    for name in saved:
        if getattr(old, name) != getattr(now, name):
            yield f"--extend: {name} {_shown(getattr(old, name))} -> {_shown(getattr(now, name))} from here on"
    if done < now.epochs * len(loader):
        yield from (f"--extend: {line}" for line in _consequences(old, now, step, loader, done))


def _consequences(old: TrainOptions, now: TrainOptions, step: Step, loader: Loader, done: int) -> Iterator[str]:
    """What the next steps do otherwise, besides the options that are named."""
    epoch, length = done / len(loader), len(loader)
    rates = [options.lr * lr_factor(options, epoch) for options in (old, now)]
    if rates[0] != rates[1]:
        yield f"the next step has the learning rate {rates[1]:.4g}, not {rates[0]:.4g}"
    if now.ema_decay:
        decays = [decay_at(now.ema_decay, options.epochs * length, done) for options in (old, now)]
        if decays[0] != decays[1]:
            yield f"the next step has the decay {decays[1]:.4g} of the moving average, not {decays[0]:.4g}"
    device = step.precision.device
    was_compiled, is_compiled = (
        compiles(step.method, options, device, options.epochs * length, lambda line: None) for options in (old, now)
    )
    if was_compiled != is_compiled:
        yield f"the steps are {'' if is_compiled else 'no longer '}compiled: their last digits may differ"
    if old.epochs != now.epochs:
        if old.sched == now.sched == "cosine":
            yield f"the cosine ends with epoch {now.epochs}, not {old.epochs}"
        yield from _spread(old.epochs, now.epochs, step.method, loader)


def _spread(old: int, now: int, method: Method, loader: Loader) -> Iterator[str]:
    """What is spread over the epochs of the run."""
    sizes = loader.train_sizes if isinstance(loader, EpochLoader) else None
    if sizes and sizes.first < sizes.last and sizes.epochs == now:
        yield f"the training crops reach {sizes.last} pixels in epoch {now}, not {old}"
    yield from method.spread_over(old, now)


def _shown(value: Any) -> str:
    return " ".join(f"{each:g}" for each in value) if isinstance(value, tuple) else str(value)
