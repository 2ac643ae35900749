"""Launches per step of the gate's pairs, and the file of what they may be at most.

tests/null_device/run python tests/null_device/budgets.py --write measures all pairs and writes budgets.json: its diff
shows in a review what a change costs or saves. The job launches.py compares with the file. --table prints the table of
docs/benchmarks.md, with the launches of a careful hand-written loop; --compiled those of two compiled pairs.
"""

import argparse
import json
import os
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from null_device import device, values
from null_device.checks import no_host_sync
from null_device.methods import CUDA, as_graph
from torch import nn

from fastkd.bench import markdown_table
from fastkd.bench.steps import baselines
from fastkd.bench.steps.baselines import options
from fastkd.bench.steps.workload import CIFAR, IMAGENET, Workload
from fastkd.engine import Step, choose_form
from fastkd.engine.precision import cast_frozen
from fastkd.errors import UserError
from fastkd.methods.base import Method

FILE = Path(__file__).parent / "budgets.json"
SLACK = 0.95  # a count below this part of its budget asks for a lower budget
FORMS = ("plain", "fused")
PAIRS = [replace(pair, batch_size=8) for pair in CIFAR] + [
    replace(pair, batch_size=2, image_size=64) for pair in IMAGENET
]
PAIRS.insert(3, Workload("sokd+dkd", "wrn_40_2", "wrn_40_1", batch_size=8))
Counts = dict[str, int]


def measure(pair: Workload, form: str) -> Counts | None:
    """Launches of an eager step and nodes of its graph; of these, at the end of the step and beside the teacher.

    None if the method cannot use this form of its teacher.
    """
    time.perf_counter = device.clock  # forms are then chosen by launches, the same in every run
    pair = pair.filled(CUDA)
    method, (images, target) = pair.build(CUDA), pair.batch(CUDA)
    step, plan = Step(method, options(device="cuda"), CUDA), method.plan(0)
    try:
        choose_form(method, images, form, step.precision, lambda line: None)
    except UserError:
        return None
    cast_frozen(method, images, step.precision)
    runner, first = as_graph(step, warm_up=2), device.count_graphs()
    run = partial(runner, images, target, plan)
    run()
    device.reset()
    with no_host_sync():
        run()
        eager = device.count_launches()
        with device.labelled("teacher", teacher_modules(method)):
            run()
    (graph,) = device.graphs(first)
    runner.close()
    found = {"eager": eager, "graph": len(graph), "end of step": _end_of_step(graph)}
    return found | ({"beside teacher": device.beside(graph, "teacher")} if method.asks_teacher else {})


def by_hand(pair: Workload) -> int:
    """Launches of an eager step in AMP and channels-last, as `fastkd bench step` has it."""
    pair = pair.filled(CUDA)
    method, batch = pair.build(CUDA), pair.batch(CUDA)
    loop = baselines.by_hand(method, CUDA)
    for _ in range(2):
        device.reset()
        loop(*batch, method.plan(0))
    return device.count_launches()


def compiled(pair: Workload, form: str) -> int:
    """Nodes of the graph of a compiled step."""
    pair = pair.filled(CUDA)
    method, batch = pair.build(CUDA), pair.batch(CUDA)
    step = Step(method, options(device="cuda", compile="on"), CUDA, compiled=True)
    choose_form(method, batch[0], form, step.precision, lambda line: None)
    cast_frozen(method, batch[0], step.precision)
    runner, first = as_graph(step, warm_up=2), device.count_graphs()
    for _ in range(3):
        runner(*batch, method.plan(0))
    return len(device.graphs(first)[0])


def teacher_modules(method: Method) -> list[nn.Module]:
    """The modules whose forward passes are the teacher's, in the form in which it runs."""
    if method.teacher is None:
        return []
    view = method.staged_views.get(method.teacher)
    return [*method.teacher.net.modules(), *(view.modules() if isinstance(view, nn.Module) else ())]


def _end_of_step(graph: list[device.Node]) -> int:
    """Nodes after the last convolution: meters, finiteness check, counter of bad steps.

    Without the optimizer, the cast of all gradients and the counters of all BatchNorms.
    """
    last = max(number for number, node in enumerate(graph) if node.name == "cudnnBackendExecute")
    others = ("FusedSgd", "CopyFunctor", "ScalarListMetadata<long")
    return sum(not any(other in node.name for other in others) for node in graph[last + 1 :])


def title(pair: Workload, form: str) -> str:
    """The key in the file, such as "kd resnet56 -> resnet20, 8 x 32 px, teacher plain"."""
    pair = pair.filled(CUDA)
    return f"{pair.name}, {pair.batch_size} x {pair.image_size} px, teacher {form}"


def read() -> dict:
    """The file: "torch", the version it is for, and "launches" by title."""
    return json.loads(FILE.read_text())


def table() -> str:
    """Markdown: the launches of a loop by hand, and the nodes of fastkd's graphs."""
    counts, rows = read()["launches"], []
    for pair in PAIRS:
        forms = [counts.get(title(pair, form)) for form in FORMS]
        rows.append(
            [
                pair.name.replace(" | ", " and "),
                f"{by_hand(pair):,}",
                *(f"{each['graph']:,}" if each else "-" for each in forms),
            ]
        )
    return markdown_table(["pair", "by hand, eager", "fastkd's graph", "with a fused teacher"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write budgets.json")
    parser.add_argument("--table", action="store_true", help="the table of the documentation, from budgets.json")
    parser.add_argument("--compiled", action="store_true", help="two compiled pairs; takes minutes")
    args = parser.parse_args()
    values.install()
    if args.table or args.compiled:
        time.perf_counter = device.clock
        print(table() if args.table else [(pair.name, compiled(pair, "fused")) for pair in PAIRS[:7:6]], flush=True)
        os._exit(0)
    found = {}
    for pair in PAIRS:
        for form in FORMS:
            if counts := measure(pair, form):
                found[title(pair, form)] = counts
                print(title(pair, form), counts, flush=True)
    if args.write:
        content = {"torch": ".".join(torch.__version__.split(".")[:2]), "launches": found}
        lines = json.dumps(content, indent=1).replace("\n   ", " ").replace("\n  }", " }")
        FILE.write_text(lines + "\n")
    os._exit(0)


if __name__ == "__main__":
    main()
