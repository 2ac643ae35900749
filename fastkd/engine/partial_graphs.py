"""Steps that take one of very many paths (IAKD by blocks), as graphs of their parts: a forward and a backward each.

K gates have 2^K paths, too many for a graph of each; but only 2 K + 2 parts. The parts of a step are replayed one after
the other, the host in between; loss, optimizer and counters run eagerly. A part that a step leaves out gets no gradient
and stays untouched. Results are those of eager steps bit for bit, unless the loss looks at maps between the parts:
there gradients are summed in another order. Memory is that of the dearest path, for each part of a place in it has its
saved tensors where the others of that place have theirs.
"""

import math
from collections.abc import Callable, Hashable

import torch
from torch import Tensor, nn

from .graph import WARM_UP
from .step import Step
from .teacher import TeacherForm

KINDS = 4  # of inputs, for each part: batches and micro-batches of two sizes


class SegmentedStep:
    """`step(images, target, plan)` as Step, whose parts are replayed. `close` makes the networks plain ones again.

    `new_pool()` gives what makes graphs with memory of their own, such as `lambda: CudaGraph(pool, stream)`.
    """

    def __init__(self, step: Step, new_pool: Callable[[], Callable], warm_up: int = WARM_UP):
        self.step, self.segments = step, []
        for groups, learns in ((step.method.graph_groups(), True), (teacher_parts(step.method), False)):
            for group in groups:
                shared, new_graph = {}, new_pool()  # one part of a group runs in a step
                self.segments += [Segment(module, new_graph, warm_up, shared, learns) for module in group]

    def __getattr__(self, name: str):
        return getattr(self.step, name)

    def __call__(self, images: Tensor, target: Tensor, plan: Hashable = None) -> None:
        self.step(images, target, plan)

    def close(self) -> str:
        captured = [part for segment in self.segments for part in segment.parts.values()]
        megabytes = sum(graph.megabytes for part in captured for graph in part.graphs)
        replays, eager = (sum(getattr(segment, count) for segment in self.segments) for count in ("replays", "eager"))
        for segment in self.segments:
            segment.close()
        parts = f"{len(captured)} for {len(self.segments)} parts"
        return f"CUDA graphs: {parts}, {megabytes:,.0f} MB, replayed in {replays:,} of {replays + eager:,} calls"


def paths(method) -> int:
    """How many a step of the method may take."""
    return math.prod(len(group) for group in method.graph_groups())


def teacher_parts(method) -> list[list[nn.Module]]:
    """What can be replayed of the teacher's own forward pass, where the loss asks for it."""
    if not method.asks_teacher:
        return []
    view = method.staged_views_for(method.plan(0)).get(method.teacher)
    if view is None:
        return [[method.teacher.net]]
    compiled = "run" in vars(view)  # the compiler would look into the parts
    return [[part] for part in view.parts] if isinstance(view, TeacherForm) and not compiled else []


