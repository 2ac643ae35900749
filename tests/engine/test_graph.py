"""Replayed steps equal eager ones bit for bit, for every method; and what a graph could get wrong is caught."""

import copy
from contextlib import contextmanager

import pytest
import torch
from every_method import NAMES, batch, build
from replays import CPU, Graph, same, trained

from fastkd.engine import GraphedStep, Schedule, Step, TrainOptions
from fastkd.engine.graph import CannotCapture
from fastkd.engine.optim import lr_factor


@pytest.mark.parametrize("name", NAMES)
def test_every_method(name):
    eager, _ = trained(name)
    replayed, run = trained(name, GraphedStep)
    assert run.graphs, "nothing was captured"
    assert same(eager, replayed)


OPTIONS = [
    {"opt": "adamw", "ema_decay": 0.9},
    {"opt": "nesterov", "sched": "multistep", "decay_milestones": (3.0, 6.0), "reset_momentum": True},
    {"grad_accum": 2, "ema_decay": 0.5, "sched": "step", "decay_epochs": 3, "clip_grad": 0.5},
    {"amp_dtype": "bfloat16", "momentum": 0.0, "sched": "constant"},
    {"amp_dtype": "float16", "smoothing": 0.1},
]
SECOND = {("iakd --teacher-bn batch", 4), ("dml --alternate", 2)}  # the two methods whose steps vary most


def combinations():
    """All methods with all options.

    By default every method has one set of options, and the two whose steps vary most have a second.
    """
    for number, name in enumerate(NAMES):
        for index, options in enumerate(OPTIONS):
            default = index == number % len(OPTIONS) or (name, index) in SECOND
            yield pytest.param(name, options, marks=[] if default else pytest.mark.every, id=f"{name}-{options}")


@pytest.mark.parametrize(("name", "options"), list(combinations()))
def test_every_option(name, options):
    eager, _ = trained(name, **options)
    replayed, run = trained(name, GraphedStep, **options)
    assert run.graphs and same(eager, replayed)


def test_the_decay_of_an_average_that_warms_up_is_not_frozen_in_the_graph():
    averages = []
    for how in (None, GraphedStep):
        step = Step(build("kd"), TrainOptions(lr=0.05, ema_decay=0.999), CPU, ema_warms_up=True)
        run = how(step, Graph, warm_up=1) if how else step
        for number in range(6):
            step.ema.write(number)
            run(*batch(number % 3, 8))
        averages.append(step.state_dict())
    assert run.graphs and same(*averages)


def test_one_graph_for_each_plan_and_the_oldest_use_goes():
    method = build("iakd")
    step = GraphedStep(Step(method, TrainOptions(lr=0.01), CPU), Graph, warm_up=0, largest=2)
    paths = [(True, True, True), (True, False, True), (False, False, False)]
    for path in (*paths[:2], *paths[:2], paths[0], paths[2], paths[2]):
        step(*batch(0, 8), path)
    assert [plan for plan, _ in step.graphs] == [paths[0], paths[2]]


def test_a_batch_of_another_size_runs_eagerly():
    step = GraphedStep(Step(build("ce"), TrainOptions(lr=0.01), CPU), Graph, warm_up=0)
    for size in (8, 8, 5, 5, 8):
        step(*batch(0, size))
    assert [shape[0] for _, (shape, *_) in step.graphs] == [8]


def test_each_image_size_has_a_graph():
    step = GraphedStep(Step(build("ce"), TrainOptions(lr=0.01), CPU), Graph, warm_up=0)
    images, target = batch(0, 8)
    for size in (16, 16, 12, 12, 16):
        step(images[..., :size, :size], target)
    assert [shape[-1] for _, (shape, *_) in step.graphs] == [12, 16] and step.eager == 2


