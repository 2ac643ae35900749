"""The CIFAR-100 benchmark of RepDistiller and mdistiller: 13 pairs of networks, one schedule, as recipes.

RepDistiller is the code of CRD (arXiv:1910.10699), mdistiller that of DKD (arXiv:2203.08679). 240 epochs, batch 64,
SGD 0.05 (0.01 for MobileNetV2 and the ShuffleNets) x 0.1 at epochs 150, 180 and 210, momentum 0.9, weight decay 5e-4.
The published figures are CIFAR-100 top-1 %, from RepDistiller's README; DKD's are from mdistiller's, whose last column
is headed MobileNet-V2 but has KD's figure of ShuffleNetV2: it is taken for that pair.
"""

import textwrap
from collections.abc import Iterable
from dataclasses import fields
from typing import NamedTuple

from ..methods import METHODS, find_method

COLUMNS = ("kd", "fitnet", "at", "sp", "rkd", "ft", "dkd")  # of FIGURES, after the teacher and the student alone
FIGURES = {  # (teacher, student): top-1 %; 0: not published
    ("wrn_40_2", "wrn_16_2"): (75.61, 73.26, 74.92, 73.58, 74.08, 73.83, 73.35, 73.25, 76.23),
    ("wrn_40_2", "wrn_40_1"): (75.61, 71.98, 73.54, 72.24, 72.77, 72.43, 72.22, 71.59, 74.81),
    ("resnet56", "resnet20"): (72.34, 69.06, 70.66, 69.21, 70.55, 69.67, 69.61, 69.84, 71.97),
    ("resnet110", "resnet20"): (74.31, 69.06, 70.67, 68.99, 70.22, 70.04, 69.25, 70.22, 0),
    ("resnet110", "resnet32"): (74.31, 71.14, 73.08, 71.06, 72.31, 72.69, 71.82, 72.37, 74.11),
    ("resnet32x4", "resnet8x4"): (79.42, 72.50, 73.33, 73.50, 73.44, 72.94, 71.90, 72.86, 76.32),
    ("vgg13", "vgg8"): (74.64, 70.36, 72.98, 71.02, 71.43, 72.68, 71.48, 70.58, 74.68),
    ("vgg13", "mobilenetv2"): (74.64, 64.60, 67.37, 64.14, 59.40, 66.30, 64.52, 61.78, 69.71),
    ("cifar_resnet50", "mobilenetv2"): (79.34, 64.60, 67.35, 63.16, 58.58, 68.08, 64.43, 60.99, 70.35),
    ("cifar_resnet50", "vgg8"): (79.34, 70.36, 73.81, 70.69, 71.84, 73.34, 71.50, 70.29, 0),
    ("resnet32x4", "shufflenet_v1"): (79.42, 70.50, 74.07, 73.59, 71.73, 73.48, 72.28, 71.75, 76.45),
    ("resnet32x4", "shufflenet_v2"): (79.42, 71.82, 74.45, 73.54, 72.73, 74.56, 73.21, 72.50, 77.07),
    ("wrn_40_2", "shufflenet_v1"): (75.61, 70.50, 74.83, 73.73, 73.32, 74.52, 72.21, 72.03, 76.70),
}
SLOW = ("mobilenetv2", "shufflenet_v1", "shufflenet_v2")  # students with the smaller learning rate
BETAS = {  # DKD's beta where it is not 8
    ("resnet56", "resnet20"): 2.0,
    ("resnet110", "resnet32"): 2.0,
    ("wrn_40_2", "wrn_16_2"): 6.0,
    ("wrn_40_2", "wrn_40_1"): 6.0,
    ("vgg13", "vgg8"): 6.0,
    ("vgg13", "mobilenetv2"): 6.0,
}
REPDISTILLER, MDISTILLER = "RepDistiller", "mdistiller"


class Line(NamedTuple):
    """An option of a recipe, and where its value comes from."""

    name: str
    value: object
    source: str


def _options_of(method: str, pair: tuple[str, str]) -> list[Line]:
    """The options of one method whose values the two codes name. The others keep their defaults."""
    beta = BETAS.get(pair, 8.0)
    source = "ours: not in mdistiller, its default" if pair == ("resnet110", "resnet20") else MDISTILLER
    return {
        "kd": [
            Line("temperature", 4.0, REPDISTILLER),
            Line("ce_weight", 0.1, REPDISTILLER),
            Line("kd_weight", 0.9, REPDISTILLER),
        ],
        "fitnet": [Line("hint_weight", 100.0, REPDISTILLER), Line("stage", 2, REPDISTILLER)],
        "at": [Line("attention_weight", 1000.0, REPDISTILLER)],
        "ft": [
            Line("factor_weight", 500.0, "arXiv:1802.04977: RepDistiller's 200 is for attention maps of factors"),
            Line("ae_epochs", 30, REPDISTILLER),
        ],
        "ofd": [Line("overhaul_weight", 1e-3, MDISTILLER)],
        "dkd": [
            Line("temperature", 4.0, MDISTILLER),
            Line("ce_weight", 1.0, MDISTILLER),
            Line("alpha", 1.0, MDISTILLER),
            Line("beta", beta, source),
            Line("ramp_epochs", 20, MDISTILLER),
        ],
        "dist": [
            Line("temperature", 4.0, "arXiv:2205.10536: the authors' code"),
            Line("beta", 2.0, "arXiv:2205.10536: the authors' code"),
            Line("gamma", 2.0, "arXiv:2205.10536: the authors' code"),
        ],
        "rkd": [Line("distance_weight", 25.0, REPDISTILLER), Line("angle_weight", 50.0, REPDISTILLER)],
        "sp": [Line("similarity_weight", 3000.0, REPDISTILLER), Line("features", "maps", REPDISTILLER)],
    }.get(method, [])


