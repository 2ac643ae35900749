"""Parse options from the command line and from files.

Names and types are checked here, so that a wrong one gets a one-line error. tyro parses the values and writes the help.
In this file `kind` is always a dataclass whose fields are sections, and a section is a dataclass of options.
"""

import contextlib
import io
import os
import re
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from typing import Any, Literal, TypeVar, cast, get_args, get_origin

from .errors import UserError, nearest

T = TypeVar("T")


def option_types(kind: type) -> dict[str, type]:
    """The type of every option, by its name."""
    options = (option for section in fields(kind) for option in fields(cast(type, section.type)))
    return {option.name: cast(type, option.type) for option in options}


def groups(arguments: list[str]) -> list[tuple[str, list[str]]]:
    """Each `--flag` with the words after it. Words before the first flag come first, with an empty flag."""
    found: list[tuple[str, list[str]]] = [("", [])]
    for argument in arguments:
        if argument.startswith("--"):
            flag, equals, word = argument.partition("=")
            found.append((flag, [word] if equals else []))
        else:
            found[-1][1].append(argument)
    return found if found[0][1] else found[1:]


def name_of(flag: str) -> str:
    """The name of an option, `batch_size`, from `--batch-size`, `batch-size` or `batch_size`."""
    return flag.removeprefix("--").replace("-", "_")


def typed_options(arguments: list[str]) -> dict[str, str]:
    """The first word after each `--name`, or an empty string, by name. The last one of equal names counts."""
    return {name_of(flag): words[0] if words else "" for flag, words in groups(arguments)}


def tokens_of(values: dict[str, Any], kind: type, source: str) -> list[str]:
    """The options of a file in the form of the command line. Errors name the `source`."""
    types = option_types(kind)
    tokens: list[str] = []
    for name, value in values.items():
        if name not in types:
            raise UserError(f"{source}: unknown option {name!r}{nearest(name, types)}")
        words = [str(item) for item in (value if isinstance(value, list) else [value])]
        has_value = not isinstance(value, dict) and value is not None
        if not has_value or isinstance(value, bool) != (types[name] is bool) or not _fits(types[name], words):
            raise _wrong(f"{source}: {name}", types[name], words, repr(value))
        flag = name.replace("_", "-")
        tokens += ([f"--{flag}"] if value else [f"--no-{flag}"]) if types[name] is bool else [f"--{flag}", *words]
    return tokens


def run_parser(kind: type[T], arguments: list[str], command: str, earlier: Sequence[str] = ()) -> T:
    """An instance of `kind` from the command line. `arguments` override the `earlier` tokens (from tokens_of).

    Raises UserError, also for what tyro itself refuses, such as a value out of range.
    """
    import tyro

    arguments = ["--batch-size" if argument == "-b" else argument for argument in arguments]
    parse = partial(tyro.cli, kind, prog=command, args=[*earlier, *arguments], config=(tyro.conf.OmitArgPrefixes,))
    if "--help" in arguments or "-h" in arguments:
        return parse()
    _check(arguments, kind, command)
    before, text = os.environ.get("COLUMNS"), io.StringIO()
    os.environ["COLUMNS"] = "1000"
    try:
        with contextlib.redirect_stderr(text):
            return parse()
    except SystemExit:  # tyro has printed the error in a box
        lines = [re.sub("[│╭╮╰╯]", "", line).strip() for line in text.getvalue().splitlines()[1:]]
        rule = next((number for number, line in enumerate(lines) if line.startswith("───")), len(lines))
        # The messages of fastkd's checks name the option: drop "Error parsing <section>: ".
        message = re.sub(r"^Error parsing (\w+: )?", "", " ".join(line for line in lines[:rule] if line))
        raise UserError(message) from None
    finally:
        os.environ.pop("COLUMNS") if before is None else os.environ.update(COLUMNS=before)


def _check(arguments: list[str], kind: type, command: str) -> None:
    """Raise UserError for an unknown option or a value of the wrong type."""
    types = option_types(kind)
    for flag, words in groups(arguments):
        positive = name_of(flag).removeprefix("no_")
        name = positive if types.get(positive) is bool else name_of(flag)
        if not flag:
            hint = f" (did you mean --weights {words[0]}?)" if "weights" in types else ""
            raise UserError(f"unexpected {words[0]!r}{hint}; `{command} --help` lists the options")
        elif name not in types:
            flags = ["--" + known.replace("_", "-") for known in types]
            raise UserError(f"unknown option {flag!r}{nearest(flag, flags)}; `{command} --help` lists them")
        elif types[name] is bool and words:
            raise UserError(f"{flag} takes no value, got {' '.join(words)!r}: write --{name} or --no-{name}")
        elif types[name] is not bool and not _fits(types[name], words):
            raise _wrong(flag, types[name], words, repr(" ".join(words)) if words else "nothing")


def _fits(kind: type, words: list[str]) -> bool:
    """True if `words` are a value of the type `kind`."""
    if get_origin(kind) is tuple:
        item, *rest = get_args(kind)
        return all(_fits(item, [word]) for word in words) and (rest == [...] or len(words) == 1 + len(rest))
    if len(words) != 1:
        return False
    if get_origin(kind) is Literal:
        return words[0] in get_args(kind)
    try:
        kind(words[0])
    except ValueError:
        return False
    return True


def _wrong(option: str, kind: type, words: list[str], got: str) -> UserError:
    """The error of an option of type `kind` that got these words."""
    choices, hint = get_args(kind), ""
    if get_origin(kind) is Literal:
        wanted = f"one of {', '.join(choices)}"
        hint = nearest(words[0], choices) if words else ""
    elif get_origin(kind) is tuple:
        wanted = "numbers" if ... in choices else f"{len(choices)} numbers"
    else:
        wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "one text"}[kind]
        hint = "; put quotes around it" if kind is str and len(words) > 1 else ""
    return UserError(f"{option} must be {wanted}, got {got}{hint}")
