"""The operators of a training step of every benchmark pair, counted: as published, written by hand, and with fastkd.

    python bench/operators.py [--file bench/results/cpu/DATE-operators.json]

Counted on the CPU, where no GPU is needed: each operator is one or several kernels on a GPU, an operator of fastkd one,
an update of all weights together a few. The number of images changes nothing. A `.md` with the table comes beside.
Takes some minutes.
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from fastkd.bench.command import asked_file
from fastkd.bench.common import commit, environment, write_json
from fastkd.bench.contenders import as_published, by_hand, options
from fastkd.bench.count import counted
from fastkd.bench.pair import CIFAR, IMAGENET, Pair
from fastkd.bench.screen import log_rank0
from fastkd.engine import Step, choose_form
from fastkd.methods.base import Method

CPU = torch.device("cpu")
WAYS = ("as published", "by hand", "fastkd", "fastkd, fused teacher")


def count(pair: Pair) -> dict[str, int | None]:
    """Operators of one step by the way it is run; None where no teacher's forward pass is to fuse."""
    pair = replace(pair, batch_size=4).filled(CPU)
    batch = pair.batch(CPU)

    def operators(make: Callable[[Method], Callable]) -> int:
        method = pair.build(CPU)
        step, plan = make(method), method.plan(0)
        step(*batch, plan)  # the first makes the optimizer's state
        return counted(lambda: step(*batch, plan)).operators

    def fused(method: Method) -> Step:
        step = Step(method, options(), CPU)
        choose_form(method, batch[0], "fused", step.precision, lambda line: None)
        return step

    ways = [lambda method: as_published(method, CPU), lambda method: by_hand(method, CPU)]
    ways += [lambda method: Step(method, options(), CPU), fused if pair.build(CPU).asks_teacher else None]
    return {name: make and operators(make) for name, make in zip(WAYS, ways, strict=True)}


def table(pairs: dict[str, dict]) -> str:
    lines = [f"| pair | {' | '.join(WAYS)} |", "|---|" + "---:|" * len(WAYS)]
    for name, found in pairs.items():
        cells = ("-" if found[way] is None else f"{found[way]:,}" for way in WAYS)
        lines.append(f"| {name.replace('|', 'and')} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    path = asked_file(__doc__)
    pairs = {}
    for pair in (*CIFAR, *IMAGENET):
        log_rank0(pair.name)
        pairs[pair.name] = count(pair)
    print(table(pairs))
    if path:
        write_json(path, {"environment": environment(), "commit": commit(), "operators": pairs})
        path.with_suffix(".md").write_text(table(pairs))


if __name__ == "__main__":
    main()
