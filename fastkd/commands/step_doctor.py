"""`fastkd doctor --method M --teacher T --student S`: how a training step runs on this machine."""

from collections.abc import Callable
from typing import Any

import torch

from ..bench import default_device
from ..bench.steps.baselines import options
from ..bench.steps.workload import Workload
from ..bench.timing import counted, cuda_syncs, per_step
from ..engine import Step, choose_form
from ..engine.graph import LARGEST
from ..engine.launch import why_not
from ..engine.partial_graphs import count_paths

IMAGES = 8


def examine_step(given: dict[str, Any]) -> list[list[str]]:
    """Rows of: subject, finding, meaning. `given`: fields of a Workload."""
    device = default_device()
    workload = Workload(**{"batch_size": IMAGES} | given).filled(device)
    method, batch = workload.build(device), workload.batch(device)
    plan = method.plans(0)[0]
    step = Step(method, options(), device)

    def run() -> None:
        step(*batch, plan)

    run()
    dtype = str(step.precision.dtype).removeprefix("torch.")
    shape = f"{workload.batch_size} images of {workload.image_size} px, {dtype}"
    graph = why_not(step.options, device)
    replayed = "the parts of steps" if count_paths(method) > LARGEST else "whole steps"
    return [
        ["pair", workload.name, shape],
        *counts(run, device),
        *forms(step, batch[0]),
        ["CUDA graph", "no" if graph else "yes", graph or f"{replayed} are replayed"],
    ]


def counts(run: Callable[[], None], device: torch.device) -> list[list[str]]:
    """Rows for the layout, host syncs, and operators or kernels of an eager step."""
    counter = counted(run)
    fast = counter.convolutions - counter.slow
    layout = f"{fast} of {counter.convolutions} convolutions, forward and backward, are channels-last"
    meaning = "each of them is likely to copy its maps" if counter.slow else "no layout is changed on the way"
    found = per_step(run, 1, device)
    name = "kernels" if device.type == "cuda" else "operators"
    syncs = counter.syncs + (cuda_syncs(run) if device.type == "cuda" else 0)
    waits = "the host waits for the device in a step" if syncs else "the host never waits for the device in a step"
    kind = "on the device, in an eager step" if name == "kernels" else "in an eager step; one of fastkd's counts as one"
    return [
        ["layout", layout, meaning],
        ["host syncs", str(syncs), waits],
        [name, f"{found[name]:,.0f}", kind],
    ]


def forms(step: Step, images: torch.Tensor) -> list[list[str]]:
    """Rows for the forms of the teacher, each with its figures or the reason against it."""
    if step.method.teacher is None:
        return [["teacher form", "none", "the method has no teacher"]]
    lines: list[str] = []
    choose_form(step.method, images, "auto", step.precision, lines.append)
    *tried, chosen = [line.removeprefix("teacher form").lstrip(": ") for line in lines]
    rows = [["teacher form", *(part.strip() for part in (line + "  ").split("  ", 1))] for line in tried]
    name, _, reason = chosen.partition(", ")
    usual = "the fastest on these images" if tried else reason
    on_cpu = "; training on the CPU takes plain unless --teacher-form says otherwise" * (images.device.type == "cpu")
    return [*rows, ["fastest form" if tried else "teacher form", name, usual + on_cpu * bool(tried)]]
