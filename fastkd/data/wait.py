"""How long the training loop waits for its loader.

The time is that of the host around `next()` of the loader, without any wait for the device. A loader that holds the
host back on purpose, until a step on the device is done, says how long that took in `held_s`: that time is the step's.

On CUDA the host runs ahead of the device, so that a short wait may cost nothing. A large share over a whole epoch does.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")
LARGE = 20.0  # % of an epoch's time


class DataWait:
    """The waiting time of one epoch: `for batch in wait.batches(loader): ...`."""

    def __init__(self) -> None:
        self.seconds = self.first = 0.0  # of the epoch so far, and for its first batch: workers start, queues fill
        self.steps = 0

    def batches(self, loader: Iterable[T]) -> Iterator[T]:
        """The batches of a new epoch of `loader`."""
        self.seconds, self.first, self.steps = 0.0, 0.0, 0
        start, held = time.perf_counter(), _held(loader)
        for batch in loader:
            self.seconds += max(0.0, time.perf_counter() - start - _held(loader) + held)
            self.first = self.first if self.steps else self.seconds
            self.steps += 1
            yield batch
            start, held = time.perf_counter(), _held(loader)
        self.seconds += max(0.0, time.perf_counter() - start - _held(loader) + held)

    def rates(self, seconds: float, gather: Callable[[Any], list[Any]]) -> dict[str, float]:
        """Mean wait in ms per step, and in % of the epoch's `seconds`, of the process that waited longest.

        All processes wait for that one: they exchange gradients at every step. Each of them must call this.
        """
        longest = max(gather(self.seconds))
        milliseconds = 1e3 * longest / max(1, self.steps)
        return {"data_wait_ms": round(milliseconds, 3), "data_wait_percent": round(100 * longest / seconds, 2)}

    def is_large(self, seconds: float) -> bool:
        """Whether more than LARGE % of the epoch's `seconds` were waited, the first batch left out of both."""
        return 100 * (self.seconds - self.first) > LARGE * (seconds - self.first)


def _held(loader: object) -> float:
    """Seconds that the loader has waited for the device so far."""
    return getattr(loader, "held_s", 0.0)
