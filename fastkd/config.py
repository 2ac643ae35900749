"""From recipe, file and command line to one effective configuration. All three go through the same parser.

A YAML file holds options by their names (`batch_size: 128` or `batch-size: 128`), flat. Later sources win: the recipe,
the file, the command line. Options of a method are there when it is the chosen one.
"""

import contextlib
import importlib.resources
import io
import os
import re
from dataclasses import dataclass, fields, make_dataclass
from pathlib import Path

import yaml

from .data import DataOptions
from .engine import TrainOptions
from .errors import UserError, nearest
from .methods import METHODS

NOT_IN_FILES = ("config", "print_config", "resume")


@dataclass(frozen=True)
class RunOptions:
    """What to run."""

    method: str = "kd"
    """How the student is taught: `fastkd methods` lists them. The options below are those of the chosen method."""
    recipe: str = ""
    """Settings by name; for the digits it is `digits` unless a recipe or a file is given."""
    config: str = ""
    """YAML file of options; the command line overrides it."""
    print_config: bool = False
    """Print the effective configuration as YAML and stop."""


@dataclass(frozen=True)
class NetworkOptions:
    """Networks."""

    student: str = "timm/resnet18"
    """A CIFAR net (resnet20, wrn_40_2, vgg8, ...), timm/NAME or torchvision/NAME."""
    teacher: str = "timm/resnet50"
    """Likewise."""
    teacher_weights: str = ""
    """The teacher's weights: a file (.safetensors, .pth) or `pretrained` or a tag of its library."""
    teacher_epochs: int = 0
    """Without weights: train the teacher first for so many epochs, once per runs folder and settings."""
    student_weights: str = ""
    """Where the student starts: a file or tag; empty is a fresh initialisation."""
    baseline: bool = False
    """Also train the student alone, with the same options, for the table at the end."""

    def __post_init__(self):
        if self.teacher_epochs < 0:
            raise UserError(f"--teacher-epochs must not be negative, got {self.teacher_epochs}")


def parse(arguments: list[str]):
    """The effective configuration: sections run, networks, options (of the method), data, train."""
    arguments = _expand_short(arguments)
    sources = _sources(arguments)
    method = _last_value("method", arguments) or _from(sources, "method") or RunOptions.method
    if method not in METHODS:
        raise UserError(f"unknown method {method!r}{nearest(method, METHODS)}; there are {', '.join(METHODS)}")
    kind = config_type(method)
    tokens = []
    for source, values in sources:
        tokens += _tokens(values, option_names(kind), source)
    return run_parser(kind, tokens + arguments, "fastkd train")


def config_type(method: str) -> type:
    sections = {
        "run": RunOptions,
        "networks": NetworkOptions,
        "options": METHODS[method].Options,
        "data": DataOptions,
        "train": TrainOptions,
    }
    return make_dataclass("Config", list(sections.items()), frozen=True)


def option_names(kind: type) -> list[str]:
    return [option.name for section in fields(kind) for option in fields(section.type)]


def flat(config) -> dict:
    """Every option that decides a run, by name; tuples as lists, ready for YAML."""
    values = {}
    for section in fields(config):
        part = getattr(config, section.name)
        values |= {option.name: getattr(part, option.name) for option in fields(part)}
    for name in ("recipe", *NOT_IN_FILES):
        del values[name]
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def recipe_names() -> list[str]:
    folder = importlib.resources.files("fastkd") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def _sources(arguments: list[str]) -> list[tuple[str, dict]]:
    """The recipe's and the file's options, each with the name of where it is from."""
    recipe, path = _last_value("recipe", arguments), _last_value("config", arguments)
    if "--resume" in arguments and not (recipe or path):
        path = _started_run(_last_value("out", arguments))  # so that `--out DIR --resume` is enough
    sources = [(f"--config {path}", _read_yaml(Path(path)))] if path else []
    data = _last_value("data", arguments) or DataOptions.data
    recipe = recipe or _from(sources, "recipe") or ("digits" if data == "digits" and not path else "")
    return ([(f"--recipe {recipe}", _recipe(recipe))] if recipe else []) + sources


def _started_run(out: str) -> str:
    """The config.yaml of the run to be resumed, or the empty string where none has begun."""
    if not out:
        raise UserError("--resume needs --out FOLDER, the folder of the run to go on with")
    path = Path(out) / "config.yaml"
    return str(path) if path.exists() else ""


def _recipe(name: str) -> dict:
    names = recipe_names()
    if name not in names:
        raise UserError(f"unknown recipe {name!r}{nearest(name, names)}; there are {', '.join(names)}")
    return yaml.safe_load((importlib.resources.files("fastkd") / "recipes" / f"{name}.yaml").read_text())


def _read_yaml(path: Path) -> dict:
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"--config {path} must hold options as `name: value` lines")
    return values


def _tokens(values: dict, names: list[str], source: str) -> list[str]:
    """The same options as they would stand on the command line."""
    tokens = []
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in names:
            raise UserError(f"{source}: unknown option {key!r}{nearest(name, names)}")
        if name in NOT_IN_FILES:
            raise UserError(f"{source}: {key} is for the command line only; take the line out")
        if isinstance(value, dict) or value is None:
            raise UserError(f"{source}: {key} must be a plain value or a list, got {value!r}")
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            tokens.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            tokens += [f"--{flag}", *(str(item) for item in (value if isinstance(value, list) else [value]))]
    return tokens


def run_parser(kind: type, tokens: list[str], command: str):
    """An instance of `kind`, sections of options. tyro parses and explains; its boxes become one line."""
    import tyro

    text = io.StringIO()
    wanted_help = "--help" in tokens or "-h" in tokens
    with contextlib.nullcontext() if wanted_help else _wide_stderr(text):
        try:
            config, unknown = tyro.cli(
                kind, prog=command, args=tokens, config=(tyro.conf.OmitArgPrefixes,), return_unknown_args=True
            )
        except SystemExit as stop:
            if not stop.code:
                raise
            raise UserError(_one_line(text.getvalue())) from None
    if unknown:
        names = ["--" + name.replace("_", "-") for name in option_names(kind)]
        raise UserError(f"unknown option {unknown[0]!r}{nearest(unknown[0], names)}; `{command} --help` lists them")
    return config


@contextlib.contextmanager
def _wide_stderr(text: io.StringIO):
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "1000"
    try:
        with contextlib.redirect_stderr(text):
            yield
    finally:
        os.environ.pop("COLUMNS") if before is None else os.environ.update(COLUMNS=before)


def _one_line(box: str) -> str:
    lines = [re.sub("[│╭╮╰╯]", "", line).strip() for line in box.splitlines()[1:]]
    rule = next((number for number, line in enumerate(lines) if line.startswith("───")), len(lines))
    # A check of ours names its option itself: drop "Error parsing <section>: " before it.
    return re.sub(r"^Error parsing (\w+: )?", "", " ".join(line for line in lines[:rule] if line))


def _expand_short(arguments: list[str]) -> list[str]:
    return ["--batch-size" if argument == "-b" else argument for argument in arguments]


def _last_value(name: str, arguments: list[str]) -> str:
    """The last `--name VALUE` or `--name=VALUE`, or the empty string."""
    value = ""
    for position, argument in enumerate(arguments):
        if argument == f"--{name}" and position + 1 < len(arguments):
            value = arguments[position + 1]
        elif argument.startswith(f"--{name}="):
            value = argument.partition("=")[2]
    return value


def _from(sources: list[tuple[str, dict]], key: str) -> str:
    return next((str(values[key]) for _, values in reversed(sources) if key in values), "")