def _lines(method: str, pair: tuple[str, str]) -> Iterable[Line]:
    """All options of the recipe for a method or a sum of methods."""
    teacher, student = pair
    kind = find_method(method)
    yield Line("method", method, ", ".join(f"arXiv:{paper.removeprefix('arXiv:')}" for paper in _papers(method)))
    yield Line("student", student, REPDISTILLER)
    if kind.needs_teacher:
        yield Line("teacher", teacher, REPDISTILLER)
        rate = "with the student's lr: RepDistiller's teachers have 0.05" if student in SLOW else "by the same schedule"
        yield Line("teacher_epochs", 240, f"{'ours' if student in SLOW else REPDISTILLER}: trained first, {rate}")
    known = {option.name for option in fields(kind.Options)}
    terms = method.split("+")
    for term in terms:
        for name, value, source in _options_of(term, pair):
            full = f"{term}_{name}" if len(terms) > 1 else name
            if full in known:
                yield Line(full, value, source)
    yield Line("data", "cifar100", REPDISTILLER)
    yield Line("augment", "pad-crop", REPDISTILLER)
    yield Line("pad", 4, REPDISTILLER)
    yield Line("pad_mode", "zeros", REPDISTILLER)
    yield Line("flip", '"on"', REPDISTILLER)
    yield Line("mean", [0.5071, 0.4867, 0.4408], REPDISTILLER)
    yield Line("std", [0.2675, 0.2565, 0.2761], REPDISTILLER)
    yield Line("epochs", 240, REPDISTILLER)
    yield Line("batch_size", 64, REPDISTILLER)
    yield Line("opt", "sgd", REPDISTILLER)
    yield Line("lr", 0.01 if student in SLOW else 0.05, REPDISTILLER)
    yield Line("momentum", 0.9, REPDISTILLER)
    yield Line("weight_decay", 5e-4, REPDISTILLER)
    yield Line("sched", "multistep", REPDISTILLER)
    yield Line("decay_milestones", [150, 180, 210], REPDISTILLER)
    yield Line("decay_rate", 0.1, REPDISTILLER)
    yield Line("amp_dtype", "float32", REPDISTILLER)


def _papers(method: str) -> list[str]:
    return [METHODS[term].paper for term in method.split("+") if METHODS[term].paper] or ["1910.10699"]


def published(pair: tuple[str, str]) -> dict[str, float]:
    """Top-1 % by method, with `teacher` and `ce` (the student alone), as far as they were published."""
    return {name: top1 for name, top1 in zip(("teacher", "ce", *COLUMNS), FIGURES[pair], strict=True) if top1}


def name_of(pair: tuple[str, str]) -> str:
    """The name of the recipe."""
    return f"cifar100-240-{pair[0]}-{pair[1]}"


PAIRS = {name_of(pair): pair for pair in FIGURES}
"""The pair (teacher, student) of each recipe, by its name."""


def benchmark_recipe(name: str, method: str) -> str:
    """The recipe of a pair as YAML text with a comment for each value. UserError if the method does not exist."""
    pair = PAIRS[name]
    find_method(method)
    figures = ", ".join(f"{what} {top1:.2f}" for what, top1 in published(pair).items())
    head = [
        f"The CIFAR-100 benchmark of RepDistiller and mdistiller, {pair[0]} to {pair[1]}, method {method}.",
        f"fastkd train --recipe {name} --method {method} --data-dir DIR",
        "DIR holds the files of CIFAR-100; --download fetches them.",
        "The comment after each value names its source: RepDistiller (the code of arXiv:1910.10699), mdistiller (of",
        'arXiv:2203.08679), or "ours": fastkd\'s own choice. Options that are not here have their defaults.',
        *textwrap.wrap(f"Published top-1 %: {figures}.", 116),
    ]
    if pair[1] in SLOW:
        head.append(
            f"For the published teacher: --method ce --student {pair[0]} --lr 0.05; then --teacher-weights FILE."
        )
    body = [f"{line.name}: {_yaml(line.value)}  # {line.source}" for line in _lines(method, pair)]
    return "\n".join([*(f"# {line}" for line in head), *body]) + "\n"


def _yaml(value: object) -> str:
    return f"{value:.1e}" if isinstance(value, float) and value < 1e-2 and value != 0.01 else str(value)
