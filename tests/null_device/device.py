"""Control of the null device from Python: what was launched, and what the captured graphs hold.

Works only in a process that tests/null_device/run has started.
"""

import ctypes
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

_library = ctypes.CDLL(os.environ["NULL_DEVICE"])
for _name in ("null_total", "null_graphs", "null_graph_nodes", "null_bytes"):
    getattr(_library, _name).restype = ctypes.c_long
_library.null_clock.restype = ctypes.c_double

reset = _library.null_reset
"""Forget all counts and the trace. Graphs stay."""
count_graphs = _library.null_graphs
bytes_held = _library.null_bytes
"""Bytes that were allocated on the device and not freed, those that torch caches included."""


def clock() -> float:
    """The device's clock in seconds: a microsecond for each launch, and for each node of a replayed graph."""
    return _library.null_clock() / 1e3


@dataclass
class Node:
    """A launch in a graph. `dependencies` are the numbers of earlier nodes; `label` is that of `labelled`."""

    name: str
    stream: int
    label: str
    dependencies: list[int] = field(default_factory=list)


def launches() -> dict[str, int]:
    """How often each kernel, copy, allocation and synchronisation was called since `reset`."""
    rows = (line.split("\t", 1) for line in _written("null_report"))
    return {name: int(count) for count, name in rows}


def count_launches() -> int:
    """Kernels, copies and graphs launched since `reset`; no allocations, no waits."""
    others = ("SYNC", "cudaMalloc", "cudaFree", "cudaHost")
    return sum(count for name, count in launches().items() if not name.startswith(others))


@contextmanager
def traced() -> Iterator[list[str]]:
    """A list that holds, after the block, its launches in order: "e3 NAME" on stream 3, "c3 NAME" if captured."""
    lines: list[str] = []
    reset()
    _library.null_trace(1)
    try:
        yield lines
    finally:
        _library.null_trace(0)
        lines += _written("null_trace_to")


def graphs(first: int = 0) -> list[list[Node]]:
    """The nodes of all captured graphs from number `first` on, in the order of the captures."""
    found: list[list[Node]] = [[] for _ in range(count_graphs())]
    for line in _written("null_graphs_to"):
        number, stream, label, dependencies, name = line.split("\t", 4)
        found[int(number)].append(Node(name, int(stream), label, [int(other) for other in dependencies.split()]))
    return found[first:]


@contextmanager
def labelled(label: str, modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within the block, nodes captured in a forward pass of one of these modules get this label."""
    members, depth = {id(module) for module in modules}, 0

    def enter(module: nn.Module, inputs: object) -> None:
        nonlocal depth
        depth += id(module) in members
        _library.null_label(label.encode() if depth else b"")

    def leave(module: nn.Module, inputs: object, output: object) -> None:
        nonlocal depth
        depth -= id(module) in members
        _library.null_label(label.encode() if depth else b"")

    hooks = register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def beside(graph: list[Node], label: str) -> int:
    """How many nodes without this label can run at the same time as at least one node that has it.

    Two nodes can do so if neither depends on the other, directly or through other nodes.
    """
    ancestors: list[int] = []  # of each node, as a set of bits
    for node in graph:
        ancestors.append(0)
        for other in node.dependencies:
            ancestors[-1] |= ancestors[other] | 1 << other
    members = [number for number, node in enumerate(graph) if node.label == label]
    return sum(
        any(not (ancestors[number] >> other | ancestors[other] >> number) & 1 for other in members)
        for number, node in enumerate(graph)
        if node.label != label
    )


def _written(function: str) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "out")
        getattr(_library, function)(str(path).encode())
        return path.read_text().splitlines()
