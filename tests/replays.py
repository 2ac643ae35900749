"""Twenty steps of a method, eager or replayed, and the comparison of what they leave."""

import torch
from capture import Capture
from every_method import batch, build, prepare

from fastkd.engine import GraphedStep, Schedule, Step, TrainOptions
from fastkd.engine.partial_graphs import PartialGraphStep

CPU = torch.device("cpu")
STEPS = 20


class Graph(Capture):
    """The imitation under the interface of CudaGraph: it runs what it records."""

    counts_at_once = True
    megabytes = 0.0


def trained(
    name: str,
    how=None,
    steps: int = STEPS,
    device: torch.device = CPU,
    new=Graph,
    ready=lambda step: None,
    dtype: torch.dtype = torch.float32,
    **options,
) -> tuple[dict, GraphedStep | PartialGraphStep | Step]:
    """All that the next step depends on after 20 steps, and the step. `how`: a class that replays, what `new` makes."""
    method = build(name)
    prepare(method)
    method.to(device, dtype)
    settings = TrainOptions(**{"lr": 0.05, "epochs": 10, "warmup_epochs": 2, "momentum": 0.9} | options)
    step = Step(method, settings, device)
    ready(step)
    schedule = Schedule(settings, step.optimizer)
    run = how(step, new, warm_up=1) if how else step
    for number in range(steps):
        schedule.write(number / 2, (number - 1) / 2)
        if number == 10:
            step.meter.reset()
        for plan in method.plans(number):
            images, target = batch(number % 3, 8)
            run(images.to(device, dtype), target.to(device), plan)
    state = step.state_dict() | {"terms": step.meter.read(), "bad": step.bad.skipped.clone()}
    return state, run


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