class Segment:
    """The forward of a module, [N, ...] -> [N, ...]: eager at first, then replayed, for each kind of input.

    `learns`: with autograd; the module may also run without, as part of the teacher, which is then left alone.
    """

    busy = False  # a module inside of another's segment belongs to that

    def __init__(self, module: nn.Module, new_graph: Callable, warm_up: int, shared: dict, learns: bool):
        self.module, self.forward, self.new_graph = module, module.forward, new_graph
        self.shared, self.warm_up, self.learns = shared, warm_up, learns
        self.seen, self.parts = {}, {}  # eager calls and what is captured, by kind of input
        self.replays, self.eager = 0, 0
        module.forward = self

    def __call__(self, x: Tensor) -> Tensor:
        if Segment.busy or torch.is_grad_enabled() != self.learns:
            return self.forward(x)
        device = x.device.type
        kind = (x.shape, x.dtype, x.stride(), x.requires_grad, self.module.training)
        kind += (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        if kind not in self.parts and not self._is_warm(kind):
            self.eager += 1
            return self._run(x)
        if kind not in self.parts:
            self.parts[kind] = Part(self._run, list(self.module.parameters()), self.new_graph, self.shared, x)
        part, self.replays = self.parts[kind], self.replays + 1
        return _Replay.apply(part.anchor, x, part) if part.learns else part.forward(x)

    def _is_warm(self, kind: tuple) -> bool:
        self.seen[kind] = self.seen.get(kind, 0) + 1
        return self.seen[kind] > self.warm_up and len(self.parts) < KINDS

    def _run(self, x: Tensor) -> Tensor:
        Segment.busy = True
        try:
            return self.forward(x)
        finally:
            Segment.busy = False

    def close(self) -> None:
        self.parts.clear()
        del self.module.forward  # that of its class comes back


class Part:
    """The two graphs of a module for one kind of input, and what goes in and comes out."""

    def __init__(self, run: Callable, parameters: list[Tensor], new_graph: Callable, shared: dict, x: Tensor):
        self.shared = shared  # inputs, and gradients of results, are in one place for all parts of a group
        self.x = self._place("x", x).requires_grad_(x.requires_grad)
        with torch.no_grad():
            self.x.copy_(x)
        graph, cached = new_graph(), torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # weights that were cast before would be those of this step for ever
        try:
            with graph:
                y = run(self.x)
        finally:
            torch.set_autocast_cache_enabled(cached)
        self.graphs, self.reinit, self.learns = [graph], graph.counts_at_once, y.requires_grad
        if self.learns:
            self.anchor = torch.empty(0, device=x.device, requires_grad=True)  # makes the result ask for a gradient
            self._capture_backward(y, [p for p in parameters if p.requires_grad], new_graph())
        self.y = y.detach()

    def _capture_backward(self, y: Tensor, learners: list[Tensor], graph) -> None:
        self.dy, self.learners = self._place("dy", y), learners
        inputs = [*learners, *([self.x] if self.x.requires_grad else [])]
        with graph, torch.autocast(y.device.type, enabled=False):  # as autograd runs
            found = torch.autograd.grad(y, inputs, self.dy, allow_unused=True)
            found = [_laid_out_as(x, g) for x, g in zip(inputs, found, strict=True)]
        self.grads, self.dx = found[: len(learners)], found[-1] if self.x.requires_grad else None
        self.graphs.append(graph)

    def _place(self, name: str, like: Tensor) -> Tensor:
        key = (name, like.shape, like.dtype, like.stride())
        if key not in self.shared:
            self.shared[key] = torch.zeros_like(like)
        return self.shared[key].detach()

    def forward(self, x: Tensor) -> Tensor:
        """The graph's own result, good until the next step."""
        if not self.reinit:
            self.x.detach().copy_(x)
            self.graphs[0].replay()
        self.reinit = False
        return self.y.detach()

    def backward(self, dy: Tensor) -> Tensor | None:
        """Leaves the gradients of the weights in `grad`, gives that of the input."""
        before = [p.grad for p in self.learners]  # of this step's earlier micro-batches
        kept = [g if g is None or g is not own else g.clone() for g, own in zip(before, self.grads, strict=True)]
        self.dy.copy_(dy)
        self.graphs[1].replay()
        for p, g, own in zip(self.learners, kept, self.grads, strict=True):
            p.grad = own if g is None else g if own is None else g.add_(own)
        return self.dx


def _laid_out_as(weight: Tensor, gradient: Tensor | None) -> Tensor | None:
    """As autograd leaves it in `grad`: the fused optimizers go through both in one order."""
    if gradient is None or gradient.stride() == weight.stride():
        return gradient
    return torch.empty_like(weight, requires_grad=False).copy_(gradient)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, anchor, x, part):
        ctx.part = part
        return part.forward(x)

    @staticmethod
    def backward(ctx, dy):
        return None, ctx.part.backward(dy), None
