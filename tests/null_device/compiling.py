"""Job: --compile, eager and inside a graph."""

import pytest
import torch
from null_device import device
from null_device.methods import as_graph, run_steps, step_of


@pytest.fixture(autouse=True)
def fresh_compiler():
    yield
    torch._dynamo.reset()


EVERY = [pytest.param(name, marks=pytest.mark.every) for name in ("at", "sokd", "dcm")]  # each compiles for a minute


@pytest.mark.parametrize("name", ["kd", *EVERY])
def test_a_compiled_step_is_one_graph_of_fewer_launches(name):
    nodes = {}
    for compiled in (False, True):
        step = step_of(name, compiled)
        runner, first = as_graph(step), device.count_graphs()
        run_steps(runner, step, range(2), may_wait=compiled)
        run_steps(runner, step, range(2, 4))
        nodes[compiled] = len(device.graphs(first)[0])
        runner.close()
    assert nodes[True] < 0.9 * nodes[False], nodes


@pytest.mark.every
def test_paths_are_compiled_one_by_one():
    step = step_of("iakd", compiled=True)
    runner = as_graph(step)
    run_steps(runner, step, range(16), may_wait=True)
    assert runner.graphs
    runner.close()
