"""Job: --grad-checkpointing, eager and as a graph."""

from contextlib import nullcontext

import pytest
import timm
import torch
from null_device.checks import Watch
from null_device.methods import CUDA, as_graph, run_steps, step_of

from fastkd import create_model
from fastkd.engine import Step, TrainOptions
from fastkd.engine.graph import GraphedStep, GraphMemory
from fastkd.methods import KD


@pytest.mark.parametrize("name", ["kd", "iakd", "dcm", "ofd"])
def test_recomputed_blocks_in_a_graph(name):
    """Blocks without dropout are recomputed within the capture, and a step waits for nothing."""
    step, watch = step_of(name, grad_checkpointing=True), Watch()
    runner = as_graph(step)
    run_steps(step, step, range(6))  # the first pass of a block shows whether it draws random numbers
    run_steps(step, step, range(6, 8), watch=watch)
    run_steps(runner, step, range(8, 24 if name == "iakd" else 11))
    assert step.checkpointed is not nullcontext and not watch.on_cpu and runner.graphs, watch.on_cpu
    runner.close()


def test_recomputed_blocks_with_dropout_run_eagerly():
    net = timm.create_model("resnet18", num_classes=10, layers=(1,) * 4, channels=(8,) * 4, drop_path_rate=0.2)
    method = KD(net, create_model("resnet8", 10)).train().to(CUDA)
    step = Step(method, TrainOptions(device="cuda", grad_checkpointing=True), CUDA)
    reasons: list[str] = []
    memory = GraphMemory(torch.cuda.Stream())
    runner = GraphedStep(step, memory.graph, 1, memory=memory, stop=reasons.append)
    run_steps(runner, step, range(4))
    assert len(reasons) == 1 and "cannot be captured" in reasons[0] and not runner.graphs, reasons
    runner.close()
