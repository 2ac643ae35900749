"""Parse options from the command line and from files.

Names and types are checked here, so that a wrong one gets a one-line error. tyro parses the values and writes the help.
In this file `kind` is always a dataclass whose fields are sections, and a section is a dataclass of options.
"""

import contextlib
import io
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import MISSING, fields
from functools import cache, partial
from typing import Annotated, Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

from .errors import UserError, nearest, printable
from .option_names import nearest_option

T = TypeVar("T")

SHORT = {"-b": "--batch-size", "-h": "--help"}


def option_types(kind: type) -> dict[str, type]:
    """The type of every option, by its name."""
    options = (option for section in fields(kind) for option in fields(cast(type, section.type)))
    return {option.name: cast(type, option.type) for option in options}


def groups(arguments: list[str]) -> list[tuple[str, list[str]]]:
    """Each flag with the words after it. Words before the first flag come first, with an empty flag.

    A short flag is a dash and a letter: -8 and -.5 are values. Those of SHORT become the long ones.
    """
    found: list[tuple[str, list[str]]] = [("", [])]
    for argument in arguments:
        if re.match(r"--|-(?!inf|nan)[a-z]", argument, re.IGNORECASE):
            flag, equals, word = argument.partition("=")
            found.append((SHORT.get(flag, flag), [word] if equals else []))
        else:
            found[-1][1].append(argument)
    return found if found[0][1] else found[1:]


def name_of(flag: str) -> str:
    """The name of an option, `batch_size`, from `--batch-size`, `batch-size` or `batch_size`."""
    return flag.removeprefix("-").removeprefix("-").replace("-", "_")


def typed_options(arguments: list[str]) -> dict[str, str]:
    """The first word after each `--name`, or an empty string, by name. The last one of equal names counts."""
    return {name_of(flag): words[0] if words else "" for flag, words in groups(arguments)}


def typed_words(arguments: list[str], name: str) -> list[str]:
    """All words after the last `--name`."""
    return {name_of(flag): words for flag, words in groups(arguments)}.get(name, [])


def split_words(arguments: list[str], kind: type) -> tuple[list[str], list[str]]:
    """The words that belong to no option, such as names of files; and the options with their values.

    An option of one value takes one word, and a switch none. Others take all words up to the next option.
    """
    types, words, options = option_types(kind), list[str](), list[str]()
    for flag, values in groups(arguments):
        kept = len(values)
        if not flag or types.get(_positive(flag, types)) is bool:
            kept = 0
        elif get_origin(types.get(name_of(flag))) is not tuple and name_of(flag) in types:
            kept = 1
        options += [flag, *values[:kept]] if flag else []
        words += values[kept:]
    return words, options


def tokens_of(values: dict[str, Any], kind: type, source: str) -> list[str]:
    """The options of a file in the form of the command line. Errors name the `source`."""
    types = option_types(kind)
    tokens: list[str] = []
    for name, value in values.items():
        if name not in types:
            raise UserError(f"{source}: unknown option {name!r}{nearest_option(name, types)}")
        items = value if isinstance(value, list) else [value]
        words = [str(item) for item in items]
        has_value = not any(item is None or isinstance(item, (list, dict)) for item in items)
        if not has_value or isinstance(value, bool) != (types[name] is bool) or not _fits(types[name], words):
            raise _wrong(f"{source}: {name}", types[name], words, repr(value))
        _refuse_flags(f"{source}: {name}", words)
        flag = name.replace("_", "-")
        tokens += ([f"--{flag}"] if value else [f"--no-{flag}"]) if types[name] is bool else [f"--{flag}", *words]
    return tokens


def _refuse_flags(option: str, words: list[str]) -> None:
    """Raise UserError for values of a file that the command line would take for options, or cannot hold."""
    for word in words:
        if word.startswith("-") and not re.match(r"-\.?\d", word):
            raise UserError(
                f"{option} has the value {word!r:.80}, which begins like an option; write ./{word:.40} for a file"
            )
        if "\0" in word:
            raise UserError(f"{option} has the value {word!r:.80}, with a zero byte, which no name may hold")


def _warn(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"fastkd: {printable(line, getattr(sys.stderr, 'encoding', None))}", file=sys.stderr)


def run_parser(
    kind: type[T], arguments: list[str], command: str, earlier: Sequence[str] = (), log: Callable[[str], None] = _warn
) -> T:
    """An instance of `kind` from the command line. `arguments` override the `earlier` tokens (from tokens_of).

    Raises UserError, also for what tyro itself refuses, such as a value out of range. `log` gets a line for each option
    of `arguments` that has several values.
    """
    import tyro

    arguments = _with_values(arguments, kind)
    parse = partial(tyro.cli, kind, prog=command, args=[*earlier, *arguments], config=(tyro.conf.OmitArgPrefixes,))
    if "--help" in arguments:
        _join_lines_of_help(cast(Any, kind))
        return parse()
    command = " ".join(word for word in command.split() if word.islower())  # without its arguments, such as RUN
    _check(arguments, kind, command)
    _check_required([*earlier, *arguments], kind, command)
    for line in _repeated(arguments, kind):
        log(line)
    text = io.StringIO()
    try:
        with contextlib.redirect_stderr(text):
            return parse()
    except SystemExit as stop:  # tyro has printed the error in a box
        raise UserError(_refusal(stop) or _unboxed(text.getvalue())) from None


