"""The base class of the losses: options that are checked when they are set and shown when the loss is printed.

The functions check an option by its name and value. They return the value to store, or raise ValueError.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

from torch import Tensor, nn

Checks = Mapping[str, Callable[[str, Any], Any]]


class Loss(nn.Module):
    """Options are attributes, shown when printed: KDLoss(temperature=4.0, ce_weight=0.1, ...).

    They may be changed between calls, as a schedule does: `loss.kd_weight = 0.9 * epoch / epochs`. A subclass is a
    dataclass whose fields are the options; `checks` maps them to the functions below.
    """

    checks: Checks = {}

    def __post_init__(self) -> None:
        super().__init__()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, self.checks[name](name, value) if name in self.checks else value)

    def settings(self) -> dict[str, Any]:
        """The checked options by name: the keyword arguments of the kernel."""
        return {name: getattr(self, name) for name in self.checks}

    def extra_repr(self) -> str:
        names = inspect.signature(type(self)).parameters
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names if hasattr(self, name))


def check_positive(name: str, value: float) -> float:
    if isinstance(value, Real) and 0 < value < math.inf:
        return value
    raise ValueError(f"{name} must be a positive number, got {value!r}")


def check_weight(name: str, value: float) -> float:
    if isinstance(value, Real) and 0 <= value < math.inf:
        return value
    raise ValueError(f"{name} must be zero or a positive number, got {value!r}")


def check_smoothing(name: str, value: float) -> float:
    if check_weight(name, value) < 1:
        return value
    raise ValueError(f"{name} must be in [0, 1), got {value}")


def check_ignored(name: str, value: int | None) -> int | None:
    if value is None or isinstance(value, int) and not isinstance(value, bool):
        return value
    raise ValueError(f"{name} must be the label of rows without a class, such as -100, or None, got {value!r}")


def check_order(name: str, value: int) -> int:
    if value in (1, 2):
        return value
    raise ValueError(f"{name} must be 1 or 2, got {value!r}")


def check_pairs(name: str, table: Sequence[Sequence[float]] | Tensor | None) -> list[list[float]] | None:
    """The weights [K, K] as lists."""
    if table is None:
        return None
    try:
        rows = [[float(weight) for weight in row] for row in table]
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be numbers [K, K] for K heads a network, got {table!r}") from None
    lengths = [len(row) for row in rows]
    if not rows or set(lengths) != {len(rows)}:
        raise ValueError(f"{name} must be [K, K] for K heads a network, got {len(rows)} rows of {lengths}")
    for k, row in enumerate(rows):
        for other, weight in enumerate(row):
            check_weight(f"{name}[{k}][{other}]", weight)
    return rows
