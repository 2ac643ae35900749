"""The base class of the losses: options that are checked when they are set and shown when the loss is printed."""

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

UNLABELLED = -100
"""The label of an image without one, as torch ignores it; see `ignore_index`."""

Check = Callable[[str, Any], Any]  # name and value of an option -> the value to store, or ValueError


class Loss(nn.Module):
    """Options are attributes, shown when printed: KDLoss(temperature=4.0, ce_weight=0.1, ...).

    They may be changed between calls, as a schedule does: `loss.kd_weight = 0.9 * epoch / epochs`. A subclass is a
    dataclass whose fields are the options. They are weights, or have their checks in CHECKS.
    """

    __match_args__: ClassVar[tuple[str, ...]]  # the names of the options, from `dataclass`

    def __post_init__(self) -> None:
        super().__init__()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__match_args__:
            value = CHECKS.get(name, check_weight)(name, value)
        super().__setattr__(name, value)

    def settings(self, *names: str) -> dict[str, Any]:
        """The options `names`, or all of them: the keyword arguments of a kernel."""
        return {name: getattr(self, name) for name in names or self.__match_args__}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.settings().items())


def _checked(wanted: str, fits: Callable[[Any], bool]) -> Check:
    def check(name: str, value: Any) -> Any:
        if fits(value):
            return value
        raise ValueError(f"{name} must be {wanted}, got {value!r}")

    return check


check_weight = _checked(
    "zero or a positive number", lambda value: isinstance(value, Real) and 0 <= float(value) < math.inf
)


def check_smoothing(name: str, value: float) -> float:
    if check_weight(name, value) < 1:
        return value
    raise ValueError(f"{name} must be in [0, 1), got {value}")


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


def check_class_weights(name: str, value: Sequence[float] | Tensor | None) -> Tensor | None:
    """The weights [C] as a floating tensor. Values are checked on the CPU, where reading them waits for nothing."""
    if value is None:
        return None
    try:
        weights = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name} must be numbers [C], one for each class, got {value!r}") from None
    weights = weights.detach() if weights.is_floating_point() else weights.float()
    if weights.dim() != 1:
        raise ValueError(f"{name} must be numbers [C], one for each class, got the shape {list(weights.shape)}")
    if weights.device.type == "cpu":
        for label, weight in enumerate(weights.tolist()):
            check_weight(f"{name}[{label}]", weight)
    return weights


CHECKS: dict[str, Check] = {
    "temperature": _checked("a positive number", lambda value: isinstance(value, Real) and 0 < float(value) < math.inf),
    "label_smoothing": check_smoothing,
    "ignore_index": _checked(
        "the label of rows without a class, such as -100, or None",
        lambda value: value is None or isinstance(value, int) and not isinstance(value, bool),
    ),
    "class_weights": check_class_weights,
    "mask_kd": _checked("True or False", lambda value: isinstance(value, bool)),
    "reduction": _checked("mean, sum or none", lambda value: value in ("mean", "sum", "none")),
    "standardize": lambda name, value: value,
    "p": _checked("1 or 2", lambda value: value in (1, 2)),
    "pair_weights": check_pairs,
}
