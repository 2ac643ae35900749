"""The kinds of options that come from Python: what the command line ensures as it reads them (parser.py)."""

from numbers import Integral, Real
from typing import Any, Literal, get_args, get_origin, get_type_hints

from .errors import UserError, nearest

NUMBERS: dict[Any, tuple[type, str]] = {int: (Integral, "a whole number"), float: (Real, "a number")}


def check_kinds(options: object) -> None:
    """Raise UserError for the first option of a dataclass that is of another kind, or none of its choices."""
    for name, kind in get_type_hints(type(options)).items():
        value, option = getattr(options, name), f"--{name.replace('_', '-')}"
        if get_origin(kind) is tuple and not isinstance(value, (tuple, list)):
            raise UserError(f"{option} must be a tuple, got {value!r}: ({value!r},)")
        item = get_args(kind)[0] if get_origin(kind) is tuple else kind
        for each in value if get_origin(kind) is tuple else (value,):
            _check(option, item, each)


def _check(option: str, kind: Any, value: object) -> None:
    if kind is bool and not isinstance(value, bool):
        raise UserError(f"{option} must be True or False, got {value!r}")
    if kind in NUMBERS and (isinstance(value, bool) or not isinstance(value, NUMBERS[kind][0])):
        raise UserError(f"{option} must be {NUMBERS[kind][1]}, got {value!r}")
    words = get_args(kind) if get_origin(kind) is Literal else ()
    if words and value not in words:
        raise UserError(f"{option} must be one of {', '.join(words)}, got {value!r}{nearest(str(value), words)}")
