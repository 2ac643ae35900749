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
        self.context = torch.cuda.graph(self.graph, pool=pool, stream=stream, capture_error_mode="thread_local")
        self.megabytes = 0.0

    def __enter__(self) -> "CudaGraph":
        self.context.__enter__()
        self.megabytes = -torch.cuda.memory_reserved() / 2**20
        return self

    def __exit__(self, *problem: Any) -> None:
        self.context.__exit__(*problem)
        self.megabytes += torch.cuda.memory_reserved() / 2**20  # the growth of the pool

    def replay(self) -> None:
        self.graph.replay()


class GraphedStep:
    """Runs `step(images, target, plan)`, by replay where possible. At most `largest` graphs; the oldest use goes first.

    `new_graph()` makes a CudaGraph. `graphs` holds the captured ones by (plan, shapes). The state stays in `step`.
    """

    def __init__(self, step: Step, new_graph: Callable[[], CudaGraph], warm_up: int = WARM_UP, largest: int = LARGEST):
        self.step, self.new_graph, self.warm_up, self.largest = step, new_graph, warm_up, largest
        self.meter = step.meter
        self.graphs: OrderedDict[Key, CudaGraph] = OrderedDict()
        self.seen: dict[Key, int] = {}  # steps by plan and shapes
        self.eager = 0  # how many of them ran eagerly
        self.usual = 0  # images of the first batch
        self.megabytes = 0.0  # of the pool of all graphs
        self.inputs: dict[Shapes, tuple[Tensor, Tensor]] = {}  # shared by the graphs of one shape: replays take turns

    def __call__(self, images: Tensor, target: Tensor, plan: Hashable = None) -> None:
        shapes = (images.shape, images.dtype, target.shape, target.dtype)
        key = (plan, shapes)
        if key in self.graphs:
            self.graphs.move_to_end(key)
            _fill(self.inputs[shapes], images, target)
            self.graphs[key].replay()
        elif self._is_warm(key, images):
            self._capture(key, images, target, plan)
        else:
            self.eager += 1
            self.step(images, target, plan)
        self.seen[key] = self.seen.get(key, 0) + 1

    def _is_warm(self, key: Key, images: Tensor) -> bool:
        """True for batches of the usual size, after an eager step of this plan and shape and `warm_up` steps in all."""
        self.usual = self.usual or len(images)
        return len(images) == self.usual and self.eager >= self.warm_up and key in self.seen

    def _capture(self, key: Key, images: Tensor, target: Tensor, plan: Hashable) -> None:
        while len(self.graphs) >= self.largest:
            self.graphs.popitem(last=False)
        _, shapes = key
        if shapes in self.inputs:
            _fill(self.inputs[shapes], images, target)
        else:
            self.inputs[shapes] = images.clone(), target.clone()
        graph = self.new_graph()
        with graph:
            self.step(*self.inputs[shapes], plan)
        self.graphs[key] = graph
        self.megabytes += graph.megabytes
        if not graph.counts_at_once:
            graph.replay()

    def close(self) -> str:
        """Free the graphs' memory before the process tears CUDA down; gives a line about how often they were used."""
        count, replays = len(self.graphs), sum(self.seen.values()) - self.eager
        self.graphs.clear()
        return f"{count} CUDA graphs, {self.megabytes:,.0f} MB, replayed in {replays} of {replays + self.eager} steps"


def _fill(inputs: tuple[Tensor, Tensor], images: Tensor, target: Tensor) -> None:
    inputs[0].copy_(images)
    inputs[1].copy_(target)
