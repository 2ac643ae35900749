"""What only a GPU can show of steps: that no host waits, that real graphs learn the same, and what they hold."""

import gc

import pytest
import torch
from every_method import NAMES, batch, build, prepare
from replays import trained

from fastkd.bench.steps.baselines import as_graph, options
from fastkd.bench.steps.workload import Workload
from fastkd.engine import GraphedStep, Schedule, Step, TrainOptions
from fastkd.engine.graph import CudaGraph
from fastkd.engine.launch import capturable
from fastkd.engine.partial_graphs import PartialGraphStep

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


def new_pool():
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
    return lambda: CudaGraph(pool, stream)


@pytest.mark.parametrize("name", NAMES)
def test_no_host_sync_in_a_step(name):
    """torch's own check, with the schedule around the step."""
    method = build(name)
    prepare(method)
    settings = TrainOptions(lr=0.05)
    step = Step(method.to(CUDA), settings, CUDA)
    schedule, (images, target) = Schedule(settings, step.optimizer), (x.to(CUDA) for x in batch(0, 8))
    plans = [(number, plan) for number in range(4) for plan in method.plans(number)]
    step(images, target, plans[0][1])  # the first step makes the optimizer's state
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number, plan in plans:
            schedule.write(number)
            step(images, target, plan)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert step.bad.skipped.item() == 0


def parameters(name: str, how=None, **settings) -> dict[str, torch.Tensor]:
    """Of the method after `steps`; slowly learnt, for a difference grows with every update."""
    state, run = trained(
        name, how, ready=capturable, **{"device": CUDA, "lr": 0.002, "clip_grad": 1.0, "epochs": 30} | settings
    )
    if how:
        captured = run.graphs if how is GraphedStep else [module for module in run.modules if module.replays]
        assert captured, "nothing was captured"
    run.close()
    return {key: state["method"][key] for key, _ in getattr(run, "step", run).method.named_parameters()}


def distance(a: dict, b: dict) -> float:
    """Of all weights together."""
    return sum((a[name].float() - b[name].float()).square().sum().item() for name in a) ** 0.5


@pytest.mark.parametrize("name", NAMES)
def test_graphs_learn_what_eager_steps_learn(name):
    """50 steps in bf16, where the order of additions is not always the same: less apart than bf16 is from fp32."""
    eager, exact = (parameters(name, steps=50, amp_dtype=dtype) for dtype in ("bfloat16", "float32"))
    replayed = parameters(name, GraphedStep, new=new_pool(), steps=50, amp_dtype="bfloat16")
    assert distance(replayed, eager) < distance(eager, exact)


@pytest.mark.parametrize(
    "options",
    [
        {"opt": "adamw", "ema_decay": 0.9},
        {"opt": "nesterov", "grad_accum": 2, "ema_decay": 0.5},
        {"amp_dtype": "float16", "clip_grad": 0.0},
        {"compile": "on"},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["kd", "iakd", "sokd", "dcm"])
def test_graphs_with_every_option(name, options):
    settings = {"steps": 12, "amp_dtype": "bfloat16"} | options
    eager, exact = (parameters(name, **settings | {"amp_dtype": dtype}) for dtype in (settings["amp_dtype"], "float32"))
    replayed = parameters(name, GraphedStep, new=new_pool(), **settings)
    assert distance(replayed, eager) < distance(eager, exact)


@pytest.mark.parametrize("name", ["iakd", "iakd+at", "iakd --teacher-bn batch"])
def test_partial_graphs_learn_what_eager_steps_learn(name):
    eager, exact = (parameters(name, amp_dtype=dtype) for dtype in ("bfloat16", "float32"))
    replayed = parameters(name, PartialGraphStep, new=new_pool, amp_dtype="bfloat16")
    assert distance(replayed, eager) < distance(eager, exact)


def test_a_graph_needs_about_the_memory_of_eager_steps():
    """Of a size where blocks of 20 MB do not count."""
    pair = Workload("kd", "resnet56", "resnet20", batch_size=1024).filled(CUDA)
    method, (images, target) = pair.build(CUDA), pair.batch(CUDA)
    peaks = {}
    for name, make in {
        "eager": lambda: Step(pair.build(CUDA), options(), CUDA),
        "graph": lambda: as_graph(method, images, []),
    }.items():
        gc.collect()
        torch.cuda.empty_cache()
        held, run = torch.cuda.memory_reserved(), make()
        for _ in range(6):
            run(images, target)
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        run(images, target)
        peaks[name] = torch.cuda.max_memory_reserved() - held
        run.close()
        del run
    assert peaks["graph"] <= 1.1 * peaks["eager"], peaks
