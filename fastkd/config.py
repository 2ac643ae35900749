"""The effective configuration, from the recipe, the YAML file and the command line, in this order: later ones win.

All three go through the same parser. A YAML file is a flat list of options: `batch_size: 128` or `batch-size: 128`.
The options of a method exist only if that method is chosen.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields, make_dataclass
from pathlib import Path
from typing import Any, cast

from .data import DataOptions
from .engine import TrainOptions
from .errors import UserError, no_folder
from .foreign import parse_yaml, read_text
from .methods import METHODS, find_method
from .network_options import NetworkOptions
from .parser import groups, name_of, option_types, run_parser, tokens_of, typed_options, typed_words
from .recipes import read_recipe

SWITCHES = ("graph", "compile", "flip")  # their values: auto, on, off
AS_WRITTEN = ("train_size",)  # YAML 1.1 reads 24:32 as the number 24 * 60 + 32
NOT_IN_FILES = ("config", "print_config", "resume", "extend", "quiet", "verbose")

Sources = list[tuple[str, dict[str, Any]]]
"""Options of the recipe, of the file and of the command line. Each comes with the name of its source, for errors."""


@dataclass(frozen=True)
class RunOptions:
    """What to run."""

    method: str = "kd"
    """How the student is taught. `fastkd methods` lists the methods. This help shows the options of the chosen one."""
    recipe: str = ""
    """A named set of options. The default on the digits is the recipe `digits`, unless --config is given."""
    config: str = ""
    """A YAML file of options. The command line overrides it."""
    print_config: bool = False
    """Print the effective configuration as YAML and stop."""
    quiet: bool = False
    """Print the result alone; warnings go to stderr."""
    verbose: bool = False
    """Print more: the options of each training, each saved state."""


@dataclass(frozen=True)
class Config:
    """The effective configuration of `fastkd train`. `method` holds the options of the chosen method."""

    run: RunOptions
    networks: NetworkOptions
    method: Any  # the Options class of the chosen method, see config_type
    data: DataOptions
    train: TrainOptions


def parse(arguments: list[str], log: Callable[[str], None] = print) -> Config:
    """The effective configuration of a command line. `log` gets a line for each choice that fastkd makes.

    Raises UserError for unknown options and wrong values, whichever source they are from.
    """
    arguments = _start_or_resume(arguments, log)
    sources = _sources(arguments, log)
    method = _from(sources, "method") or RunOptions.method
    _refuse_options_of_other_methods(method, sources)
    kind = config_type(method)
    tokens = [token for source, values in sources[:-1] for token in tokens_of(values, kind, source)]
    tokens += _teacher_as_it_is(sources, typed_words(arguments, "teacher_weights"), log)
    try:
        config = run_parser(kind, arguments, "fastkd train", tokens, log)
    except UserError as error:
        raise UserError(_origin(str(error), sources) + str(error)) from None
    _refuse_options_without_effect(config, sources[-1][1].keys())
    return config


def _origin(message: str, sources: Sources) -> str:
    """The recipe or file, as "NAME: ", that gives the first option which `message` names; "" for the command line."""
    if message.startswith("unexpected "):
        return ""
    for name in re.findall(r"^\w+|--[a-z][\w-]*|\b[a-z]\w*(?==)", message):
        for source, values in reversed(sources):
            if name_of(name) in values:
                return f"{source}: " if values is not sources[-1][1] else ""
    return ""


def _teacher_as_it_is(sources: Sources, typed: list[str], log: Callable[[str], None]) -> list[str]:
    """`--teacher-epochs 0` where weights are given, `typed` or in a file, and an earlier source trains without any."""
    last: dict[str, int] = {}
    for place, (_, values) in enumerate(sources):
        last |= {name: place for name in ("teacher_weights", "teacher_epochs") if values.get(name)}
    epochs, weights = last.get("teacher_epochs", -1), last.get("teacher_weights", -1)
    given = typed if weights == len(sources) - 1 else sources[weights][1].get("teacher_weights", [])
    if not 0 <= epochs < weights or "none" in ([given] if isinstance(given, str) else given):
        return []
    source, values = sources[epochs]
    log(
        f"the teacher has weights and is not trained: --teacher-epochs {values['teacher_epochs']} of {source} is for "
        "a teacher without weights; --teacher-epochs N fine-tunes it"
    )
    return ["--teacher-epochs", "0"]


def config_type(method: str) -> type[Config]:
    """Config with the options of a method, by its name."""
    return make_dataclass("Config", [("method", find_method(method).Options)], bases=(Config,), frozen=True)


def flat(config: Config) -> dict[str, Any]:
    """Every option that affects a run, by name, with lists in place of tuples: ready for YAML."""
    values = {name: value for section in vars(config).values() for name, value in vars(section).items()}
    for name in ("recipe", *NOT_IN_FILES):
        del values[name]
    return values | {name: list(value) for name, value in values.items() if isinstance(value, tuple)}


def defaults(method: str) -> dict[str, Any]:
    """`flat` of a configuration of this method without any given option."""
    kind = config_type(method)
    sections: dict[str, Any] = {section.name: cast(type, section.type)() for section in fields(kind)}
    return flat(kind(**sections))


def _start_or_resume(arguments: list[str], log: Callable[[str], None]) -> list[str]:
    """`arguments` with `--resume` for `--resume auto` if the run in --out has begun, else without it.

    Raises UserError for another value, and for `--resume auto` without --out.
    """
    words = typed_words(arguments, "resume")
    if words and words != ["auto"]:
        raise UserError(
            f"--resume takes no value but auto, got {' '.join(words)!r}: write --resume, --resume auto or --no-resume; "
            "the folder of the run is that of --out"
        )
    if not words:
        return arguments
    typed = typed_options(arguments)
    out = typed.get("out") or (typed.get("config") and _read_yaml(Path(typed["config"])).get("out"))
    if not out:
        raise UserError("--resume auto needs --out FOLDER, the folder of the run to start or to go on with")
    kept = [(flag, words) for flag, words in groups(arguments) if name_of(flag) != "resume"]
    begun = (Path(str(out)) / "config.yaml").is_file()
    log(f"--resume auto: {'goes on with the run in' if begun else 'starts a new run in'} {out}")
    return [word for flag, words in kept for word in ([flag] if flag else []) + words] + ["--resume"] * begun


def _sources(arguments: list[str], log: Callable[[str], None]) -> Sources:
    """The options of the recipe, of the file and of the command line."""
    typed = typed_options(arguments)
    path, sources = typed.get("config", ""), [("command line", typed)]
    if path:
        sources = [(f"--config {path}", _read_yaml(Path(path))), *sources]
    if "--resume" in arguments:
        out = _from(sources, "out")
        if not out:
            raise UserError("--resume needs --out FOLDER, the folder of the run to resume")
        started = Path(out) / "config.yaml"
        if not os.path.isfile(started):
            reason = "no config.yaml" if os.path.isdir(out) else no_folder(out)
            raise UserError(f"--resume: there is no run in {out} ({reason}); check the path, or drop --resume")
        begun = _read_yaml(started)
        if "workers" not in begun:  # an option of the command alone
            raise UserError(
                f"--resume: a script made the run in {out}; to go on, run the script again, with "
                f"TrainOptions(out={str(out)!r}, resume=True)"
            )
        method = _from(sources, "method")
        if method and method != begun.get("method"):
            raise UserError(
                f"--resume: the run in {out} has --method {begun.get('method')}, got {method}; drop --method to "
                "go on, or begin a new run: drop --resume and choose another --out"
            )
        if not (typed.get("recipe") or path):  # so that `--out DIR --resume` is enough
            path, sources = str(started), [(f"--config {started}", begun), *sources]
    default = "digits" if typed.get("data", DataOptions.data) == "digits" and not path else ""
    recipe = _from(sources, "recipe") or default
    if not recipe:
        return sources
    given = {name: value for _, values in sources for name, value in values.items()}
    return [(f"--recipe {recipe}", read_recipe(recipe, given, log)), *sources]


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values, node = parse_yaml(read_text(path))
    except FileNotFoundError:
        raise UserError(
            f"--config {path}: there is no such file; check the path, or make one by `fastkd train --print-config`"
        ) from None
    except OSError as error:
        raise UserError(f"--config {path} cannot be read: {error.strerror}") from None
    except ValueError as error:  # also of text that is not UTF-8, and of an impossible date
        raise UserError(f"--config {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict) or node is None:
        raise UserError(f"--config {path} must consist of `name: value` lines")
    for name, times in Counter(name_of(str(key.value)) for key, _ in node.value).items():
        if times > 1:  # YAML would silently take the last one
            raise UserError(f"--config {path}: {name} is given {times} times; keep one of the lines")
        if name in NOT_IN_FILES:
            raise UserError(f"--config {path}: {name} is for the command line only; remove the line")
    found = {name: _word(name, value) for key, value in values.items() for name in [name_of(str(key))]}
    letters = {name_of(str(key.value)): str(value.value) for key, value in node.value}
    return found | {name: letters[name] for name in AS_WRITTEN if name in found}


def _word(name: str, value: Any) -> Any:
    """The value of an option; YAML reads `on` and `off` as booleans."""
    return {True: "on", False: "off"}[value] if name in SWITCHES and isinstance(value, bool) else value


def _refuse_options_of_other_methods(method: str, sources: Sources) -> None:
    known = option_types(config_type(method))
    for source, values in sources:
        for name in values.keys() - known.keys():
            having = [other for other in METHODS if name in option_types(config_type(other))]
            prefixed = [f"--{term}-{name}".replace("_", "-") for term in method.split("+") if f"{term}_{name}" in known]
            hint = f"methods that have it: {', '.join(having)}"
            if prefixed:
                hint = f"did you mean {' or '.join(prefixed)}?"
            if prefixed or having:
                raise UserError(f"{source}: method {method} has no option {name} ({hint})")


def _refuse_options_without_effect(config: Config, typed: Collection[str]) -> None:
    """Raise UserError if an option of the command line changes nothing, and is not at its default.

    Recipes and files may hold such options: they are made for several methods and schedules.
    """
    method, names, train = config.run.method, config.networks, config.train
    kind = find_method(method)
    teacher = [name for name in vars(names) if name.partition("_")[0] == "teacher" and name != "teacher_weights"]
    reasons = (
        {} if kind.needs_teacher else dict.fromkeys([*teacher, "ensemble"], f"the method has no teacher ({method})")
    )
    if len(names.teacher) == 1:
        reasons.setdefault("ensemble", "there is one teacher")
    if method == "ce":
        reasons["baseline"] = "method ce is the student alone"
    if train.sched != "cosine":
        reasons["min_lr"] = f"it ends the cosine, and --sched is {train.sched}"
    if train.sched != "step":
        reasons["decay_epochs"] = f"it is for --sched step, and --sched is {train.sched}"
    if train.sched != "multistep":
        reasons["decay_milestones"] = f"they are for --sched multistep, and --sched is {train.sched}"
    if train.sched not in ("step", "multistep"):
        reasons["decay_rate"] = f"it is for --sched step and multistep, and --sched is {train.sched}"
    if not train.warmup_epochs:
        reasons["warmup_lr"] = "--warmup-epochs is 0"
    for section in (names, train):
        for option in fields(section):
            if option.name in typed and option.name in reasons and getattr(section, option.name) != option.default:
                flag = option.name.replace("_", "-")
                raise UserError(f"--{flag} has no effect: {reasons[option.name]}; drop --{flag}")


def _from(sources: Sources, key: str) -> str:
    """The value of an option in the last source that has it, as text, or an empty string."""
    return next((str(values[key]) for _, values in reversed(sources) if values.get(key, "") != ""), "")
