"""The states of a training before the first epoch, such as that of an auto-encoder, in a folder of their own."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .. import distributed
from ..data.base import Loader, state_at
from ..engine import TrainOptions
from ..errors import UserError, shown
from ..files import cannot_write
from ..methods.context import FirstPhase
from ..signals import Stopped, StopRequest
from . import lock
from .checkpoint import State, Writer
from .pace import Pace
from .problems import is_count, nonfinite_in, odd_tensor, other_tensors
from .random_state import check_random_state, random_state, set_random_state
from .resume import newest


@dataclass
class KeptPhase(FirstPhase):
    """Saves the state of a phase as often as that of the run, and stops it by a signal.

    name: of the phase and of its folder in the run's. about: what the phase depends on, as JSON values; a state of
    another one is not used. options: of the run: its folder, how often it saves and how many states it keeps.
    """

    name: str
    about: dict[str, Any]
    options: TrainOptions
    loader: Loader
    device: torch.device
    request: StopRequest
    log: Callable[[str], None]
    epoch: int = field(default=0, init=False)
    step: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.about = self.about | {"images": getattr(self.loader, "fingerprint", str)()}
        self.folder = Path(self.options.out) / self.name
        self.writer = Writer(self.folder, self.options.keep_checkpoints, self.log)
        self.pace = Pace(self.options.checkpoint_every, self.request)
        self.random: dict[str, Any] = {}  # the generators at the start of the epoch
        self.is_continued = False

    def kept(self, fresh: State) -> tuple[State, State] | None:
        check = partial(self._problem, fresh=fresh)
        try:
            state = newest(self.folder, check, self.log)
        except UserError as error:
            self.log(f"WARNING: {error}".partition("; no earlier state")[0] + f"; the {self.name} is trained anew")
            return None
        if state is None:
            return None
        own = state["ranks"][distributed.rank()]
        self.epoch, self.step, self.random = state["epoch"], state["step"], own["random"]
        self.is_continued = True
        self.loader.load_state_dict(own["loader"])
        self.log(f"resuming {self.folder} after step {self.step} of epoch {self.epoch + 1}")
        return state["shared"], own["own"]

    def begin_epoch(self) -> None:
        self.start = self.loader.state_dict()
        if self.is_continued:  # a loader of the caller may draw the epoch's order from them
            set_random_state(self.random, self.device)
            self.is_continued = False
        else:
            self.random = random_state(self.device)

    def look(self, step: int, state: Callable[[], tuple[State, State]]) -> None:
        number = self.epoch * len(self.loader) + step
        save, stop = self.pace(number)
        if number and (save or stop):
            self._save(step, *state())
        if stop:
            self.writer.wait()
            distributed.barrier()  # a process that ends first may make the launcher end the others
            raise Stopped(stop, f"in the training of the {self.name}, after step {step} of epoch {self.epoch + 1}")

    def done(self) -> None:
        if distributed.rank() == 0 and self.folder.is_dir():
            shutil.rmtree(self.folder)

    def __exit__(self, *error: object) -> None:
        self.writer.__exit__(*error)

    def _save(self, step: int, shared: State, own: State) -> None:
        if bad := next(filter(None, distributed.gather(nonfinite_in(shared))), ""):
            raise UserError(f"the training of the {self.name} diverged: {bad}; nothing of it was saved; lower --ae-lr")
        state = {"loader": state_at(self.loader, self.start, step), "random": self.random, "own": own}
        ranks = distributed.gather(state)
        if distributed.rank() == 0:
            lock.check(self.folder.parent)
            try:
                self.folder.mkdir(exist_ok=True)
            except OSError as error:
                raise cannot_write(self.folder / "last.pt", error) from None
            place = {"epoch": self.epoch, "step": step, "history": []}
            self.writer.save(place | {"about": self.about, "ranks": ranks, "shared": shared})

    def _problem(self, state: State, fresh: State) -> str:
        """Why the phase cannot go on from a state, or "". `fresh`: tensors of one that has not begun."""
        if missing := [name for name in ("epoch", "step", "about", "ranks", "shared") if name not in state]:
            return f"it has no {', '.join(missing)}"
        if other := [name for name in self.about if state["about"].get(name) != self.about[name]]:
            return f"it was made with another {', '.join(other)}"
        if len(state["ranks"]) != distributed.world_size():
            return f"it was written by {len(state['ranks'])} processes, now there are {distributed.world_size()}"
        if not (is_count(state["epoch"], 1 << 40) and is_count(state["step"], len(self.loader) - 1)):
            return f"it is after step {shown(state['step'])} of epoch {shown(state['epoch'])}"
        odd = next(filter(None, (check_random_state(own["random"], self.device) for own in state["ranks"])), "")
        return odd or odd_tensor(state) or other_tensors(state["shared"].get("network"), fresh) or nonfinite_in(state)
