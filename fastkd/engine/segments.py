"""Steps that take one of very many paths (IAKD by blocks), as graphs of their parts: a forward and a backward each.

K gates have 2^K paths, too many for a graph of each; but only 2 K + 2 parts. The parts of a step are replayed one after
the other, the host in between; loss, optimizer and counters run eagerly. A part that a step leaves out gets no gradient
and stays untouched. Results are those of eager steps bit for bit, unless the loss looks at maps between the parts:
there gradients are summed in another order.
"""

import math
from collections.abc import Callable, Hashable

import torch
from torch import Tensor, nn

from .graph import WARM_UP
from .step import Step
from .teacher import Fast


class SegmentedStep:
    """`step(images, target, plan)` as Step, whose parts are replayed. `close` makes the networks plain ones again."""

    def __init__(self, step: Step, new_graph: Callable, warm_up: int = WARM_UP):
        self.step = step
        self.segments = []
        for groups, learns in ((step.method.segments(), True), (teacher_parts(step.method), False)):
            for group in groups:
                shared = {}  # one part of a group runs in a step: inputs and gradients of results are in one place
                self.segments += [Segment(module, new_graph, warm_up, shared, learns) for module in group]

    def __getattr__(self, name: str):
        return getattr(self.step, name)

    def __call__(self, images: Tensor, target: Tensor, plan: Hashable = None) -> None:
        self.step(images, target, plan)

    def close(self) -> str:
        for segment in self.segments:
            del segment.module.forward  # that of its class comes back
        captured = [segment for segment in self.segments if segment.key]
        replays, megabytes = sum(s.replays for s in captured), sum(s.megabytes for s in captured)
        for segment in captured:
            segment.release()
        parts = f"{len(captured)} of {len(self.segments)} parts"
        return f"CUDA graphs of {parts}, {megabytes:,.0f} MB, replayed {replays:,} times"


def paths(method) -> int:
    """How many a step of the method may take."""
    return math.prod(len(group) for group in method.segments())


def teacher_parts(method) -> list[list[nn.Module]]:
    """What can be replayed of the teacher's own forward pass, where the loss asks for it."""
    if not method.asks_teacher:
        return []
    view = method.views_for(method.plan(0)).get(method.teacher)
    if view is None:
        return [[method.teacher.net]]
    return [[part] for part in view.parts] if isinstance(view, Fast) else []


class Segment:
    """The forward of a module, [N, ...] -> [N, ...]: eager at first, then replayed for inputs like the first.

    `learns`: with autograd; the module may also run without, as part of the teacher, which is then left alone.
    """

    busy = False  # a module inside of another's segment belongs to that

    def __init__(self, module: nn.Module, new_graph: Callable, warm_up: int, shared: dict, learns: bool):
        self.module, self.eager, self.new_graph, self.shared = module, module.forward, new_graph, shared
        self.learns = learns
        module.forward = self
        self.left = warm_up  # eager calls still to come
        self.usual, self.key = None, None  # inputs like the first one, once captured
        self.replays, self.megabytes = 0, 0.0

    def __call__(self, x: Tensor) -> Tensor:
        if Segment.busy or torch.is_grad_enabled() != self.learns:
            return self.eager(x)
        kind = x.device.type
        key = (x.shape, x.dtype, x.stride(), x.requires_grad, self.module.training)
        key += (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        self.usual = self.usual or key
        if key != self.usual or self.left:
            self.left -= key == self.usual
            return self._run(x)
        if self.key is None:
            self._capture(x, key)
        return _Replay.apply(self.anchor, x, self) if self.learns else self.forward(x)

    def _run(self, x: Tensor) -> Tensor:
        Segment.busy = True
        try:
            return self.eager(x)
        finally:
            Segment.busy = False

    def _capture(self, x: Tensor, key: tuple) -> None:
        self.key, self.x = key, self._static("x", x).requires_grad_(x.requires_grad)
        self.anchor = torch.empty(0, device=x.device, requires_grad=True)  # makes the result ask for a gradient
        with torch.no_grad():
            self.x.copy_(x)
        self.graph, cached = self.new_graph(), torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # weights that were cast before would be those of this step for ever
        try:
            with self.graph:
                self.y = self._run(self.x)
        finally:
            torch.set_autocast_cache_enabled(cached)
        self.fresh = self.graph.counts_at_once
        self.megabytes = self.graph.megabytes
        if self.y.requires_grad:
            self._capture_backward()

    def _capture_backward(self) -> None:
        """The saved tensors stay (retain_graph): another part's graph must not find their memory free."""
        self.dy = self._static("dy", self.y)
        self.learners = [p for p in self.module.parameters() if p.requires_grad]
        inputs = [*self.learners, *([self.x] if self.x.requires_grad else [])]
        self.back = self.new_graph()
        with self.back:
            found = torch.autograd.grad(self.y, inputs, self.dy, retain_graph=True, allow_unused=True)
            found = [_laid_out_as(x, g) for x, g in zip(inputs, found, strict=True)]
        self.grads, self.dx = found[: len(self.learners)], found[-1] if self.x.requires_grad else None
        self.megabytes += self.back.megabytes

    def _static(self, name: str, like: Tensor) -> Tensor:
        key = (name, like.shape, like.dtype, like.stride())
        if key not in self.shared:
            self.shared[key] = torch.zeros_like(like)
        return self.shared[key].detach()

    def forward(self, x: Tensor) -> Tensor:
        """A view of the graph's own result, good until the next step."""
        if not self.fresh:
            self.x.detach().copy_(x)
            self.graph.replay()
        self.fresh, self.replays = False, self.replays + 1
        return self.y.detach()

    def backward(self, dy: Tensor) -> Tensor | None:
        """Leaves the gradients of the weights in `grad`, gives that of the input."""
        before = [p.grad for p in self.learners]  # of this step's earlier micro-batches
        kept = [g if g is None or g is not own else g.clone() for g, own in zip(before, self.grads, strict=True)]
        self.dy.copy_(dy)
        self.back.replay()
        for p, g, own in zip(self.learners, kept, self.grads, strict=True):
            p.grad = own if g is None else g if own is None else g.add_(own)
        return self.dx

    def release(self) -> None:
        self.__dict__.update(graph=None, back=None, y=None, grads=None, dx=None)


def _laid_out_as(weight: Tensor, gradient: Tensor | None) -> Tensor | None:
    """As autograd leaves it in `grad`: the fused optimizers go through both in one order."""
    if gradient is None or gradient.stride() == weight.stride():
        return gradient
    return torch.empty_like(weight, requires_grad=False).copy_(gradient)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, anchor, x, segment):
        ctx.segment = segment
        return segment.forward(x)

    @staticmethod
    def backward(ctx, dy):
        return None, ctx.segment.backward(dy), None
