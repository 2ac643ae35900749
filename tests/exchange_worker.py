"""What each process of test_exchange.py runs: 20 steps of each method as eager DDP, as flat blocks, and as graphs."""

import copy
import sys
from pathlib import Path

import torch
from every_method import batch, build, freeze_statistics, prepare
from replays import CPU, Graph

from fastkd import TrainOptions, create_model, distributed
from fastkd.engine import GraphedStep, Schedule, Step
from fastkd.engine.partial_graphs import PartialGraphStep
from fastkd.methods import CE

STEPS, FULL = 20, 8
CASES = {
    "kd": {},
    "sokd": {"grad_accum": 2},
    "dcm": {"opt": "adamw"},
    "iekd": {"clip_grad": 0.5, "ema_decay": 0.9},
    "iakd": {},
    "dml --alternate": {},
}
WAYS = ("ddp", "flat", "graph", "parts")


def size(number: int, rank: int) -> int:
    """Images in a step: full batches, then a last one of 5 on rank 0 and 4 on rank 1; once 8 and 7."""
    last = {4: (5, 4), 9: (8, 7), 14: (5, 4), 19: (7, 8)}
    return last[number][rank] if number in last else FULL


def trained(name: str, way: str, **options) -> dict:
    method = build(name, seed=distributed.rank())  # different starts: the processes must make them one
    prepare(method)
    settings = TrainOptions(**{"lr": 0.05, "epochs": 10} | options)
    step = Step(method, settings, CPU, flat=way != "ddp")
    run = step
    if way == "graph":
        run = GraphedStep(step, Graph, warm_up=1)
    elif way == "parts":
        run = PartialGraphStep(step, lambda: Graph, warm_up=1)
    schedule = Schedule(settings, step.optimizer)
    for number in range(STEPS):
        schedule.write(number / 2)
        images, target = batch(2 * (number % 3) + distributed.rank(), FULL)
        images, target = (x[: size(number, distributed.rank())] for x in (images, target))
        for plan in method.plans(number):
            run(images, target, plan)
    if way == "graph":
        assert run.graphs, "nothing was captured"
    if way == "parts":
        assert any(module.replays for module in run.modules), "nothing was captured"
        run.close()
    step.average_buffers()
    return copy.deepcopy(step.state_dict()) | {"terms": step.meter.read()}


def uneven(flat: bool) -> dict:
    """Three steps of 9 images, 5 of them on rank 0; BatchNorm in eval mode, which does not couple images."""
    method = build("kd", seed=5)
    step = Step(method, TrainOptions(lr=0.02, weight_decay=0.5), CPU, flat=flat)
    prepare(method)
    freeze_statistics(method)
    for number in range(3):
        images, target = (x[:9] for x in batch(number))
        if distributed.world_size() == 2:
            images, target = (x.split([5, 4])[distributed.rank()] for x in (images, target))
        step(images, target)
    return copy.deepcopy(method.state_dict())


class InfiniteConstant(CE):
    """A loss that is infinite where the first number of the images is 99; its gradient is finite."""

    def losses(self, out, target, plan):
        constant = torch.where(out.images[0, 0, 0, 0] == 99, torch.inf, 0.0)
        return super().losses(out, target, plan) | {"constant": constant}


def bad_loss_of_one_process(flat: bool) -> list[tuple[list[int], dict]]:
    """Counters and weights after each of three steps; in the second, the loss of rank 1 alone is infinite."""
    torch.manual_seed(distributed.rank())
    method = InfiniteConstant(create_model("resnet8", 10))
    step, states = Step(method, TrainOptions(lr=0.1, max_bad_steps=2), CPU, flat=flat), []
    for number in range(3):
        images, target = batch(2 * number + distributed.rank(), FULL)
        if number == 1 and distributed.rank() == 1:
            images[0, 0, 0, 0] = 99
        step(images, target)
        weights = {name: p.detach().clone() for name, p in method.named_parameters()}
        states.append((step.bad.counts.tolist(), weights))
    return states


def main(folder: Path) -> None:
    distributed.device_for("cpu")
    torch.set_num_threads(1)
    states = {}
    for name, options in CASES.items():
        for way in WAYS if name == "iakd" else WAYS[:-1]:
            states[name, way] = trained(name, way, **options)
    states["uneven"] = {"ddp": uneven(flat=False), "flat": uneven(flat=True)}
    states["bad loss"] = [bad_loss_of_one_process(flat) for flat in (False, True)]
    torch.save(states, folder / f"rank{distributed.rank()}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
