"""The exception for bad input, and the hint at the nearest valid name."""

from collections.abc import Iterable


class UserError(ValueError):
    """The input is wrong. The message says what is wrong, the values, and what to do. Commands print it as one line."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the choice closest to `word`, or an empty string if none is close."""
    from difflib import get_close_matches

    by_letters = {choice.lower(): choice for choice in choices}
    match = get_close_matches(word.lower(), list(by_letters), n=1, cutoff=0.5)
    return f" (did you mean {by_letters[match[0]]!r}?)" if match else ""
