"""The operators of a training step of every benchmark pair, counted: as published, written by hand, and with fastkd.

    python bench/operators.py [--file bench/results/cpu/DATE-operators.json]

Counted on the CPU, where no GPU is needed: each operator is one or several kernels on a GPU, an operator of fastkd one,
an update of all weights together a few. The number of images changes nothing. A `.md` with the table comes beside.
"""

import argparse
from pathlib import Path

import torch

from fastkd.bench.common import commit, environment, write_json
from fastkd.bench.contenders import as_published, by_hand, options
from fastkd.bench.count import counted
from fastkd.bench.pair import CIFAR, IMAGENET, Pair
from fastkd.bench.screen import say
from fastkd.engine import Step, choose_form

CPU = torch.device("cpu")
WAYS = ("as published", "by hand", "fastkd", "fastkd, fused teacher")


def count(pair: Pair) -> dict[str, int | None]:
    """Operators of one step by the way it is run; None where there is no teacher to fuse."""
    pair = Pair(pair.method, pair.teacher, pair.student, pair.peers, batch_size=4).filled(CPU)
    batch, method = pair.batch(CPU), pair.build(CPU)
    plan = method.plan(0)
    found = {"as published": as_published(method, CPU), "by hand": by_hand(method, CPU)}
    found["fastkd"] = Step(pair.build(CPU), options(), CPU)
    if method.teacher is not None:
        found["fastkd, fused teacher"] = step = Step(pair.build(CPU), options(), CPU)
        choose_form(step.method, batch[0], "fused", step.precision, lambda line: None)
    operators = {}
    for name, step in found.items():
        step(*batch, plan)  # the first makes the optimizer's state
        operators[name] = counted(lambda step=step: step(*batch, plan)).operators
    return {name: operators.get(name) for name in WAYS}


def table(pairs: dict[str, dict]) -> str:
    lines = [f"| pair | {' | '.join(WAYS)} |", "|---|" + "---:|" * len(WAYS)]
    for name, found in pairs.items():
        cells = ("-" if found[way] is None else f"{found[way]:,}" for way in WAYS)
        lines.append(f"| {name.replace('|', 'and')} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, help="JSON, with a .md beside it")
    path = parser.parse_args().file
    pairs = {}
    for pair in (*CIFAR, *IMAGENET):
        say(pair.name)
        pairs[pair.name] = count(pair)
    print(table(pairs))
    if path:
        write_json(path, {"environment": environment(), "commit": commit(), "operators": pairs})
        path.with_suffix(".md").write_text(table(pairs))


if __name__ == "__main__":
    main()
