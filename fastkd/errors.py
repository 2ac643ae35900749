"""The one exception for bad input, words for its text, and the check of a number that several options share."""

import math
import os
import re
import reprlib
from collections import Counter
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from numbers import Real

ARGUMENTS: set[str] = set()  # names of options that Python has too, from option_kinds.py


class UserError(ValueError):
    """The input is wrong. The message says what, with the values, and what to do; the command prints it as one line.

    It names options as the command line does. A traceback also says what they are called in Python.
    """

    def __init__(self, message: str):
        super().__init__(message)
        flags = re.findall(r"(?<![\w-])--(no-)?([a-z][a-z0-9-]*)\b", re.sub("`[^`]*`", "", message))
        named = {(no, name.replace("-", "_")): None for no, name in flags}
        words = [f"{name}=False" if no else f"{name}=" for no, name in named if name in ARGUMENTS]
        if words:
            self.__notes__ = [f"In Python, options are arguments: {', '.join(words)}"]


def lost_worker(error: Exception) -> str:
    """What to tell of torch's error for a DataLoader's worker process that has died or does not answer; else ""."""
    text = str(error).splitlines()[0] if isinstance(error, RuntimeError) and str(error) else ""
    if "DataLoader timed out" in text:
        return (
            f"no batch came from the worker processes: {text}; the disk may hang or the memory be full; what was saved "
            "is intact; --worker-timeout waits longer, --workers 0 needs no process"
        )
    if "DataLoader worker" not in text:
        return ""
    killed = "signal: Killed" in text + str(error.__cause__)
    reason = "; the memory of the machine, or of its container, was probably full" if killed else ""
    return f"a worker process has ended: {text}{reason}; what was saved is intact; go on with fewer --workers"


def as_typed(name: str, value: object) -> str:
    """An option as on the command line: "--pad-mode zeros", "--mean 0.5 0.5 0.5", "--exif"."""
    words = [str(each) for each in value] if isinstance(value, tuple) else [] if value is True else [str(value)]
    plain = [word if re.fullmatch(r"[\w.,:/+-]+", word) else repr(word) for word in words]
    return " ".join(["--" + name.replace("_", "-"), *plain])


def check_classes(names: Sequence[str], what: str) -> None:
    """Raise UserError if two classes have one name: a weights file must tell them apart. `what` has these names."""
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise UserError(
            f"{what} name {count_of(len(twice), 'class')} more than once, such as {twice[0]!r}: give each label a name "
            "of its own"
        )


def no_folder(path: object) -> str:
    """Why a path that is no folder cannot be used as one."""
    return "it is a file, not a folder" if os.path.exists(str(path)) else "no such folder"


def count_of(number: int, noun: str) -> str:
    """1 epoch, 1,000 epochs, 2 classes"""
    ending = "" if number == 1 else "es" if noun.endswith(("ss", "tch")) else "s"
    return f"{number:,} {noun}{ending}"


def check_number(name: str, value: float, *, above_zero: bool = False, hint: str = "") -> None:
    """Raise UserError unless the option `name` is a finite number of 0 or more, or above 0 with `above_zero`.

    `hint` ends the message, such as "; leave the method out".
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise UserError(f"--{name.replace('_', '-')} must be a number, got {value!r}{hint}")
    if not (0 < value if above_zero else 0 <= value) or value == math.inf:
        wanted = "above 0" if above_zero else "from 0"
        raise UserError(f"--{name.replace('_', '-')} must be a number {wanted}, got {value}{hint}")


LARGEST_SIDE = 4096  # pixels


def check_side(name: str, side: int) -> None:
    """Raise UserError if square images of this side would fill the memory. `name` is that of the option."""
    if side > LARGEST_SIDE:
        raise UserError(
            f"{name} {side}: images may have {LARGEST_SIDE} x {LARGEST_SIDE} pixels at most; give a smaller one"
        )


def printable(text: str, encoding: str | None, keep: str = "") -> str:
    """`text` as a terminal of this encoding can show it; None is UTF-8.

    Letters that it lacks, bytes of file names that are not UTF-8, and control characters that are not in `keep` become
    escapes such as \\xe9, \\udce9 and \\n.
    """
    escaped = re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda found: _escape(found[0], keep), text)
    encoding = encoding or "utf-8"
    return escaped.encode(encoding, "backslashreplace").decode(encoding)


def _escape(letter: str, keep: str) -> str:
    return letter if letter in keep else repr(letter)[1:-1]


def nearest(word: str, choices: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the closest of `choices`, or the empty string if none is near.

    A choice is near if it begins with the word, of 3 letters or more, or if two thirds of the letters agree in order,
    three quarters in a word of up to 3 letters. Dashes, underscores and capitals count for nothing.
    """
    by_letters = {_letters(choice): choice for choice in choices}
    wanted = _letters(word)
    begun = sorted((each for each in by_letters if each.startswith(wanted)), key=len) if len(wanted) > 2 else []
    cutoff = 0.75 if len(wanted) < 4 else 0.65
    found = [wanted] if wanted in by_letters else begun or get_close_matches(wanted, list(by_letters), 1, cutoff)
    return f" (did you mean {by_letters[found[0]]!r}?)" if found else ""


def _letters(word: str) -> str:
    return re.sub("[-_]", "", word.lower())


def shown(value: object) -> str:
    """A value of a file that may be anything, in a few words for a line of text."""
    return reprlib.repr(value)[:60]
