"""Checks of the options of a loss: each returns the value, or raises ValueError."""

import math
from collections.abc import Sequence
from numbers import Real

from torch import Tensor


def check_positive(name: str, value: float) -> float:
    if _is_finite(value) and value > 0:
        return value
    raise ValueError(f"{name} must be a positive number, got {value!r}")


def check_weight(name: str, value: float) -> float:
    if _is_finite(value) and value >= 0:
        return value
    raise ValueError(f"{name} must be zero or a positive number, got {value!r}")


def _is_finite(value: object) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


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
