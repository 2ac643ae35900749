"""Checks of the options of a loss."""

import math
from numbers import Real


def check_positive(name: str, value: float) -> None:
    if not (isinstance(value, Real) and value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be a positive number, got {value!r}")


def check_weight(name: str, value: float) -> None:
    if not (isinstance(value, Real) and value >= 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be zero or a positive number, got {value!r}")
