"""When a run saves its state, and whether it is to stop. All processes agree on both at the end of a step."""

import re
import time
from typing import NamedTuple

from .. import distributed
from ..errors import UserError
from ..signals import StopRequest

UNITS = {"s": 1, "m": 60, "h": 3600}


class Interval(NamedTuple):
    """Every so many steps, or every so many seconds; 0 is never."""

    steps: int = 0
    seconds: int = 0


def interval_of(text: str) -> Interval:
    """The interval that `--checkpoint-every` names: "500" steps, "90s", "10m", "2h" or "off"."""
    if text == "off":
        return Interval()
    found = re.fullmatch(r"([0-9]{1,9})([smh]?)", str(text))
    if not found or not int(found[1]):
        raise UserError(
            f"--checkpoint-every {text!r}: give a number of steps such as 500, a time such as 90s, 10m or 2h, or off"
        )
    number, unit = int(found[1]), found[2]
    return Interval(0, number * UNITS[unit]) if unit else Interval(number, 0)


class Look(NamedTuple):
    """What is to be done after a step: save the state; stop, by the signal of this name."""

    save: bool
    stop: str


class Pace:
    """`pace(step)` after each step of a run, which are counted from 1 at its start. Every process must call it.

    With several processes they talk about once a second: each of them finds from the same times after how many steps
    they do so next. Then the clock of rank 0 counts.
    """

    def __init__(self, every: str, request: StopRequest):
        self.every, self.request = interval_of(every), request
        self.saved_at = self.looked_at = time.monotonic()
        self.looked_step = self.next_step = 0

    def __call__(self, step: int) -> Look:
        late, stop = time.monotonic() - self.saved_at >= (self.every.seconds or float("inf")), self.request.name
        if distributed.world_size() > 1:
            late, stop = self._agree(step, late, stop)
        look = Look(late or bool(self.every.steps and step % self.every.steps == 0), stop)
        if look.save:
            self.saved_at = time.monotonic()
        return look

    def _agree(self, step: int, late: bool, stop: str) -> tuple[bool, str]:
        if not self.looked_step:  # the first step of this process: a run that goes on begins at any number
            self.looked_step = step - 1
        if step < self.next_step:
            return False, ""
        now = time.monotonic()
        said = distributed.gather((late, stop, (now - self.looked_at) / max(1, step - self.looked_step)))
        self.looked_at, self.looked_step = now, step
        per_step = max(seconds for _, _, seconds in said)
        self.next_step = step + min(1000, max(1, int(1 / max(per_step, 1e-6))))
        return said[0][0], next((name for _, name, _ in said if name), "")
