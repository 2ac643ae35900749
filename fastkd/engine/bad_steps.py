"""Steps whose loss or gradient is not finite: counted and skipped on the device, with a record of the last steps.

The two kernels of kernels/step_end.py do the work. The host never waits: it reads the counters when it likes, since
they stop at `limit` bad steps in a row, and all later steps are skipped.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.step_end import KEPT, SKIPPED, STEPS, StepState, check_gradients


class BadSteps:
    """`parameters`: how many there are. `limit`: bad steps in a row after which the counters stop.

    `state` is what both kernels share. `norms` [KEPT + 1, parameters] fp32: norms of the gradients of the last steps.
    """

    def __init__(self, parameters: int, limit: int, device: torch.device):
        self.limit = limit
        counts = torch.zeros(5, dtype=torch.int64).to(device)  # a copy: right on the tests' null device too
        self.state = StepState(counts, torch.zeros((), device=device), torch.zeros((), device=device))
        self.norms = torch.zeros(KEPT + 1, parameters, device=device)
        self.zero = torch.zeros((), device=device)
        self.first = 0  # steps before the first one that is in the record

    @property
    def counts(self) -> Tensor:
        """[5] int64 on the device: see kernels/step_end.py."""
        return self.state.counts

    @property
    def skipped(self) -> Tensor:
        """The number of skipped steps since `start_epoch`, on the device."""
        return self.counts[SKIPPED]

    def check(self, parameters: Sequence[Tensor], buffers: Tensor, saved: Tensor) -> Tensor:
        """The norm of the whole gradient, on the device; see `check_gradients`. A weight without one counts as 0."""
        found = iter(torch._foreach_norm([grad for p in parameters if (grad := p.grad) is not None] or [self.zero]))
        norms = torch.stack([self.zero if p.grad is None else next(found) for p in parameters]).float()
        return check_gradients(norms, buffers, saved, self.state, self.norms, self.limit)

    def start_epoch(self) -> None:
        """Count the skipped steps of another epoch; those in a row go on."""
        self.skipped.zero_()

    def state_dict(self) -> dict[str, Any]:
        """The counters: a resumed run counts on."""
        return {"counts": self.counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Count on from what `state_dict` gave."""
        self.counts.copy_(state["counts"])
        self.first = int(state["counts"][STEPS])
