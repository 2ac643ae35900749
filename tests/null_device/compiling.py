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


EVERY = [pytest.param(name, marks=pytest.mark.every) for name in ("at", "sokd", "dcm")]  # each compiles for a minute


@pytest.mark.parametrize("name", ["kd", *EVERY])
def test_a_compiled_step_is_one_graph_of_fewer_launches(name):
    nodes = {}
    for compiled in (False, True):
        step = step_of(name, compile=compiled)
        runner, first = GraphedStep(step, new_pool(), warm_up=1), device.count_graphs()
        run_steps(runner, step, range(1), may_wait=compiled)
        run_steps(runner, step, range(1, 3))
        nodes[compiled] = len(device.graphs(first)[0])
        runner.close()
    assert nodes[True] < 0.9 * nodes[False], nodes


@pytest.mark.every
def test_paths_are_compiled_one_by_one():
    step = step_of("iakd", compile=True)
    runner = GraphedStep(step, new_pool(), warm_up=1)
    run_steps(runner, step, range(16), may_wait=True)
    assert runner.graphs
    runner.close()
