"""Steps that take one of very many paths (IAKD by blocks), with a graph of the forward and backward of each module.

K gates have 2^K paths, too many for a graph of each, but only 2 K + 2 modules. The modules of a step are replayed one
after another by the host; loss, optimizer and counters run eagerly. A module that a step leaves out gets no gradient
and stays as it is. Results have the bits of eager steps, unless the loss uses feature maps between the modules: then
gradients are summed in another order. Peak memory is that of the costliest path: alternatives at one position share a
pool.
"""

import math
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from ..methods.base import Method
from ..methods.forwards import Taught
from .graph import WARM_UP, CannotCapture, CudaGraph
from .step import Step
from .teacher_forms import TeacherForm

KINDS = 4  # graphs of a module, one for each kind of input: batches and micro-batches of two sizes

NewGraph = Callable[[], CudaGraph]
Shared = dict[tuple, Tensor]


class PartialGraphStep:
    """Runs `step(images, target, plan)`; the modules in it are replayed. `close` restores their eager forward.

    `new_pool()` gives a function that makes graphs with a memory pool of their own, such as
    `lambda: CudaGraph(pool, stream)`. The state stays in `step`. If a module cannot be captured, `stop(reason)` is
    called, which may raise; without an error the module runs eagerly from then on.
    """

    def __init__(
        self,
        step: Step,
        new_pool: Callable[[], NewGraph],
        warm_up: int = WARM_UP,
        stop: Callable[[str], None] = lambda reason: None,
    ):
        self.step = step
        step.layers = None  # weights that are cast anew in every step cannot be in a module's graph
        self.modules: list[GraphedModule] = []
        for groups, has_grad in ((step.method.graph_groups(), True), (_teacher_groups(step.method), False)):
            for group in groups:
                new_graph = new_pool()
                shared: Shared = {}  # a step runs one module of a group
                self.modules += [GraphedModule(module, new_graph, warm_up, shared, has_grad, stop) for module in group]

    def __call__(self, images: Tensor, target: Tensor, plan: Hashable = None, taught: Taught = ()) -> None:
        self.step(images, target, plan, taught)

    def close(self) -> str:
        """Free the graphs' memory and restore the modules; gives a line about how often the graphs were used."""
        captured = [graph for module in self.modules for graph in module.graphs.values()]
        megabytes = sum(half.megabytes for graph in captured for half in graph.halves)
        replays = sum(module.replays for module in self.modules)
        eager = sum(module.seen.total() for module in self.modules) - len(captured)
        for module in self.modules:
            module.graphs.clear()
            del module.module.__dict__["forward"]  # that of its class is visible again
        counts = f"{len(captured)} for {len(self.modules)} modules"
        return f"CUDA graphs: {counts}, {megabytes:,.0f} MB, replayed in {replays:,} of {replays + eager:,} calls"


def count_paths(method: Method) -> int:
    """The number of paths that a step of the method may take."""
    return math.prod(len(group) for group in method.graph_groups())


def _teacher_groups(method: Method) -> list[list[nn.Module]]:
    """The modules of the teacher's own forward pass, if the loss uses it."""
    if not method.asks_teacher or method.teacher is None or method.teacher in method.classifiers:
        return []  # a replay would not keep the input of the classifier
    view = method.staged_views_for(method.plan(0)).get(method.teacher)
    if view is None:
        return [[method.teacher.net]]
    if isinstance(view, TeacherForm) and not view.compiled:  # the compiler would trace into the graphed modules
        return [[module] for module in view.sequence]
    return []


