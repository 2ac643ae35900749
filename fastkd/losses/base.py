"""The base class of the losses: options that are checked when they are set and shown when the loss is printed."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

Checks = Mapping[str, Callable[[str, Any], Any]]


class Loss(nn.Module):
    """Options are attributes, shown when printed: KDLoss(temperature=4.0, ce_weight=0.1, ...).

    They may be changed between calls, as a schedule does: `loss.kd_weight = 0.9 * epoch / epochs`. `checks` maps each
    option to a function of its name and value, which returns the value to store or raises ValueError.
    """

    checks: Checks = {}

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, self.checks[name](name, value) if name in self.checks else value)

    def extra_repr(self) -> str:
        names = inspect.signature(type(self)).parameters
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names if hasattr(self, name))
