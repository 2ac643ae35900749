"""The effective configuration, from the recipe, the YAML file and the command line, in this order: later ones win.

All three go through the same parser. A YAML file is a flat list of options: `batch_size: 128` or `batch-size: 128`.
The options of a method exist only if that method is chosen.
"""

import importlib.resources
import math
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields, make_dataclass
from pathlib import Path
from typing import Any, cast

import yaml

from .data import DataOptions
from .engine import TrainOptions
from .errors import UserError, nearest
from .methods import METHODS, find_method
from .models.ensemble import Mean
from .parser import name_of, option_types, run_parser, tokens_of, typed_options, typed_words

SWITCHES = ("graph", "compile", "flip")  # their values: auto, on, off
NOT_IN_FILES = ("config", "print_config", "resume")
TIMES = ("warmup_epochs", "decay_epochs", "decay_milestones")  # parts of a schedule, in epochs

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


@dataclass(frozen=True)
class NetworkOptions:
    """Networks."""

    student: str = "timm/resnet18"
    """The student: a CIFAR net (resnet20, wrn_40_2, vgg8, ...), timm/NAME, torchvision/NAME or hf/NAME."""
    teacher: tuple[str, ...] = ("timm/resnet50",)
    """The teacher: a name as for the student. Several names: the student learns from the mean of their predictions."""
    teacher_weights: tuple[str, ...] = ()
    """The weights of each teacher: a file (.safetensors, .pth), `pretrained`, a tag of its library, or `none`."""
    teacher_epochs: int = 0
    """Train the teachers for this many epochs first, from their weights if they have some: fine-tuning, with a new
    classifier for another number of classes. Later runs with equal settings and equal weights reuse them."""
    teacher_ratios: tuple[float, ...] = ()
    """With several teachers: the share of each in the mean, such as `2 1`. Default: equal shares."""
    ensemble: Mean = "probabilities"
    """With several teachers: the mean of their probabilities, at the method's temperature, or of their logits."""
    teacher_size: int = 0
    """Side in pixels of the images that the teacher takes; 0: as its weights say, or else as the student."""
    teacher_mean: tuple[float, ...] = ()
    """Mean of each channel of the teacher's images. Default: as its weights say, or else as the student."""
    teacher_std: tuple[float, ...] = ()
    """Standard deviation of each channel of the teacher's images. Default: as for the mean."""
    peers: tuple[str, ...] = ()
    """Networks that are trained together with the student by dml, dcm and iedml. Default: one like the student."""
    student_weights: str = ""
    """The student's initial weights: a file, `pretrained` or a tag. Weights of another number of classes get a new
    classifier. Default: a random initialisation."""
    student_sha256: str = ""
    """SHA-256 of the file of --student-weights. Another content is an error."""
    student_stages: tuple[str, ...] = ()
    """Modules of the student that end its stages, by name, in forward order; for networks that fastkd cannot divide."""
    teacher_stages: tuple[str, ...] = ()
    """The same for the teachers."""
    baseline: bool = False
    """Also train the student alone, with the same options, to compare in the final table."""

    def __post_init__(self) -> None:
        if self.teacher_epochs < 0:
            raise UserError(f"--teacher-epochs must not be negative, got {self.teacher_epochs}")
        if not all(self.teacher):
            raise UserError("--teacher needs a name")
        weights = tuple("" if each == "none" else each for each in self.teacher_weights)
        object.__setattr__(self, "teacher_weights", weights if any(weights) else ())
        for name in ("teacher_weights", "teacher_ratios"):
            values, count = getattr(self, name), len(self.teacher)
            if values and len(values) != count:
                raise UserError(
                    f"--{name.replace('_', '-')} {' '.join(map(str, values))}: {len(values)} for {count} teachers; "
                    "give one for each of --teacher"
                )
        if self.teacher_ratios and len(self.teacher) == 1:
            raise UserError("--teacher-ratios are the shares of several teachers, and there is one; drop the option")
        if self.student_sha256 and not self.student_weights:
            raise UserError("--student-sha256 is the hash of the file of --student-weights, and no file is given")
        if self.teacher_size and self.teacher_size < 8:
            raise UserError(f"--teacher-size must be 8 or more pixels, got {self.teacher_size}")
        for name, values in (("mean", self.teacher_mean), ("std", self.teacher_std)):
            if len(values) not in (0, 3) or not all(math.isfinite(value) for value in values):
                words = " ".join(map(str, values))
                raise UserError(f"--teacher-{name} takes three finite numbers, for red, green and blue, got {words}")
        if self.teacher_std and min(self.teacher_std) <= 0:
            raise UserError(f"--teacher-std must be above 0, got {' '.join(map(str, self.teacher_std))}")

    @property
    def weights_of_teachers(self) -> tuple[str, ...]:
        """One entry for each teacher: a file or tag, or an empty string."""
        return self.teacher_weights or ("",) * len(self.teacher)


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
    sources = _sources(arguments, log)
    method = _from(sources, "method") or RunOptions.method
    _refuse_options_of_other_methods(method, sources)
    kind = config_type(method)
    tokens = [token for source, values in sources[:-1] for token in tokens_of(values, kind, source)]
    tokens += _teacher_as_it_is(sources, typed_words(arguments, "teacher_weights"), log)
    config = run_parser(kind, arguments, "fastkd train", tokens)
    _refuse_options_without_effect(config, sources[-1][1].keys())
    return config


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
        f"the teacher is used as its weights are: {values['teacher_epochs']} epochs of {source} are for one without; "
        "--teacher-epochs N fine-tunes it"
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


