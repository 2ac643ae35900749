"""Job: every method's step as one graph, and as graphs of its modules; what can run beside the teacher."""

import pytest
import torch
from every_method import NAMES, kind_of
from null_device import device
from null_device.methods import CUDA, as_graph, new_pool, run_steps, step_of

from fastkd import distributed
from fastkd.engine.partial_graphs import PartialGraphStep
from fastkd.methods.frozen import AbsentTeacher
from fastkd.teacher_cache import Rows


@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_one_graph(name):
    """An invalid capture or a stream that is not joined raises. The odd last batch runs eagerly."""
    step = step_of(name)
    runner = as_graph(step)
    run_steps(runner, step, range(4))
    run_steps(runner, step, range(4, 5), size=5)
    run_steps(runner, step, range(5, 8))
    assert runner.graphs and runner.replays
    runner.close()


@pytest.mark.parametrize("name", [name for name in NAMES if "iakd" in name])
def test_modules_are_graphs(name):
    step = step_of(name)
    runner, first = PartialGraphStep(step, new_pool, warm_up=1), device.count_graphs()
    run_steps(runner, step, range(12))
    assert device.count_graphs() > first and any(module.replays for module in runner.modules)
    runner.close()


SIDE_BY_SIDE = [name for name in NAMES if kind_of(name).needs_teacher and "iakd" not in name]


@pytest.mark.parametrize("name", SIDE_BY_SIDE)
def test_the_student_can_run_beside_the_teacher(name):
    step = step_of(name)
    runner, first = as_graph(step), device.count_graphs()
    with device.labelled("teacher", step.method.teacher.net.modules()):
        run_steps(runner, step, range(4))
    (graph,) = device.graphs(first)
    assert 0 < sum(node.label == "teacher" for node in graph) < len(graph)
    count = device.beside(graph, "teacher")
    runner.close()
    assert count >= 20, count


def gathered(thing: int) -> list[int]:
    """As NCCL does: through the device, which waits. The steps must not."""
    torch.tensor(thing).to(CUDA).cpu()
    return [thing, thing]


@pytest.fixture
def reduced(monkeypatch) -> list[torch.Tensor]:
    """What was given to the all-reduce of two processes, for which a launch stands."""
    blocks: list[torch.Tensor] = []
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "gather", gathered)
    for name in ("broadcast", "average_buffers"):
        monkeypatch.setattr(distributed, name, lambda net: None)
    monkeypatch.setattr(distributed, "all_reduce_", lambda block: blocks.append(block.mul_(2)))
    return blocks


@pytest.mark.parametrize("name", ["kd", "sokd", "dcm", "iekd", "iakd"])
def test_with_several_processes_a_step_is_two_graphs(name, reduced):
    """The all-reduce lies between the two and is in none of them."""
    step = step_of(name, flat=True)
    runner, first = as_graph(step), device.count_graphs()
    run_steps(runner, step, range(1), may_wait=True)  # the processes agree on the size of a batch
    run_steps(runner, step, range(1, 3))
    run_steps(runner, step, range(3, 4), size=5)  # an odd last batch
    run_steps(runner, step, range(4, 16))
    graphs = device.graphs(first)
    assert len(graphs) == 2 * len(runner.graphs) > 0 and len(reduced) == 16
    assert len(reduced[0]) > 1000 and reduced[0].device == CUDA
    for forward, update in zip(graphs[::2], graphs[1::2], strict=True):
        assert not any("cudnn" in node.name for node in update) and len(update) < 20 < len(forward)
    runner.close()


def test_with_several_processes_modules_are_graphs(reduced):
    step = step_of("iakd", flat=True)
    runner = PartialGraphStep(step, new_pool, warm_up=1)
    run_steps(runner, step, range(1), may_wait=True)
    run_steps(runner, step, range(1, 12))
    assert any(module.replays for module in runner.modules) and len(reduced) == 12
    runner.close()


@pytest.mark.parametrize("topk", [0, 2])
def test_the_logits_of_a_batch_are_inputs_of_a_graph(topk):
    """As from a teacher cache: no teacher is in the graph, and each batch brings its own logits."""
    step = step_of("kd")
    step.method.teacher.__dict__["net"] = AbsentTeacher()
    runner, rows = as_graph(step), Rows(10, "fp16", topk, 4.0)
    held = [each.to(CUDA) for each in rows.example(8)]
    run_steps(lambda *given: runner(*given, taught=tuple(held)), step, range(6))
    (inputs,) = runner.inputs.values()
    assert runner.replays and len(inputs) == 2 + len(held) and inputs[2].data_ptr() != held[0].data_ptr()
    few = tuple(each[:5] for each in held)
    run_steps(lambda *given: runner(*given, taught=few), step, range(6, 7), size=5)
    runner.close()


@pytest.mark.parametrize("name", ["kd", "dcm"])
def test_each_image_size_is_captured_once(name):
    """--train-size: sizes come one after another; a graph of an earlier size is kept and can be replayed again."""
    step = step_of(name)
    runner = as_graph(step)
    count = {}
    for number, side in enumerate((16, 24, 32, 16)):
        first = device.count_graphs()
        run_steps(runner, step, range(6 * number, 6 * number + 6), side=side)
        count[number] = device.count_graphs() - first
    plans = len({plan for plan, _ in runner.graphs})
    assert len(runner.graphs) == 3 * plans and count == {0: plans, 1: plans, 2: plans, 3: 0}
    runner.close()
