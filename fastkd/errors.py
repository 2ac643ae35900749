"""The one exception for bad input, and the check of a number that several options share."""

import math
from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """The input is wrong. The message says what, with the values, and what to do; the command prints it as one line."""


def check_number(name: str, value: float, *, above_zero: bool = False, hint: str = "") -> None:
    """Raise UserError unless the option `name` is a finite number of 0 or more, or above 0 with `above_zero`.

    `hint` ends the message, such as "; leave the method out".
    """
    if not (0 < value if above_zero else 0 <= value) or value == math.inf:
        wanted = "above 0" if above_zero else "from 0"
        raise UserError(f"--{name.replace('_', '-')} must be a number {wanted}, got {value}{hint}")


def nearest(word: str, choices: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the closest of `choices`, or the empty string."""
    by_letters = {choice.lower(): choice for choice in choices}
    match = get_close_matches(word.lower(), list(by_letters), n=1, cutoff=0.5)
    return f" (did you mean {by_letters[match[0]]!r}?)" if match else ""
