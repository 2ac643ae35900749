"""Where the time of a step goes: fastkd's eager step, with a time stamp wherever one part ends and the next begins.

On the CPU by the wall clock. On CUDA by events in the stream: while the device waits for the host, the time counts for
the part that it waits for.
"""

import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from fastkd.bench import summary
from fastkd.bench.steps.baselines import Batch
from fastkd.bench.steps.workload import Plans
from fastkd.engine import Step, TrainOptions
from fastkd.engine.mixup import Mixup
from fastkd.engine.step import Meter
from fastkd.losses.base import Loss
from fastkd.methods.base import Method
from fastkd.methods.forwards import ForwardCache
from fastkd.methods.frozen import FrozenTeacher

PARTS = {
    "data": "the batch from (on CUDA: pinned) host memory into the step's inputs, and the mixup",
    "teacher": "its forward pass",
    "student": "forward passes of the networks that learn; with the teacher's blocks in iakd",
    "added": "forward passes of what the method adds: bridge, auxiliary heads, encoders",
    "loss": "with its gradient, where it is fused",
    "backward": "through the networks and whatever of the loss is not fused",
    "optimizer": "with its guard against gradients that are not finite, and the counters",
}


class Marks:
    """`with marks.part(name)`: the time in the block counts for `name`, without the time of blocks inside it."""

    def __init__(self, device: torch.device):
        self.device, self.recording = device, False
        self.inside: list[str] = []
        self.stamps: list[tuple[Any, str | None]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        if not self.recording:
            yield
            return
        self.inside.append(name)
        self._stamp()
        yield
        self.inside.pop()
        self._stamp()

    def read(self) -> dict[str, float]:
        """Milliseconds of each part since the last call."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize(self.device)
        found = dict.fromkeys(PARTS, 0.0)
        for (start, name), (end, _) in zip(self.stamps, self.stamps[1:], strict=False):
            if name:
                found[name] += start.elapsed_time(end) if cuda else (end - start) * 1e3
        self.stamps.clear()
        return found

    def _stamp(self) -> None:
        moment: Any = time.perf_counter()
        if self.device.type == "cuda":
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        self.stamps.append((moment, self.inside[-1] if self.inside else None))


class MarkedMeter(Meter):
    """Counts as the part "optimizer"."""

    def __init__(self, marks: Marks):
        super().__init__()
        self.marks = marks

    def add(self, values: dict[str, Tensor], weight: float) -> None:
        with self.marks.part("optimizer"):
            super().add(values, weight)


class MarkedStep(Step):
    """The engine's step, which writes time stamps while `marks.recording`."""

    def __init__(self, method: Method, options: TrainOptions, device: torch.device):
        super().__init__(method, options, device)
        self.marks = Marks(device)
        self.meter = MarkedMeter(self.marks)
        self.module.forward = self._marked(self.module.forward)

    def __call__(self, images: Tensor, target: Tensor, plan: Hashable = None) -> None:
        with self.marks.part("optimizer"):
            super().__call__(images, target, plan)

    def _backward(self, images: Tensor, target: Tensor, plan: Hashable, share: float) -> None:
        with self.marks.part("backward"):
            super()._backward(images, target, plan, share)

    def _marked(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def marked(*inputs: Any) -> Any:
            with self.marks.part("loss"):
                return forward(*inputs)

        return marked


def marked_networks(marks: Marks) -> AbstractContextManager[Any]:
    """Within the block each forward pass of a network counts as the part "teacher" or "student"."""
    run = ForwardCache._run

    def marked(cache: ForwardCache, net: nn.Module) -> tuple[Tensor, list[Tensor]]:
        if net in cache._memo:
            return run(cache, net)
        with marks.part("teacher" if isinstance(net, FrozenTeacher) else "student"):
            return run(cache, net)

    return patch.object(ForwardCache, "_run", marked)


def marked_additions(method: Method, marks: Marks) -> list[Any]:
    """Hooks on what the method adds to its networks: the outermost modules with weights that hold no loss."""
    networks = (method.student, *method.peers)
    own = {module for net in networks for module in net.modules()} | {method.teacher}
    entered: list[AbstractContextManager[None] | None] = []

    def is_added(module: nn.Module) -> bool:
        container = isinstance(module, (nn.ModuleList, nn.ModuleDict, Method))
        holds_loss = any(isinstance(inner, Loss) for inner in module.modules())
        return module not in own and not container and not holds_loss and any(True for _ in module.parameters())

    def before(module: nn.Module, inputs: Any) -> None:
        entered.append(None if entered else marks.part("added"))
        if part := entered[-1]:
            part.__enter__()

    def after(module: nn.Module, inputs: Any, output: Any) -> None:
        if part := entered.pop():
            part.__exit__(None, None, None)

    added = filter(is_added, method.modules())
    return [hook for m in added for hook in (m.register_forward_pre_hook(before), m.register_forward_hook(after))]


def breakdown(step: MarkedStep, mixup: Mixup, batch: Batch, steps: list[Plans], rounds: int) -> dict[str, dict]:
    """Milliseconds per step of every part, and of `whole`: the same step without time stamps. The two take turns."""
    device = batch[0].device
    pinned = device.type == "cuda"
    host = [x.cpu().pin_memory() if pinned else x.clone() for x in batch]
    inputs, plans = [x.clone() for x in batch], [plan for plans in steps for plan in plans]
    whole = Marks(device)
    whole.recording = True
    found: dict[str, list[float]] = {name: [] for name in (*PARTS, "whole")}

    def load() -> Batch:
        for here, there in zip(inputs, host, strict=True):
            here.copy_(there, non_blocking=True)
        return mixup(inputs[0], inputs[1], 0)

    for number in range(rounds + 1):
        cut = _run_marked(step, load, plans)
        for plan in plans:
            with whole.part("data"):
                step(*load(), plan)
        cut["whole"] = whole.read()["data"]
        for name, milliseconds in cut.items() if number else ():  # the first round warms up
            found[name].append(milliseconds / len(plans))
    return {name: summary(times) for name, times in found.items()}


def _run_marked(step: MarkedStep, load: Callable[[], Batch], plans: list[Hashable]) -> dict[str, float]:
    marks, hooks = step.marks, marked_additions(step.method, step.marks)
    marks.recording = True
    with marked_networks(marks):
        for plan in plans:
            with marks.part("data"):
                batch = load()
            step(*batch, plan)
    marks.recording = False
    for hook in hooks:
        hook.remove()
    return marks.read()