class GraphedModule:
    """Replaces the forward of a module, [N, ...] -> [N, ...]: eager at first, then replayed for each kind of input.

    `has_grad`: the module trains, or passes gradients on. It may also run without autograd, as a block of the teacher;
    such calls stay eager. `shared`: the inputs and output gradients of all modules of a group. `stop`: see
    PartialGraphStep.
    """

    busy = False  # while one runs, the modules inside of it belong to its graph

    def __init__(
        self,
        module: nn.Module,
        new_graph: NewGraph,
        warm_up: int,
        shared: Shared,
        has_grad: bool,
        stop: Callable[[str], None],
    ):
        self.module, self.forward, self.new_graph = module, module.forward, new_graph
        self.shared, self.has_grad, self.stop = shared, has_grad, stop
        self.warm_up: float = warm_up  # calls
        self.seen: Counter[tuple] = Counter()  # calls by kind of input, the eager ones and that of the capture
        self.graphs: dict[tuple, PartialGraph] = {}
        self.replays = 0
        module.__dict__["forward"] = self

    def __call__(self, x: Tensor) -> Tensor:
        if GraphedModule.busy or torch.is_grad_enabled() != self.has_grad:
            return self.forward(x)
        device = x.device.type
        autocast = (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        kind = (x.shape, x.dtype, x.stride(), x.requires_grad, self.module.training, *autocast)  # what a graph fixes
        if kind not in self.graphs:
            self.seen[kind] += 1
            if self.seen[kind] <= self.warm_up or len(self.graphs) == KINDS:
                return self.run(x)
            try:
                self.graphs[kind] = PartialGraph(self, x)
            except CannotCapture as error:
                self.warm_up = math.inf  # eager from now on
                self.stop(str(error))
                return self.run(x)
        graph = self.graphs[kind]
        self.replays += 1
        return _Replay.apply(graph.anchor, x, graph) if graph.has_grad else graph.forward(x)

    def run(self, x: Tensor) -> Tensor:
        """The eager forward of the module, with all modules inside of it."""
        GraphedModule.busy = True
        try:
            return self.forward(x)
        finally:
            GraphedModule.busy = False

    def place(self, name: str, like: Tensor) -> Tensor:
        """A tensor with the shape, dtype and strides of `like`, shared by all modules of the group."""
        key = (name, like.shape, like.dtype, like.stride())
        return self.shared.setdefault(key, torch.zeros_like(like)).detach()


class PartialGraph:
    """The graphs of a module's forward and backward (`halves`) for one kind of input, with their inputs and outputs."""

    def __init__(self, owner: GraphedModule, x: Tensor):
        self.x = owner.place("x", x).copy_(x.detach()).requires_grad_(x.requires_grad)
        self.halves, device = [owner.new_graph()], x.device.type
        enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        # With the cache, the graph would keep the weights that were cast in this step.
        with torch.autocast(device, dtype, enabled, cache_enabled=False), self.halves[0]:
            y = owner.run(self.x)
        self.is_fresh, self.has_grad, self.y = self.halves[0].counts_at_once, y.requires_grad, y.detach()
        self.anchor = torch.empty(0, device=x.device, requires_grad=self.has_grad)  # gives the result a gradient
        if self.has_grad:
            self._capture_backward(owner, y)

    def _capture_backward(self, owner: GraphedModule, y: Tensor) -> None:
        self.halves.append(owner.new_graph())
        self.dy, self.parameters = owner.place("dy", y), [p for p in owner.module.parameters() if p.requires_grad]
        inputs = [*self.parameters, *([self.x] if self.x.requires_grad else [])]
        with self.halves[1], torch.autocast(y.device.type, enabled=False):  # as autograd runs
            grads = list(torch.autograd.grad(y, inputs, self.dy, allow_unused=True))
            for place, (like, grad) in enumerate(zip(inputs, grads, strict=True)):
                if grad is not None and grad.stride() != like.stride():  # fused optimizers need equal strides
                    grads[place] = torch.empty_like(like, requires_grad=False).copy_(grad)
        self.grads, self.dx = grads[: len(self.parameters)], grads[-1] if self.x.requires_grad else None

    def forward(self, x: Tensor) -> Tensor:
        """The graph's output, valid until the next step. Right after a capture that ran, it is there already."""
        if not self.is_fresh:
            self.x.detach().copy_(x)
            self.halves[0].replay()
        self.is_fresh = False
        return self.y.detach()

    def backward(self, dy: Tensor) -> Tensor | None:
        """Add the weights' gradients to `grad`; gives the gradient of the input."""
        for p, grad in zip(self.parameters, self.grads, strict=True):
            if grad is not None and p.grad is grad:  # of an earlier micro-batch of this step
                p.grad = grad.clone()
        self.dy.copy_(dy)
        self.halves[1].replay()
        for p, grad in zip(self.parameters, self.grads, strict=True):
            if p.grad is None:
                p.grad = grad
            elif grad is not None:
                p.grad.add_(grad)
        return self.dx


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor, graph: PartialGraph) -> Tensor:
        ctx.graph = graph
        return graph.forward(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, Tensor | None, None]:
        return None, ctx.graph.backward(*grad_outputs), None
