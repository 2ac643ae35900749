"""Steps of every method on the null device: what the jobs share."""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from every_method import batch, build, prepare
from null_device.checks import no_host_sync

from fastkd.engine import Schedule, Step, TrainOptions
from fastkd.engine.graph import GraphedStep, GraphMemory
from fastkd.engine.launch import capturable

CUDA = torch.device("cuda", 0)


def new_pool():
    """A function that makes graphs with a memory pool of their own."""
    return GraphMemory(torch.cuda.Stream()).graph


def as_graph(step: Step, warm_up: int = 1, **more) -> GraphedStep:
    """The step, replayed; a step that cannot be captured is an error."""
    memory = GraphMemory(torch.cuda.Stream())
    return GraphedStep(step, memory.graph, warm_up, memory=memory, stop=cannot_be, **more)


def cannot_be(reason: str) -> None:
    raise AssertionError(reason)


def step_of(name: str, compiled: bool = False, flat: bool = False, **options) -> Step:
    """The step of a method on small networks, prepared on the device."""
    method = build(name, taught=False)
    prepare(method.to(CUDA), device=CUDA)
    settings = TrainOptions(**{"lr": 0.05, "epochs": 30, "device": "cuda"} | options)
    step = Step(method, settings, CUDA, compiled=compiled, flat=flat)
    capturable(step)
    return step


def run_steps(
    runner,
    step: Step,
    numbers: range,
    size: int = 8,
    watch: AbstractContextManager = nullcontext(),  # noqa: B008
    may_wait: bool = False,
    side: int = 0,
) -> None:
    """The steps of these numbers, with the schedule, under `watch`. `side`: of the images in pixels; 0: as they are.

    An error if one of them waits for the device, unless it `may_wait`, as the compiler does when it compiles.
    """
    schedule = Schedule(step.options, step.optimizer)
    batches = [tuple(x.to(CUDA) for x in batch(number % 3, size)) for number in numbers]
    batches = [(images.to(step.precision.dtype), target) for images, target in batches]
    if side:
        batches = [(F.interpolate(x, (side, side)), target) for x, target in batches]
    with nullcontext() if may_wait else no_host_sync(), watch:
        for number, (images, target) in zip(numbers, batches, strict=True):
            schedule.write(number / 2)
            for plan in step.method.plans(number):
                runner(images, target, plan)
