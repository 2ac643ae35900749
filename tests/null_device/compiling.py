"""Job: --compile, eager and inside a graph."""

import pytest
import torch
from null_device import device
from null_device.methods import new_pool, run_steps, step_of

from fastkd.engine import GraphedStep


@pytest.fixture(autouse=True)
def fresh_compiler():
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["kd", "at", "sokd", "dcm", "iakd"])
def test_a_compiled_step_is_one_graph_of_fewer_launches(name):
    nodes = {}
    for compiled in (False, True):
        step = step_of(name, compile=compiled)
        runner, first = GraphedStep(step, new_pool(), warm_up=1), device.count_graphs()
        run_steps(runner, step, range(2 if name != "iakd" else 8))
        nodes[compiled] = len(device.graphs(first)[0])
        runner.close()
    assert nodes[True] < 0.9 * nodes[False], nodes
