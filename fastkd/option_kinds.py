"""The kinds of options that come from Python: what the command line ensures as it reads them (parser.py)."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import fields
from numbers import Integral, Real
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy

from .errors import ARGUMENTS, UserError, nearest

NUMBERS: dict[Any, tuple[type, str]] = {int: (Integral, "a whole number"), float: (Real, "a number")}


def check_kinds(options: Any) -> None:
    """Raise UserError for the first option of a dataclass that is of another kind, or none of its choices.

    Numbers of numpy are numbers, paths are text, any iterable but a str and an iterator is a tuple. Other types are not
    checked.
    """
    names = [each.name for each in fields(options)]
    ARGUMENTS.update(names)
    try:
        kinds = get_type_hints(type(options))
    except NameError:  # in the options of somebody's own method, a name that only a type checker knows
        return
    for name in names:
        value, kind, option = getattr(options, name), kinds[name], f"--{name.replace('_', '-')}"
        several = get_origin(kind) is tuple and get_args(kind)[1:] == (...,)
        if several and (isinstance(value, (str, Iterator)) or not isinstance(value, Iterable)):
            raise UserError(f"{option} must be a tuple of values, got {value!r}")
        for each in value if several else (value,):
            _check(option, get_args(kind)[0] if several else kind, each, getattr(type(options), name, "needed"))


def _check(option: str, kind: Any, value: object, usual: object) -> None:
    if kind is bool and not isinstance(value, (bool, numpy.bool_)):
        raise UserError(f"{option} must be True or False, got {value!r}")
    if kind is str and not isinstance(value, (str, os.PathLike)) and (value is not None or usual):
        example = f", such as {usual!r}" if usual and isinstance(usual, str) else ""
        raise UserError(f"{option} must be text, a str{example}, got {value!r}")
    if kind in NUMBERS and (isinstance(value, bool) or not isinstance(value, NUMBERS[kind][0])):
        raise UserError(f"{option} must be {NUMBERS[kind][1]}, got {value!r}")
    words = [str(word) for word in get_args(kind)] if get_origin(kind) is Literal else []
    if words and value not in get_args(kind):
        raise UserError(f"{option} must be one of {', '.join(words)}, got {value!r}{nearest(str(value), words)}")