def recipe_names() -> list[str]:
    """The names that --recipe takes, sorted."""
    folder = importlib.resources.files("fastkd") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


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
        if not started.is_file():
            raise UserError(f"--resume: there is no run in {out} (no config.yaml); check the path, or drop --resume")
        if not (typed.get("recipe") or path):  # so that `--out DIR --resume` is enough
            path, sources = str(started), [(f"--config {started}", _read_yaml(started)), *sources]
    default = "digits" if typed.get("data", DataOptions.data) == "digits" and not path else ""
    recipe = _from(sources, "recipe") or default
    return [(f"--recipe {recipe}", _recipe(recipe, sources, log)), *sources] if recipe else sources


def _recipe(recipe: str, sources: Sources, log: Callable[[str], None]) -> dict[str, Any]:
    """The options of a recipe, with its schedule scaled to the chosen --epochs.

    Otherwise the recipe's warm-up might be longer than a short run.
    """
    known = recipe_names()
    if recipe not in known:
        raise UserError(f"unknown recipe {recipe!r}{nearest(recipe, known)}; choose from {', '.join(known)}")
    values = yaml.safe_load((importlib.resources.files("fastkd") / "recipes" / f"{recipe}.yaml").read_text())
    epochs = _from(sources, "epochs")
    names = [name for name in TIMES if name in values and not any(name in given for _, given in sources)]
    if not (names and epochs.isdecimal() and "epochs" in values) or int(epochs) == values["epochs"]:
        return values
    factor = int(epochs) / values["epochs"]
    scaled, changes = {}, []
    for name in names:
        times = values[name] if isinstance(values[name], list) else [values[name]]
        scaled[name] = [time * factor for time in times]
        before, after = (" ".join(f"{time:.3g}" for time in each) for each in (times, scaled[name]))
        changes.append(f"{name} {before} -> {after}")
    log(f"recipe {recipe}, made for {values['epochs']} epochs, over {epochs}: {', '.join(changes)}")
    return values | scaled


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text()
        values, node = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: text that is not UTF-8, or an impossible date
        raise UserError(f"--config {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"--config {path} must consist of `name: value` lines")
    for name, times in Counter(name_of(str(key.value)) for key, _ in node.value).items():
        if times > 1:  # YAML would silently take the last one
            raise UserError(f"--config {path}: {name} is given {times} times; keep one of the lines")
        if name in NOT_IN_FILES:
            raise UserError(f"--config {path}: {name} is for the command line only; remove the line")
    return {name: _word(name, value) for key, value in values.items() for name in [name_of(str(key))]}


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
