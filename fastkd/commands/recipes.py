"""`fastkd recipes`: the recipes by name, and the text of one."""

from dataclasses import dataclass, make_dataclass
from typing import Any

import yaml

from ..errors import UserError
from ..parser import run_parser
from ..recipes import recipe_names, recipe_text
from ..recipes.benchmark import PAIRS, published
from ..report import log_rank0, show_table

FIGURES = {"teacher": "teacher", "ce": "alone", "kd": "KD", "at": "AT", "ft": "FT", "dkd": "DKD"}
ABOVE_PAIRS = """
The CIFAR-100 benchmark of RepDistiller and mdistiller, 240 epochs, for every method:
--recipe cifar100-240-PAIR --method METHOD. Published top-1 %:"""
NOTE = """\
`fastkd recipes --show NAME [--method M]` prints a recipe; each value has its source. `--recipe NAME` runs it.
Options beside it override it. Another --epochs stretches its schedule."""


@dataclass(frozen=True)
class RecipesOptions:
    """The recipes by name, with networks, method, epochs and the published figures that were read."""

    show: str = ""
    """The name of a recipe: print it as YAML, which --config takes too."""
    method: str = ""
    """With --show of a cifar100-240 pair: the method, or a sum of methods, whose options it holds. Default: kd."""


def run(arguments: list[str]) -> None:
    """The command: the table of all recipes, or the text of one."""
    config: Any = run_parser(make_dataclass("Recipes", [("recipes", RecipesOptions)]), arguments, "fastkd recipes")
    options: RecipesOptions = config.recipes
    if options.method and options.show not in PAIRS:
        raise UserError(
            f"--method {options.method} chooses what --show cifar100-240-TEACHER-STUDENT prints, and --show is "
            f"{options.show!r}: drop --method, or show a pair"
        )
    if options.show:
        print(recipe_text(options.show, options.method), end="")
        return
    papers = [name for name in recipe_names() if name not in PAIRS]
    show_table(["recipe", "method", "networks", "epochs"], [_row(name) for name in papers], whole=1)
    for name in papers:
        if figures := _published(name):
            log_rank0(f"{name}, published: {figures}")
    log_rank0(f"Not run here: {', '.join(name for name in papers if '# Not run here' in recipe_text(name))}")
    log_rank0(ABOVE_PAIRS)
    show_table(["PAIR", *FIGURES.values()], [_figures(name) for name in PAIRS], numbers=len(FIGURES), whole=1)
    log_rank0(NOTE)


def _row(name: str) -> list[str]:
    """One line of the table, from the recipe itself."""
    values = yaml.safe_load(recipe_text(name))
    student = values["student"]
    networks = [values["teacher"], student] if "teacher" in values else [student, *values["peers"]]
    networks = [network.removeprefix("timm/") for network in networks]
    link = " -> " if "teacher" in values else " | "
    return [name, values.get("method", "kd"), link.join(networks), str(values["epochs"])]


def _published(name: str) -> str:
    """The published figures in the head of a recipe; "" if it has none."""
    lines = recipe_text(name).splitlines()
    return next((line.removeprefix("# Published: ") for line in lines if line.startswith("# Published: ")), "")


def _figures(name: str) -> list[str]:
    """A pair of the benchmark with its published figures."""
    figures = published(PAIRS[name])
    cells = [f"{figures[what]:.2f}" if what in figures else "-" for what in FIGURES]
    return [name.removeprefix("cifar100-240-"), *cells]
