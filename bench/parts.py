"""Where the time of a step goes: one eager step of fastkd, cut where one part ends and the next begins.

On the CPU by the wall clock; on CUDA by events in the stream, so that time in which the device waits for the host
counts for the part that it waits for.
"""

import time
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastkd.bench.common import summary
from fastkd.engine import Step
from fastkd.losses.base import Loss
from fastkd.methods.base import ForwardCache, FrozenTeacher, Method

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
    """`with marks.part(name)`: time in it counts for `name`, less that of parts inside."""

    def __init__(self, device: torch.device):
        self.device, self.inside, self.stamps = device, [], []

    @contextmanager
    def part(self, name: str):
        self.inside.append(name)
        self._stamp()
        yield
        self.inside.pop()
        self._stamp()

    def read(self) -> dict[str, float]:
        """Milliseconds of each part."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        found = dict.fromkeys(PARTS, 0.0)
        for (start, name), (end, _) in zip(self.stamps, self.stamps[1:], strict=False):
            if name:
                found[name] += start.elapsed_time(end) if self.device.type == "cuda" else (end - start) * 1e3
        self.stamps.clear()
        return found

    def _stamp(self) -> None:
        moment = time.perf_counter()
        if self.device.type == "cuda":
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        self.stamps.append((moment, self.inside[-1] if self.inside else None))


class TimedForwardCache(ForwardCache):
    """The memo of a step, which says when which network runs."""

    def __init__(self, images: Tensor, views: dict, marks: Marks):
        super().__init__(images, views)
        self.marks = marks

    def _run(self, net: nn.Module):
        if net in self._memo:
            return super()._run(net)
        with self.marks.part("teacher" if isinstance(net, FrozenTeacher) else "student"):
            return super()._run(net)


def watch(method: Method, marks: Marks) -> list:
    """Hooks on what the method adds to its networks: the outermost modules with weights that hold no loss."""
    networks = (method.student, *method.peers)
    own = {module for net in networks for module in net.modules()} | {method.teacher}
    holds_loss = {m for m in method.modules() if any(isinstance(inner, Loss) for inner in m.modules())}
    entered, hooks = [], []

    def before(module, inputs):
        entered.append(marks.part("added") if not entered else None)
        if entered[-1]:
            entered[-1].__enter__()

    def after(module, inputs, output):
        if part := entered.pop():
            part.__exit__(None, None, None)

    for module in method.modules():
        containers = (nn.ModuleList, nn.ModuleDict, Method)
        passive = isinstance(module, containers) or not any(True for _ in module.parameters())
        if module not in own and module not in holds_loss and not passive:
            hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    return hooks


def run_parts(step: Step, mixup, host: tuple[Tensor, Tensor], inputs: tuple[Tensor, Tensor], plan, marks: Marks):
    """As Step.__call__, in parts."""
    with marks.part("data"):
        for here, there in zip(inputs, host, strict=True):
            here.copy_(there, non_blocking=True)
        images, target = mixup(*inputs, 0)
    with marks.part("optimizer"):
        step.bn_snapshot.save()
    with marks.part("loss"), step.precision.autocast():
        terms = step.method.losses(TimedForwardCache(images, step.method.staged_views_for(plan), marks), target, plan)
        loss = sum(terms.values())
    with marks.part("backward"):
        step.precision.scaler.scale(loss).backward()
    with marks.part("optimizer"):
        step.meter.add(terms, weight=len(images))
        step._update()


def breakdown(step: Step, mixup, batch: tuple[Tensor, Tensor], steps: list[tuple], rounds: int) -> dict[str, dict]:
    """Milliseconds per step of every part, and of `whole`, the same step uncut, with the data; in turn."""
    device, marks = batch[0].device, Marks(batch[0].device)
    host = tuple(x.cpu().pin_memory() if device.type == "cuda" else x.clone() for x in batch)
    inputs, plans = tuple(x.clone() for x in batch), [plan for plans in steps for plan in plans]
    found = {name: [] for name in (*PARTS, "whole")}
    for number in range(rounds + 1):
        hooks = watch(step.method, marks)
        for plan in plans:
            run_parts(step, mixup, host, inputs, plan, marks)
        for hook in hooks:
            hook.remove()
        cut = marks.read()
        whole = Marks(device)
        for plan in plans:
            with whole.part("data"):
                for here, there in zip(inputs, host, strict=True):
                    here.copy_(there, non_blocking=True)
                step(*mixup(*inputs, 0), plan)
        cut["whole"] = whole.read()["data"]
        for name, milliseconds in cut.items() if number else ():  # the first round warms up
            found[name].append(milliseconds / len(plans))
    return {name: summary(times) for name, times in found.items()}
