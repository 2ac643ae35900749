"""What every loss has in common."""

import inspect
from collections.abc import Callable

from torch import nn


class Loss(nn.Module):
    """Options are attributes, shown when printed: KDLoss(temperature=4.0, ce_weight=0.1, ...).

    They may be changed between calls, as a schedule does: `loss.kd_weight = 0.9 * epoch / epochs`. `checks` gives for
    each what it becomes, or raises ValueError.
    """

    checks: dict[str, Callable[[str, object], object]] = {}

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, self.checks[name](name, value) if name in self.checks else value)

    def extra_repr(self) -> str:
        names = inspect.signature(type(self)).parameters
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names if hasattr(self, name))
