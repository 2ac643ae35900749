"""Counts of a training step on the CPU: the files of fastkd that it enters, or its operators.

    python bench/scripts/step_counts.py files
    python bench/scripts/step_counts.py operators [--file bench/results/cpu/DATE-operators.json]

files: one eager step of KD, resnet20 -> resnet8, after WARM_UP steps, under sys.setprofile. The sequence has the file
of each Python call in fastkd/ and kernels/, in the order of the calls; a call in the same file as the entry before it
adds nothing. "files" are the distinct entries; "returns" are the entries whose file occurred earlier in the sequence.

operators: a step of every benchmark workload, as published, written by hand, and with fastkd. On a GPU each operator is
one or several kernels, one of fastkd is one kernel, and an update of all weights together is a few. The number of
images changes nothing. `--file` also writes a .md with the table. Takes some minutes.
"""

import functools
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import torch

from fastkd.bench import ROOT, commit, environment, file_argument, log_rank0, markdown_table, write_json
from fastkd.bench.steps.baselines import by_hand, options
from fastkd.bench.steps.workload import CIFAR, IMAGENET, Workload
from fastkd.bench.timing import counted
from fastkd.engine import Step, choose_form
from fastkd.methods.base import Method

CPU = torch.device("cpu")
WARM_UP = 3
OURS = ("fastkd", "kernels")
WAYS = ("as published", "by hand", "fastkd", "fastkd, fused teacher")


class Trace(NamedTuple):
    """The files of one call, relative to the repository, without consecutive repeats."""

    sequence: list[str]

    @property
    def files(self) -> int:
        return len(set(self.sequence))

    @property
    def returns(self) -> int:
        return len(self.sequence) - self.files


def trace(call: Callable[[], object]) -> Trace:
    """The sequence of files that `call` enters."""
    sequence: list[str] = []

    def profile(frame: FrameType, event: str, argument: object) -> None:
        name = _relative(frame.f_code.co_filename) if event == "call" else None
        if name and (not sequence or sequence[-1] != name):
            sequence.append(name)

    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return Trace(sequence)


@functools.cache
def _relative(file: str) -> str | None:
    """The path below the repository if the file is one of OURS, without symbolic links; else None."""
    path = Path(file).resolve()
    ours = any(path.is_relative_to(ROOT / folder) for folder in OURS)
    return str(path.relative_to(ROOT)) if ours else None


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
        "as published": operators(lambda method: by_hand(method, CPU, published=True)),
        "by hand": operators(lambda method: by_hand(method, CPU)),
        "fastkd": operators(lambda method: Step(method, options(), CPU)),
        "fastkd, fused teacher": operators(fused) if workload.build(CPU).asks_teacher else None,
    }


def table(workloads: dict[str, dict[str, int | None]]) -> str:
    """The counts as Markdown."""
    rows = [
        [name.replace("|", "and"), *("-" if found[way] is None else f"{found[way]:,}" for way in WAYS)]
        for name, found in workloads.items()
    ]
    return markdown_table(["workload", *WAYS], rows, numbers=len(WAYS)) + "\n"


def show_files() -> None:
    """Print the sequence of the step that the module's docstring describes, and the two numbers."""
    workload = Workload("kd", "resnet20", "resnet8", batch_size=8).filled(CPU)
    batch = workload.batch(CPU)
    step = Step(workload.build(CPU), options(), CPU)
    for _ in range(WARM_UP):
        step(*batch)
    found = trace(lambda: step(*batch))
    for number, name in enumerate(found.sequence):
        print("return" if name in found.sequence[:number] else "enter ", name)
    print(f"{found.files} files, {found.returns} returns")


def main() -> None:
    what = sys.argv[1] if len(sys.argv) > 1 else ""
    path = file_argument(__doc__, sys.argv[1 + (what in ("files", "operators")) :])
    if what == "files":
        return show_files()
    if what != "operators":
        sys.exit("step_counts: say what to count, files or operators")
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
