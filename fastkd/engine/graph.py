"""A whole step as one CUDA graph per (plan, shapes): the host then launches one thing where it launched hundreds.

Forward, loss, backward, clipping, optimizer, average of the weights and the counters are in the graph. Outside are the
schedule, which writes the learning rate's tensor, the mixing of images, and the copy of a batch into its inputs.

A plan's first steps run eagerly and count: they are the warm-up, so no state has to be put back. Then the step is
captured, which changes nothing either, and replayed. A batch of fewer images runs eagerly, one of another image size
gets a graph of its own. A graph has one set of inputs: the copy into them takes some 0.3 % of an ImageNet step (by its
bytes, not timed), a second set would need every graph twice.
"""

from collections import OrderedDict
from collections.abc import Hashable

import torch
from torch import Tensor

from .step import Step

WARM_UP = 3  # eager steps before the first capture: cuDNN chooses its algorithms, the optimizer makes its state
LARGEST = 64  # graphs held; IAKD has 2^K plans


class CudaGraph:
    """`with CudaGraph(pool) as graph:` captures, `graph.replay()` runs. What tests imitate on the CPU."""

    counts_at_once = False  # capturing does not run anything

    def __init__(self, pool, stream: torch.cuda.Stream):
        self.graph = torch.cuda.CUDAGraph()
        self.context = torch.cuda.graph(self.graph, pool=pool, stream=stream, capture_error_mode="thread_local")

    def __enter__(self) -> "CudaGraph":
        self.context.__enter__()
        self.megabytes = -torch.cuda.memory_reserved() / 2**20
        return self

    def __exit__(self, *problem) -> None:
        self.context.__exit__(*problem)
        self.megabytes += torch.cuda.memory_reserved() / 2**20  # what the pool has grown by

    def replay(self) -> None:
        self.graph.replay()


class GraphedStep:
    """`step(images, target, plan)` as Step, replayed where that is possible. `largest` graphs are held, oldest use out.

    `new_graph()` gives an object like CudaGraph. A step has been captured when `(plan, shapes)` is in `graphs`.
    """

    def __init__(self, step: Step, new_graph, warm_up: int = WARM_UP, largest: int = LARGEST):
        self.step, self.new_graph, self.warm_up, self.largest = step, new_graph, warm_up, largest
        self.graphs: OrderedDict[Hashable, CudaGraph] = OrderedDict()
        self.seen: dict[Hashable, int] = {}  # steps by plan and shapes
        self.eager = 0  # steps of them that ran eagerly
        self.usual = 0  # images of the first batch
        self.megabytes = 0.0  # of the pool of all graphs
        self.inputs: dict[Hashable, tuple[Tensor, Tensor]] = {}  # by shapes: replays take turns

    def __getattr__(self, name: str):
        return getattr(self.step, name)

    def __call__(self, images: Tensor, target: Tensor, plan: Hashable = None) -> None:
        key = (plan, images.shape, images.dtype, target.shape, target.dtype)
        if key in self.graphs:
            self.graphs.move_to_end(key)
            _fill(self.inputs[key[1:]], images, target)
            self.graphs[key].replay()
        elif self._is_warm(key, images):
            self._capture(key, images, target, plan)
        else:
            self.eager += 1
            self.step(images, target, plan)
        self.seen[key] = self.seen.get(key, 0) + 1

    def _is_warm(self, key: Hashable, images: Tensor) -> bool:
        """Each plan and image size once eagerly, `warm_up` steps in all, and only batches of the usual number."""
        self.usual = self.usual or len(images)
        return len(images) == self.usual and self.eager >= self.warm_up and key in self.seen

    def _capture(self, key: Hashable, images: Tensor, target: Tensor, plan: Hashable) -> None:
        while len(self.graphs) >= self.largest:
            self.graphs.popitem(last=False)
        inputs = self.inputs.get(key[1:])
        if inputs is None:
            inputs = self.inputs[key[1:]] = images.clone(), target.clone()
        else:
            _fill(inputs, images, target)
        graph = self.new_graph()
        with graph:
            self.step(*inputs, plan)
        self.graphs[key] = graph
        self.megabytes += graph.megabytes
        if not graph.counts_at_once:
            graph.replay()

    def close(self) -> str:
        """Give the graphs' memory back, before the process tears CUDA down; says how many there were."""
        count, replays = len(self.graphs), sum(self.seen.values()) - self.eager
        self.graphs.clear()
        return f"{count} CUDA graphs, {self.megabytes:,.0f} MB, replayed in {replays} of {replays + self.eager} steps"


def _fill(inputs: tuple[Tensor, Tensor], images: Tensor, target: Tensor) -> None:
    inputs[0].copy_(images)
    inputs[1].copy_(target)
