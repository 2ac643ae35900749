"""The number of operators in a training step of every benchmark workload: as published, by hand, and with fastkd.

    python bench/scripts/operators.py [--file bench/results/cpu/DATE-operators.json]

They are counted on the CPU. On a GPU each operator is one or several kernels, one of fastkd is one kernel, and an
update of all weights together is a few. The number of images changes nothing. `--file` also writes a .md with the
table. Takes some minutes.
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from fastkd.bench.record import commit, environment, file_argument, log_rank0, markdown_table, write_json
from fastkd.bench.steps.baselines import as_published, by_hand, options
from fastkd.bench.steps.workload import CIFAR, IMAGENET, Workload
from fastkd.bench.timing import counted
from fastkd.engine import Step, choose_form
from fastkd.methods.base import Method

CPU = torch.device("cpu")
WAYS = ("as published", "by hand", "fastkd", "fastkd, fused teacher")


def count(workload: Workload) -> dict[str, int | None]:
    """Operators of one step by way; None without a teacher's forward pass to fuse."""
    workload = replace(workload, batch_size=4).filled(CPU)
    batch = workload.batch(CPU)

    def operators(make: Callable[[Method], Callable[..., object]]) -> int:
        method = workload.build(CPU)
        step, plan = make(method), method.plan(0)
        step(*batch, plan)  # the first step makes the optimizer's state
        return counted(lambda: step(*batch, plan)).operators

    def fused(method: Method) -> Step:
        step = Step(method, options(), CPU)
        choose_form(method, batch[0], "fused", step.precision, lambda line: None)
        return step

    return {
        "as published": operators(lambda method: as_published(method, CPU)),
        "by hand": operators(lambda method: by_hand(method, CPU)),
        "fastkd": operators(lambda method: Step(method, options(), CPU)),
        "fastkd, fused teacher": operators(fused) if workload.build(CPU).asks_teacher else None,
    }


def table(workloads: dict[str, dict[str, int | None]]) -> str:
    """The counts as Markdown."""
    rows = []
    for name, found in workloads.items():
        cells = ("-" if found[way] is None else f"{found[way]:,}" for way in WAYS)
        rows.append([name.replace("|", "and"), *cells])
    return markdown_table(["workload", *WAYS], rows, numbers=len(WAYS)) + "\n"


def main() -> None:
    path = file_argument(__doc__ or "")
    found = {}
    for workload in (*CIFAR, *IMAGENET):
        log_rank0(workload.name)
        found[workload.name] = count(workload)
    print(table(found))
    if path:
        write_json(path, {"environment": environment(), "commit": commit(), "operators": found})
        path.with_suffix(".md").write_text(table(found))


if __name__ == "__main__":
    main()
