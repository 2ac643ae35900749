"""Named sets of options: a YAML file for each, and the pairs of a benchmark, written from one table (benchmark.py)."""

import importlib.resources
from collections.abc import Callable, Mapping
from typing import Any

import yaml

from ..errors import UserError, nearest
from ..methods import find_method
from .benchmark import PAIRS, benchmark_recipe

TIMES = ("warmup_epochs", "decay_epochs", "decay_milestones", "ramp_epochs")  # parts of a schedule, in epochs


def recipe_names() -> list[str]:
    """The names that --recipe takes, sorted."""
    files = (entry.name for entry in importlib.resources.files(__name__).iterdir())
    return sorted([*PAIRS, *(name.removesuffix(".yaml") for name in files if name.endswith(".yaml"))])


def recipe_text(name: str, method: str = "") -> str:
    """A recipe as YAML with comments, as --config takes it. `method` is for recipes that hold several: default kd.

    Raises UserError for an unknown name, or a method that the recipe has no options for.
    """
    if name in PAIRS:
        return benchmark_recipe(name, method or "kd")
    known = recipe_names()
    if name not in known:
        raise UserError(
            f"unknown recipe {name!r}{_near(name, known)}; `fastkd recipes` lists them: {', '.join(_short(known))}"
        )
    return (importlib.resources.files(__name__) / f"{name}.yaml").read_text()


def read_recipe(name: str, given: Mapping[str, Any], log: Callable[[str], None]) -> dict[str, Any]:
    """The options of a recipe. `given` are the options from elsewhere, which override it.

    The schedule is scaled to the given `epochs`: otherwise the recipe's warm-up might be longer than a short run.
    Raises UserError for an unknown recipe or method.
    """
    values = yaml.safe_load(recipe_text(name, str(given.get("method", ""))))
    epochs = str(given.get("epochs", ""))
    times = [name for name in values if name.endswith(TIMES) and name not in given]
    if not (times and epochs.isdecimal() and "epochs" in values) or int(epochs) == values["epochs"]:
        return values
    factor = int(epochs) / values["epochs"]
    scaled, changes = {}, []
    for time in times:
        numbers = values[time] if isinstance(values[time], list) else [values[time]]
        scaled[time] = [number * factor for number in numbers]
        before, after = (" ".join(f"{number:.3g}" for number in each) for each in (numbers, scaled[time]))
        changes.append(f"{time} {before} -> {after}")
    trains_teacher = values.get("teacher_epochs") and not {"teacher_epochs", "teacher_weights"} & given.keys()
    if trains_teacher and find_method(str(given.get("method") or values.get("method", "kd"))).needs_teacher:
        changes.append(f"--teacher-epochs {values['teacher_epochs']} is not changed")
    log(f"recipe {name}, made for {values['epochs']} epochs, over {epochs}: {', '.join(changes)}")
    return values | scaled


def _near(name: str, known: list[str]) -> str:
    """The nearest name; the CIFAR recipes were called cifar-kd, cifar-dcm and so on."""
    renamed = name.replace("cifar-", "cifar100-", 1)
    return f" (did you mean {renamed!r}?)" if renamed in known else nearest(name, known)


def _short(known: list[str]) -> list[str]:
    """The names, with one entry for the benchmark's pairs."""
    return [*(name for name in known if name not in PAIRS), "cifar100-240-TEACHER-STUDENT"]
