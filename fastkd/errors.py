"""The one exception for bad input."""

from collections.abc import Iterable


class UserError(ValueError):
    """Bad input. The message says what is wrong, with the values, and what to do. The command prints it as one line."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the closest of `choices`, or the empty string."""
    from difflib import get_close_matches

    by_letters = {choice.lower(): choice for choice in choices}
    match = get_close_matches(word.lower(), list(by_letters), n=1, cutoff=0.5)
    return f" (did you mean {by_letters[match[0]]!r}?)" if match else ""
