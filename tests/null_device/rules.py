"""Job: the null device enforces CUDA's rules of capture, and the checks of the other jobs see what they look for."""

import pytest
import torch
from null_device import device
from null_device.checks import Watch, no_host_sync
from null_device.methods import CUDA
from torch import nn


def captured(body) -> list[device.Node]:
    """The nodes of the graph of `body()`, which has run once before."""
    body()
    graph, first = torch.cuda.CUDAGraph(), device.count_graphs()
    with torch.cuda.graph(graph):
        body()
    return device.graphs(first)[0]


def ones() -> torch.Tensor:
    return torch.ones(8, device=CUDA)


def test_kernels_are_counted_and_compute_nothing():
    x = ones()
    device.reset()
    y = x + 1
    assert device.count_launches() == 1 and y.cpu().tolist() != [2.0] * 8


def test_copies_copy():
    assert torch.arange(5).to(CUDA).cpu().tolist() == [0, 1, 2, 3, 4]


def test_a_graph_has_a_node_for_each_launch_and_its_dependencies():
    x, y = ones(), ones()
    nodes = captured(lambda: x.add_(1).mul_(2))
    assert len(nodes) == 2 and nodes[1].dependencies == [0]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y.add_(1)
    device.reset()
    graph.replay()
    assert device.launches() == {"GRAPH of 1": 1}


@pytest.mark.parametrize(
    "ask", [torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.nonzero], ids=lambda f: f.__name__
)
def test_what_asks_the_device_ends_a_capture(ask):
    x = ones()[:1]
    with pytest.raises(RuntimeError, match="[Cc]apture"):
        captured(lambda: ask(x))


def test_a_stream_that_is_not_joined_ends_a_capture():
    x, side = ones(), torch.cuda.Stream()

    def forked():
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            x.add_(1)

    with pytest.raises(RuntimeError, match="[Uu]njoined"):
        captured(forked)


def test_an_event_from_outside_ends_a_capture():
    x, event = ones(), torch.cuda.Event()
    event.record()
    with pytest.raises(RuntimeError, match="[Ii]solation|[Ii]nvalidated"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        event.wait()
        x.add_(1)


def test_waiting_for_the_device_raises():
    x = ones()
    with pytest.raises(RuntimeError, match="synchroniz"), no_host_sync():
        x.sum().item()


def test_tensors_on_the_cpu_are_seen():
    with Watch() as watch:
        ones() * torch.ones(())
    assert watch.on_cpu


@pytest.mark.parametrize("lost", ["input", "weight", "grad_output"])
def test_lost_layouts_are_seen(lost):
    def layout(role):
        return torch.contiguous_format if role == lost else torch.channels_last

    conv = nn.Conv2d(4, 4, 3).to(CUDA, memory_format=layout("weight"))
    x = torch.ones(2, 4, 8, 8, device=CUDA).to(memory_format=layout("input")).requires_grad_()
    with Watch() as watch:
        y = conv(x)
        y.backward(torch.ones(2, 4, 6, 6, device=CUDA).to(memory_format=layout("grad_output")))
    assert watch.convolutions == 2 and any(f" {lost} " in found for found in watch.layouts), watch.layouts


def test_what_can_run_beside_a_label():
    """0 -> 1 -> 3 and 0 -> 2 -> 3: only node 2 can run beside node 1."""
    graph = [
        device.Node("fork", 1, ""),
        device.Node("teacher", 2, "teacher", [0]),
        device.Node("student", 1, "", [0]),
        device.Node("join", 1, "", [1, 2]),
    ]
    assert device.beside(graph, "teacher") == 1
    graph[2].dependencies = [1]
    assert device.beside(graph, "teacher") == 0


def test_labels_are_those_of_modules():
    teacher, student, x = nn.ReLU(), nn.Sigmoid(), ones()

    def both():
        with torch.no_grad():
            return student(teacher(x))

    with device.labelled("teacher", [teacher]):
        assert [node.label for node in captured(both)] == ["teacher", ""]
