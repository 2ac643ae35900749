"""From recipe, file and command line to one effective configuration. All three go through the same parser.

A YAML file holds options by their names (`batch_size: 128` or `batch-size: 128`), flat. Later sources win: the recipe,
the file, the command line. Options of a method are there when it is the chosen one.
"""

import importlib.resources
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields, make_dataclass
from pathlib import Path

import yaml

from .data import DataOptions
from .engine import TrainOptions
from .errors import UserError, nearest
from .methods import METHODS, find_method
from .parser import groups, last_value, name_of, option_types, run_parser, tokens_of

NOT_IN_FILES = ("config", "print_config", "resume")
TIMES = ("warmup_epochs", "decay_epochs", "decay_milestones")  # of a schedule


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
    peers: tuple[str, ...] = ()
    """Networks that learn beside the student, for dml, dcm and iedml; by default one of the student's kind."""
    student_weights: str = ""
    """Where the student starts: a file or tag; empty is a fresh initialisation."""
    baseline: bool = False
    """Also train the student alone, with the same options, for the table at the end."""

    def __post_init__(self):
        if self.teacher_epochs < 0:
            raise UserError(f"--teacher-epochs must not be negative, got {self.teacher_epochs}")


def parse(arguments: list[str], log: Callable[[str], None] = print):
    """The effective configuration: sections run, networks, method, data, train. `say` gets a line for each choice."""
    sources = _sources(arguments, log)
    method = last_value("method", arguments) or _from(sources, "method") or RunOptions.method
    find_method(method)  # or UserError
    typed = {name_of(flag): words for flag, words in groups(arguments)}
    _refuse_options_of_other_methods(method, [*sources, ("command line", typed)])
    kind = config_type(method)
    tokens = [token for source, values in sources for token in tokens_of(values, kind, source)]
    return run_parser(kind, arguments, "fastkd train", tokens)


def config_type(method: str) -> type:
    sections = {
        "run": RunOptions,
        "networks": NetworkOptions,
        "method": find_method(method).Options,
        "data": DataOptions,
        "train": TrainOptions,
    }
    return make_dataclass("Config", list(sections.items()), frozen=True)


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


def _sources(arguments: list[str], log: Callable[[str], None]) -> list[tuple[str, dict]]:
    """The recipe's and the file's options, each with the name of where it is from."""
    recipe, path = last_value("recipe", arguments), last_value("config", arguments)
    files = [(f"--config {path}", _read_yaml(Path(path)))] if path else []
    if "--resume" in arguments:
        started = _started_run(last_value("out", arguments) or _from(files, "out"))
        if not (recipe or path):  # so that `--out DIR --resume` is enough
            path, files = started, [(f"--config {started}", _read_yaml(started))]
    data = last_value("data", arguments) or DataOptions.data
    recipe = recipe or _from(files, "recipe") or ("digits" if data == "digits" and not path else "")
    if not recipe:
        return files
    return [(f"--recipe {recipe}", _stretched(recipe, files, arguments, log)), *files]


def _started_run(out: str) -> Path:
    """The config.yaml of the run to be resumed."""
    if not out:
        raise UserError("--resume needs --out FOLDER, the folder of the run to go on with")
    path = Path(out) / "config.yaml"
    if not path.is_file():
        raise UserError(f"--resume: there is no run in {out} (no config.yaml); check the path, or drop --resume")
    return path


def _stretched(recipe: str, files: list, arguments: list[str], log: Callable[[str], None]) -> dict:
    """The recipe over the epochs that were asked for: as it stands, its warm-up may be longer than a short run."""
    values = _recipe(recipe)
    epochs = last_value("epochs", arguments) or _from(files, "epochs")
    given = {name_of(flag) for flag, _ in groups(arguments)} | {name for _, file in files for name in file}
    names = [name for name in TIMES if name in values and name not in given]
    if not (names and epochs.isdecimal() and "epochs" in values) or int(epochs) == values["epochs"]:
        return values
    factor = int(epochs) / values["epochs"]
    times = {name: _times(values[name], factor) for name in names}
    changes = ", ".join(f"{name} {_shown(values[name])} -> {_shown(times[name])}" for name in names)
    log(f"recipe {recipe}, made for {values['epochs']} epochs, over {epochs}: {changes}")
    return values | times


def _shown(value: float | list) -> str:
    return " ".join(f"{item:.3g}" for item in (value if isinstance(value, list) else [value]))


def _times(value: float | list, factor: float) -> float | list:
    return [_times(item, factor) for item in value] if isinstance(value, list) else value * factor


def _recipe(name: str) -> dict:
    names = recipe_names()
    if name not in names:
        raise UserError(f"unknown recipe {name!r}{nearest(name, names)}; there are {', '.join(names)}")
    return yaml.safe_load((importlib.resources.files("fastkd") / "recipes" / f"{name}.yaml").read_text())


def _read_yaml(path: Path) -> dict:
    try:
        text = path.read_text()
        values, node = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: text that is not UTF-8, a date that is none
        raise UserError(f"--config {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"--config {path} must hold options as `name: value` lines")
    for name, times in Counter(name_of(str(key.value)) for key, _ in node.value).items():
        if times > 1:  # YAML itself would take the last
            raise UserError(f"--config {path}: {name} is given {times} times; keep one of the lines")
        if name in NOT_IN_FILES:
            raise UserError(f"--config {path}: {name} is for the command line only; take the line out")
    return {name_of(str(key)): value for key, value in values.items()}


def _refuse_options_of_other_methods(method: str, sources: list[tuple[str, dict]]) -> None:
    own = option_types(config_type(method))
    for source, values in sources:
        for name in values.keys() - own.keys():
            having = [other for other in METHODS if name in option_types(config_type(other))]
            prefixed = [f"--{part}-{name}".replace("_", "-") for part in method.split("+") if f"{part}_{name}" in own]
            if prefixed or having:
                there = (
                    f"did you mean {' or '.join(prefixed)}?"
                    if prefixed
                    else f"methods that have it: {', '.join(having)}"
                )
                raise UserError(f"{source}: method {method} has no option {name} ({there})")


def _from(sources: list[tuple[str, dict]], key: str) -> str:
    return next((str(values[key]) for _, values in reversed(sources) if key in values), "")
