"""The ways to run a training step: fastkd's, and what people do without it.

All have the same networks with the same weights, the same batch on the device, the same number format (autocast in
bf16 on CUDA, fp32 on the CPU) and SGD with momentum.
"""

import copy
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from fastkd.bench.swap import NoLoss, official
from fastkd.engine import GraphedStep, Step, TrainOptions, choose_form, graphed
from fastkd.engine.precision import Precision, cast_frozen
from fastkd.errors import UserError
from fastkd.methods import METHODS
from fastkd.methods.base import Method

LR, MOMENTUM, DECAY = 0.01, 0.9, 1e-4
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BOUNDS = ("constant gradient", "student only")
"""Other steps, for comparison: their loss is none or another, so it is not compared."""

Notes = list[str]


class Ours:
    """A Step, or a GraphedStep, with its loss."""

    def __init__(self, step):
        self.step = step

    def __call__(self, images: Tensor, target: Tensor, plan) -> None:
        self.step(images, target, plan)

    def loss(self) -> float:
        """Of the steps since it was last asked; waits for the device."""
        terms = self.step.meter.read()
        self.step.meter.reset()
        return sum(terms.values())

    def close(self) -> None:
        self.step.close()


class Plain:
    """A loop as it is written by hand. `forward(images, target, plan)` -> loss."""

    def __init__(self, forward: Callable, groups: list[dict], device: torch.device, losses=nullcontext, asks=False):
        self.forward, self.losses, self.asks = forward, losses, asks
        self.precision = Precision("auto", device)
        self.optimizer = torch.optim.SGD(groups, lr=LR, momentum=MOMENTUM, weight_decay=DECAY, foreach=True)

    def __call__(self, images: Tensor, target: Tensor, plan) -> None:
        with self.precision.autocast(), self.losses():
            self.last = self.forward(images, target, plan)
        self.optimizer.zero_grad()
        self.last.backward()
        self.optimizer.step()
        if self.asks:
            self.last.item()

    def loss(self) -> float:
        return self.last.item()

    def close(self) -> None:
        torch._dynamo.reset()  # what is compiled may hold graphs; the others are compiled anew when they warm up


class WithoutLoss(Step):
    """A step whose gradients into the logits and maps are fixed: all of fastkd's step but the loss."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.no_loss = NoLoss()

    def _backward(self, images: Tensor, target: Tensor, plan, share: float) -> None:
        with self.precision.autocast(), self.no_loss:
            terms = self.module(images, target, plan)
        self.no_loss.backward()
        self.meter.add(terms, weight=len(images))


def options(**more) -> TrainOptions:
    return TrainOptions(lr=LR, momentum=MOMENTUM, weight_decay=DECAY, **more)


def makers(method: Method, batch: tuple[Tensor, Tensor], compiled: bool) -> dict[str, Callable[[Notes], object]]:
    """By name what makes a contender, fastkd's first; it may raise, and note what it chose. `method` stays as it is."""
    device = batch[0].device
    found = {"fastkd eager": lambda notes: Ours(Step(copy.deepcopy(method), options(), device))}
    if method.asks_teacher:
        found["fastkd best teacher form"] = lambda notes: Ours(best_form(method, batch[0], notes))
    if device.type == "cuda":
        found["fastkd graph"] = lambda notes: Ours(as_graph(method, batch[0], notes))
        if compiled:
            found["fastkd compiled graph"] = lambda notes: Ours(as_graph(method, batch[0], notes, compile=True))
    found["official eager"] = lambda notes: as_published(method, device)
    found["eager channels-last"] = lambda notes: by_hand(method, device)
    if compiled:
        found["compile"] = lambda notes: by_hand(method, device, "default")
        if device.type == "cuda":
            found["compile reduce-overhead"] = lambda notes: by_hand(method, device, "reduce-overhead")
    found["timm task"] = lambda notes: timm_task(method, device)
    found["constant gradient"] = lambda notes: Ours(WithoutLoss(copy.deepcopy(method), options(), device))
    found["student only"] = lambda notes: Ours(Step(METHODS["ce"](copy.deepcopy(method.student)), options(), device))
    return found


def best_form(method: Method, images: Tensor, notes: Notes, **more) -> Step:
    step = Step(copy.deepcopy(method), options(**more), images.device)
    lines = []
    form = choose_form(step.method, images, "auto", step.precision, lines.append)
    cast_frozen(step.method, images, step.precision)
    notes += [f"teacher {form}", *(line for line in lines if "not possible" in line or "refused" in line)]
    return step


def as_graph(method: Method, images: Tensor, notes: Notes, **more) -> GraphedStep:
    return graphed(best_form(method, images, notes, **more), "on", images.device, 1, notes.append)


def as_published(method: Method, device: torch.device) -> Plain:
    """As the papers' codes: NCHW, the teacher under no_grad in fp32 or autocast, the loss read at every step."""
    own = copy.deepcopy(method).to(memory_format=torch.contiguous_format)

    def forward(images, target, plan):
        return sum(own(images.contiguous(), target, plan).values())

    return Plain(forward, own.param_groups(LR), device, official, asks=True)


def by_hand(method: Method, device: torch.device, mode: str = "") -> Plain:
    """What a careful user does: channels-last, the teacher cast once; with `mode` networks and loss are compiled."""
    own = copy.deepcopy(method)
    if own.teacher is not None:
        own.teacher.net.to(Precision("auto", device).dtype)

    def forward(images, target, plan):
        return sum(own(images, target, plan).values())

    if mode:
        forward = torch.compile(forward, dynamic=False, mode=mode)
    return Plain(forward, own.param_groups(LR), device, official)


def timm_task(method: Method, device: torch.device) -> Plain:
    """timm's own trainer's task for KD, the networks as its train.py has them under --amp --channels-last."""
    if type(method) is not METHODS["kd"]:
        raise UserError("timm has a task for kd alone among these methods")
    try:
        from timm.task import DistillationTeacher, LogitDistillationTask
    except ImportError as error:
        raise UserError(f"this timm has no such task ({error})") from None
    own, o = copy.deepcopy(method), method.options
    for net in (own.student, own.teacher.net):
        if not hasattr(net, "pretrained_cfg"):  # not timm's
            net.pretrained_cfg = {"mean": MEAN, "std": STD}
    weights = {"task_loss_weight": o.ce_weight, "distill_loss_weight": o.kd_weight, "temperature": o.temperature}
    teacher = DistillationTeacher(own.teacher.net, device=device)
    where = {"device": device, "verbose": False}
    task = LogitDistillationTask(own.student, teacher, nn.CrossEntropyLoss(), **weights, **where).train()
    return Plain(lambda images, target, plan: task(images, target)["loss"], own.param_groups(LR), device)
