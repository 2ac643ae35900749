"""Where the time of a step goes: fastkd's eager step, with a time stamp wherever one part ends and the next begins.

On the CPU by the wall clock. On CUDA by events in the stream: while the device waits for the host, the time counts for
the part that it waits for.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from fastkd.bench import summary
from fastkd.bench.steps.baselines import Batch
from fastkd.bench.steps.workload import Plans
from fastkd.engine import Step
from fastkd.engine.mixup import Mixup
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
    """Time stamps. `with marks.part(name)`: the time in the block counts for `name`, without that of inner blocks."""

    def __init__(self, device: torch.device):
        self.device = device
        self.inside: list[str] = []
        self.stamps: list[tuple[Any, str | None]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
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


@contextmanager
def marked(step: Step, marks: Marks) -> Iterator[None]:
    """Within the block the inner parts of `step` are marked."""
    run = ForwardCache._run

    def run_network(cache: ForwardCache, net: nn.Module) -> tuple[Tensor, list[Tensor]]:
        if net in cache._memo:
            return run(cache, net)
        with marks.part("teacher" if isinstance(net, FrozenTeacher) else "student"):
            return run(cache, net)

    calls: list[tuple[Any, str, str]] = [(module, "forward", "added") for module in additions(step.method)]
    calls += [(step, "_backward", "backward"), (step.module, "forward", "loss"), (step.meter, "add", "optimizer")]
    with ExitStack() as stack, patch.object(ForwardCache, "_run", run_network):
        for owner, name, part in calls:
            stack.enter_context(patch.object(owner, name, marks.part(part)(getattr(owner, name))))
        yield


def additions(method: Method) -> list[nn.Module]:
    """What the method adds to its networks: the outermost modules with weights that hold no loss."""
    networks = (method.student, *method.peers)
    known = {module for net in networks for module in net.modules()} | {method.teacher}
    found: list[nn.Module] = []
    for module in method.modules():  # outer modules come first
        container = isinstance(module, (nn.ModuleList, nn.ModuleDict, Method))
        holds_loss = any(isinstance(inner, Loss) for inner in module.modules())
        if module not in known and not container and not holds_loss and any(True for _ in module.parameters()):
            found.append(module)
            known |= set(module.modules())
    return found


def breakdown(step: Step, mixup: Mixup, batch: Batch, steps: list[Plans], rounds: int) -> dict[str, dict]:
    """Milliseconds per step of every part, and of `whole`: the same step without inner marks. The two take turns."""
    device = batch[0].device
    host = [x.cpu().pin_memory() if device.type == "cuda" else x.clone() for x in batch]
    inputs, plans = [x.clone() for x in batch], [plan for plans in steps for plan in plans]
    marks = Marks(device)
    found: dict[str, list[float]] = {name: [] for name in (*PARTS, "whole")}

    def load() -> Batch:
        for here, there in zip(inputs, host, strict=True):
            here.copy_(there, non_blocking=True)
        return mixup(inputs[0], inputs[1], 0, torch.arange(len(inputs[0])))

    for number in range(rounds + 1):
        with marked(step, marks):
            for plan in plans:
                with marks.part("data"):
                    loaded = load()
                with marks.part("optimizer"):
                    step(*loaded, plan)
        times = marks.read()
        for plan in plans:
            with marks.part("data"):
                step(*load(), plan)
        times["whole"] = marks.read()["data"]
        for name, milliseconds in times.items() if number else ():  # the first round warms up
            found[name].append(milliseconds / len(plans))
    return {name: summary(times) for name, times in found.items()}
