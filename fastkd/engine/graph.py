"""A whole step as one CUDA graph per (plan, shapes): the host then launches one graph instead of hundreds of kernels.

The graph holds forward, loss, backward, clipping, optimizer, weight average and counters. Outside of it are the
schedule, which writes the learning rate's tensor, mixup, and the copy of a batch into the graph's inputs.

The first steps of a plan run eagerly and are training steps like all others: they are the warm-up, so no state has to
be restored. Then the step is captured, which changes nothing either, and replayed. A batch with fewer images runs
eagerly. Each image size gets its own graph. A graph has one set of inputs: the copy into them takes about 0.3 % of an
ImageNet step (computed from its bytes, not timed), and a second set would need every graph twice.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from .step import Step

WARM_UP = 3  # eager steps before the first capture: cuDNN chooses its algorithms, the optimizer makes its state
LARGEST = 64  # graphs held; IAKD has 2^K plans

Shapes = tuple[torch.Size, torch.dtype, torch.Size, torch.dtype]  # of images and target
Key = tuple[Hashable, Shapes]  # plan and shapes


class CudaGraph:
    """`with graph:` captures on `stream` with memory from `pool`; `graph.replay()` runs. Tests have one for the CPU."""

    counts_at_once = False  # True in that of the tests, whose capture runs the operations too

    def __init__(self, pool: Any, stream: torch.cuda.Stream):
        self.graph = torch.cuda.CUDAGraph()
        self.replay = self.graph.replay
        self.context = torch.cuda.graph(self.graph, pool=pool, stream=stream, capture_error_mode="thread_local")
        self.megabytes = 0.0

    def __enter__(self) -> "CudaGraph":
        self.context.__enter__()
        self.megabytes = -torch.cuda.memory_reserved() / 2**20
        return self

    def __exit__(self, *problem: Any) -> None:
        self.context.__exit__(*problem)
        self.megabytes += torch.cuda.memory_reserved() / 2**20  # the growth of the pool


class GraphedStep:
    """Runs `step(images, target, plan)`, by replay where possible. At most `largest` graphs; the oldest use goes first.

    `new_graph()` makes a CudaGraph. `graphs` holds the captured ones by (plan, shapes). The state stays in `step`.
    A step is replayed if the batch has the usual size, after an eager one of its plan and shapes and `warm_up` in all.
    """

    def __init__(self, step: Step, new_graph: Callable[[], CudaGraph], warm_up: int = WARM_UP, largest: int = LARGEST):
        self.step, self.new_graph, self.warm_up, self.largest = step, new_graph, warm_up, largest
        self.graphs: OrderedDict[Key, CudaGraph] = OrderedDict()
        self.seen: set[Key] = set()
        self.eager, self.replays = 0, 0  # steps
        self.usual = 0  # images of the first batch
        self.megabytes = 0.0  # of the pool of all graphs
        self.inputs: dict[Shapes, tuple[Tensor, Tensor]] = {}  # shared by the graphs of one shape: replays take turns

    def __call__(self, images: Tensor, target: Tensor, plan: Hashable = None) -> None:
        shapes = (images.shape, images.dtype, target.shape, target.dtype)
        key = (plan, shapes)
        self.usual = self.usual or len(images)
        if key not in self.seen or self.eager < self.warm_up or len(images) != self.usual:
            self.seen.add(key)
            self.eager += 1
            self.step(images, target, plan)
            return
        self.replays += 1
        if shapes not in self.inputs:
            self.inputs[shapes] = torch.empty_like(images), torch.empty_like(target)
        self.inputs[shapes][0].copy_(images)
        self.inputs[shapes][1].copy_(target)
        if key not in self.graphs:
            self._capture(key)
        else:
            self.graphs.move_to_end(key)
            self.graphs[key].replay()

    def _capture(self, key: Key) -> None:
        while len(self.graphs) >= self.largest:
            self.graphs.popitem(last=False)
        plan, shapes = key
        graph = self.new_graph()
        with graph:
            self.step(*self.inputs[shapes], plan)
        self.graphs[key] = graph
        self.megabytes += graph.megabytes
        if not graph.counts_at_once:
            graph.replay()

    def close(self) -> str:
        """Free the graphs' memory before the process tears CUDA down; gives a line about how often they were used."""
        count, steps = len(self.graphs), self.replays + self.eager
        self.graphs.clear()
        return f"{count} CUDA graphs, {self.megabytes:,.0f} MB, replayed in {self.replays} of {steps} steps"