@cache
def _join_lines_of_help(kind: type) -> None:
    """Give tyro the text of each option in one line, and a word for an empty default.

    tyro keeps line breaks of the source before indented lines.
    """
    import docstring_parser
    import tyro

    for section in {cast(type, option.type) for option in fields(kind)}:
        texts = {each.arg_name: each.description for each in docstring_parser.parse_from_object(section).params}
        empty = {each.name for each in fields(section) if each.default in ("", ())}
        for name, hint in get_type_hints(section, include_extras=True).items():
            text = " ".join((texts.get(name) or "").split())
            default = ("" if "Default: " in text else "(default: none)") if name in empty else None
            about = tyro.conf.arg(help=text, help_behavior_hint=default)
            section.__annotations__[name] = Annotated[hint, about] if text else hint


def _with_values(arguments: list[str], kind: type) -> list[str]:
    """`arguments` with `--flip on` and `--flip off` for `--flip` and `--no-flip`, of any option with these values."""
    types = option_types(kind)
    switches = {name for name, each in types.items() if {"on", "off"} <= {*get_args(each)}}
    words: list[str] = []
    for flag, values in groups(arguments):
        name = name_of(flag)
        if name.startswith("no_") and name.removeprefix("no_") in switches and not values:
            words += ["--" + name.removeprefix("no_").replace("_", "-"), "off"]
        else:
            words += [flag, *(values or ["on"] if name in switches else values)] if flag else values
    return words


def _refusal(stop: BaseException) -> str:
    """The message of the check that made tyro stop, from the exceptions that led to `stop`; or the empty string."""
    causes, cause = [], stop.__context__
    while cause is not None:
        causes.append(cause)
        cause = cause.__context__
    ours = [str(cause) for cause in causes if isinstance(cause, UserError)]
    others = [str(cause) for cause in causes if isinstance(cause, ValueError)]
    return next(iter(ours + others), "")


def _unboxed(text: str) -> str:
    """What tyro prints in a box, on one line; the box is drawn with other characters where the terminal is ASCII."""
    lines = [re.sub(r"[─│╭╮╰╯|+]|-{3,}", " ", line).strip() for line in text.splitlines()]
    return " ".join(" ".join(lines).split())


def _repeated(arguments: list[str], kind: type) -> Iterator[str]:
    """A warning for each option that is given several times, with other values than the last one."""
    given: dict[str, list[list[str]]] = {}
    for flag, words in groups(arguments):
        given.setdefault(_positive(flag, option_types(kind)), []).append([flag, *words])
    for name, every in given.items():
        if any(name_of(flag) != name_of(every[-1][0]) or words != every[-1][1:] for flag, *words in every):
            option, last = name.replace("_", "-"), " ".join(every[-1])
            yield f"WARNING: --{option} is given {len(every)} times; the last one counts: {last}"


def _positive(flag: str, types: dict[str, type]) -> str:
    """The name of the option of a flag: of `--no-report` too it is `report`."""
    positive = name_of(flag).removeprefix("no_")
    return positive if types.get(positive) is bool else name_of(flag)


def _check_required(arguments: list[str], kind: type, command: str) -> None:
    """Raise UserError if an option without a default is not given."""
    given = typed_options(arguments)
    for option in (option for section in fields(kind) for option in fields(cast(type, section.type))):
        if option.default is MISSING and option.default_factory is MISSING and option.name not in given:
            flag = option.name.replace("_", "-")
            raise UserError(f"--{flag} is missing; `{command} --help` explains it")


def _check(arguments: list[str], kind: type, command: str) -> None:
    """Raise UserError for an unknown option or a value of the wrong type."""
    types = option_types(kind)
    others = types.keys() - typed_options(arguments).keys()
    for flag, words in groups(arguments):
        name = _positive(flag, types)
        if not flag:
            raise UserError(f"unexpected {words[0]!r}{_meant(words[0], others)}; `{command} --help` lists the options")
        elif name not in types or not flag.startswith("--"):
            hint = nearest_option(name_of(flag), types, dashes=True)
            raise UserError(f"unknown option {flag!r}{hint}; `{command} --help` lists them")
        elif types[name] is bool and words:
            raise UserError(f"{flag} takes no value, got {' '.join(words)!r}: write --{name} or --no-{name}")
        elif types[name] is not bool and not _fits(types[name], words):
            if get_origin(types[name]) is tuple or not _fits(types[name], words[:1]):
                raise _wrong(flag, types[name], words, repr(" ".join(words)) if words else "nothing")
            remedy = "put quotes around all of it, if it is one" if types[name] is str else "drop it"
            stray = f"{' '.join(words[1:])!r} belongs to no option{_meant(words[1], others)}"
            raise UserError(f"{flag} takes one value, got {' '.join(words)!r}: {stray}; {remedy}")


def _meant(word: str, known: Collection[str]) -> str:
    """Which of the `known` options a word without one is probably for, as a hint, or the empty string."""
    flag = "weights" if "weights" in known else "config" if word.endswith((".yaml", ".yml")) else "data"
    is_meant = flag in known and (flag != "data" or os.path.exists(word))
    return f" (did you mean --{flag} {word}?)" if is_meant else ""


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
    elif get_origin(kind) is tuple and get_origin(choices[0]) is Literal:
        names = get_args(choices[0])
        wanted = f"some of {', '.join(names)}"
        hint = next((nearest(word, names) for word in words if word not in names), "")
    elif get_origin(kind) is tuple:
        wanted = "numbers" if ... in choices else f"{len(choices)} numbers"
    else:
        wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "one text"}[kind]
    return UserError(f"{option} must be {wanted}, got {got}{hint}")
