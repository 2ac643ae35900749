"""Job: training options and teacher forms, eager and as a graph."""

import pytest
import torch
from every_method import batch
from null_device import device
from null_device.checks import Watch
from null_device.methods import CUDA, as_graph, run_steps, step_of

from fastkd import create_model
from fastkd.engine import Step, TrainOptions, choose_form
from fastkd.engine.mixup import Mixup
from fastkd.methods import KD
from fastkd.models import Ensemble
from fastkd.models.own_input import InputSpec, OwnInput

OPTIONS = [
    {"opt": "adamw", "ema_decay": 0.9},
    {"opt": "nesterov", "grad_accum": 2, "ema_decay": 0.5, "clip_grad": 1.0},
    {"amp_dtype": "float16"},
    {"amp_dtype": "float16", "grad_accum": 2, "clip_grad": 1.0, "opt": "adamw"},
    {"amp_dtype": "float32"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["kd", "iakd", "sokd", "dcm"])
def test_options_eager_and_in_a_graph(name, options):
    step, watch = step_of(name, **options), Watch()
    runner = as_graph(step)
    run_steps(step, step, range(1))
    run_steps(step, step, range(1, 3), watch=watch)
    run_steps(runner, step, range(3, 16 if name == "iakd" else 6))  # until a plan comes back
    assert not watch.on_cpu and runner.graphs, watch.on_cpu
    runner.close()


@pytest.mark.parametrize("alphas", [(0.2, 0.0), (0.0, 1.0), (0.2, 1.0)], ids=["mixup", "cutmix", "both"])
def test_mixed_batches_in_a_graph(alphas):
    step = step_of("kd")
    runner, mixup = as_graph(step), Mixup(*alphas, 0.1, 10)
    for number in range(5):
        images, target = mixup(*(x.to(CUDA) for x in batch(number % 3, 8)), number, torch.arange(8))
        assert images.is_cuda and target.is_cuda and images.is_contiguous(memory_format=torch.channels_last)
        runner(images, target, None)
    assert runner.graphs
    runner.close()


@pytest.mark.parametrize("form", ["plain", "folded", "fused", "compiled"])
@pytest.mark.parametrize("name", ["kd", "at", "kd+dml", "iekd"])
def test_teacher_forms_in_a_graph(name, form):
    """The wanted form is taken, and the step with it is captured. The folded forms need fewer launches."""
    step = step_of(name)
    logged: list[str] = []
    images = batch(0, 8)[0].to(CUDA)
    assert choose_form(step.method, images, form, step.precision, logged.append) == form, logged
    runner, first = as_graph(step), device.count_graphs()
    run_steps(runner, step, range(4))
    assert len(device.graphs(first)) == 1
    runner.close()


@pytest.mark.parametrize("mean, form", [("probabilities", "plain"), ("logits", "fused"), ("probabilities", "compiled")])
def test_several_teachers_in_a_graph(mean, form):
    """A step waits for nothing, has no tensor on the CPU, and is captured, in each form of the teachers."""
    nets = [create_model(name, 10) for name in ("resnet8", "resnet14")]
    method = KD(create_model("resnet8", 10), Ensemble(nets, [2, 1], mean, 4.0)).train()
    step = Step(method.to(CUDA, memory_format=torch.channels_last), TrainOptions(lr=0.05, device="cuda"), CUDA)
    logged, images, watch = [], batch(0, 8)[0].to(CUDA), Watch()
    assert choose_form(method, images, form, step.precision, logged.append) == form, logged
    run_steps(step, step, range(1), may_wait=form == "compiled")
    run_steps(step, step, range(1, 3), watch=watch)
    runner = as_graph(step)
    run_steps(runner, step, range(3, 6))
    assert not watch.on_cpu and not watch.layouts and runner.graphs, (watch.on_cpu, watch.layouts)
    runner.close()


def test_auto_tries_every_form_and_takes_one():
    step, logged = step_of("kd"), []
    chosen = choose_form(step.method, batch(0, 8)[0].to(CUDA), "auto", step.precision, logged.append)
    assert not [line for line in logged if "not possible" in line or "refused" in line], logged
    assert chosen in ("plain", "folded", "fused", "compiled")


@pytest.mark.parametrize("form", ["plain", "fused"])
def test_a_teacher_with_images_of_its_own_in_a_graph(form):
    given, wanted = InputSpec(16, (0.5,) * 3, (0.5,) * 3), InputSpec(24, (0.4,) * 3, (0.2,) * 3)
    method = KD(create_model("resnet8", 10), OwnInput(create_model("resnet14", 10), given, wanted))
    step, logged = Step(method.to(CUDA).to(memory_format=torch.channels_last), TrainOptions(device="cuda"), CUDA), []
    images, target = (part.to(CUDA) for part in batch(0, 8))
    assert choose_form(method, images, form, step.precision, logged.append) == form, logged
    runner = as_graph(step)
    for _ in range(4):
        runner(images, target, None)
    assert runner.graphs
    runner.close()