@pytest.mark.parametrize("fault", ["frozen rate", "stale input", "moved statistics"])
def test_faults_are_caught(fault, monkeypatch):
    """Each of the three classical mistakes makes the replayed run differ from the eager one."""
    if fault == "stale input":
        call = GraphedStep.__call__

        def without_copying(self, images, target, plan=None):
            first = next(iter(self.inputs.values()), (images, target))
            call(self, *(x.clone() for x in first), plan)

        monkeypatch.setattr(GraphedStep, "__call__", without_copying)
    if fault == "frozen rate":

        def frozen(self, epoch, previous):
            for group, base in zip(self.optimizer.param_groups, self.base, strict=True):
                group["lr"] = base * lr_factor(self.options, epoch)

        eager, _ = trained("kd")
        monkeypatch.setattr(Schedule, "write", frozen)
    else:
        eager, _ = trained("kd")
    if fault == "moved statistics":
        capture = GraphedStep._capture

        def warmed_up_without_putting_back(self, key):
            plan, shapes = key
            with torch.no_grad():  # a forward pass in train mode moves BatchNorm's statistics
                self.step.method(*self.inputs[shapes], plan)
            return capture(self, key)

        monkeypatch.setattr(GraphedStep, "_capture", warmed_up_without_putting_back)
    replayed, run = trained("kd", GraphedStep)
    assert run.graphs and not same(eager, replayed)


def test_the_inputs_are_copies():
    step = GraphedStep(Step(build("ce"), TrainOptions(lr=0.01), CPU), Graph, warm_up=0)
    images, target = batch(0, 8)
    before = copy.deepcopy((images, target))
    for _ in range(2):
        step(images, target)
    step(*batch(1, 8))
    assert torch.equal(images, before[0]) and torch.equal(target, before[1])


class Refused(Graph):
    """A capture that fails in the middle, as that of a network that asks the device for a value."""

    def __exit__(self, *problem):
        super().__exit__(*problem)
        raise CannotCapture("net.py:7 cannot be captured: not permitted")


def test_a_step_that_cannot_be_captured_goes_on_eagerly(monkeypatch):
    """The failed capture leaves nothing behind: as in a real one, none of its operations has run."""
    said = []

    def how(step, new, warm_up):
        return GraphedStep(step, new, warm_up, stop=said.append)

    for part in ("gradients", "update"):
        monkeypatch.setattr(Step, part, skipped_in(Refused, getattr(Step, part)))
    eager, _ = trained("kd")
    replayed, run = trained("kd", how, new=Refused)
    assert said == ["net.py:7 cannot be captured: not permitted"]
    assert run.stopped and run.replays == 0 and run.eager == 20 and same(eager, replayed)


def skipped_in(kind, function):
    """`function`, but nothing within a capture of this kind."""

    def run(*given):
        if not isinstance(torch.utils._python_dispatch._get_current_dispatch_mode(), kind):
            function(*given)

    return run


def test_eager_steps_run_in_the_graphs_memory_once_there_are_graphs():
    memory = Memory([0, 0, 0, 0])
    step = GraphedStep(Step(build("ce"), TrainOptions(lr=0.01), CPU), Graph, warm_up=1, memory=memory)
    for size in (8, 8, 5, 8, 5):
        step(*batch(0, size))
    assert memory.where == [False, True, True] and step.eager == 3 and step.graphs and not memory.renewed


class Memory:
    """Stands for GraphMemory; `live` gives these numbers in turn."""

    def __init__(self, live):
        self.live, self.where, self.renewed = iter(live).__next__, [], 0

    @contextmanager
    def eager(self, in_pool):
        self.where.append(in_pool)
        yield

    def renew(self):
        self.renewed += 1


def test_graphs_are_captured_anew_around_what_lives_on_in_their_memory():
    memory = Memory([0, 512, 512, 512])
    step = GraphedStep(Step(build("ce"), TrainOptions(lr=0.01), CPU), Graph, warm_up=1, memory=memory)
    for size, graphs in ((8, 0), (8, 1), (5, 0), (8, 1), (5, 1), (8, 1)):
        step(*batch(0, size))
        assert len(step.graphs) == graphs
    assert memory.renewed == 1
