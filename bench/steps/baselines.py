"""The ways to run a training step: fastkd's, and the baselines without it.

All have the same networks with the same weights, the same batch on the device, the same number format (autocast to
bf16 on CUDA, fp32 on the CPU) and SGD with momentum.
"""

import copy
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd import kernels
from fastkd.bench.losses.baselines import PUBLISHED, add
from fastkd.data.base import IMAGENET_MEAN, IMAGENET_STD
from fastkd.engine import Step, TrainOptions, choose_form, graphed
from fastkd.engine.launch import Runner
from fastkd.engine.precision import Precision, cast_frozen
from fastkd.errors import UserError
from fastkd.kernels.factor_distance import FactorDistance
from fastkd.kernels.kd_loss import KDTerms
from fastkd.kernels.logit_loss import LogitLoss
from fastkd.losses import logits
from fastkd.methods import METHODS, kd
from fastkd.methods.base import Method

LR, MOMENTUM, DECAY = 0.01, 0.9, 1e-4
BOUNDS = ("constant gradient", "student only")  # no loss or another loss: bounds of the time, not compared
LOGITS = ("kd_loss", "logit_loss", "dkd_loss", "dist_loss")
FEATURES = ("attention_transfer", "factor_distance", "hint_distance", "overhaul_distance", "rkd_loss", "sp_loss")
HOMES = ((kd, ("kd_loss",)), (logits, LOGITS), (kernels, FEATURES))  # the modules in which the losses are looked up

Batch = tuple[Tensor, Tensor]
Notes = list[str]
Forward = Callable[[Tensor, Tensor, Hashable], Tensor]


class Fastkd:
    """A runner of fastkd."""

    def __init__(self, runner: Runner):
        self.runner, self.step = runner, runner if isinstance(runner, Step) else runner.step
        self.close = runner.close

    def __call__(self, images: Tensor, target: Tensor, plan: Hashable) -> None:
        self.runner(images, target, plan)

    def loss(self) -> float:
        """The loss of the steps since the last call. Waits for the device."""
        terms = self.step.meter.read()
        self.step.meter.reset()
        return sum(terms.values())


class Loop:
    """A training loop as people write it. `reads_loss`: it reads the loss at every step, which waits for the device."""

    def __init__(self, forward: Forward, groups: list[dict], device: torch.device, reads_loss: bool = False):
        self.forward, self.reads_loss = forward, reads_loss
        self.precision = Precision("auto", device)
        self.optimizer = torch.optim.SGD(groups, lr=LR, momentum=MOMENTUM, weight_decay=DECAY, foreach=True)

    def __call__(self, images: Tensor, target: Tensor, plan: Hashable) -> None:
        with self.precision.autocast():
            self.last = self.forward(images, target, plan)
        self.optimizer.zero_grad()
        self.last.backward()
        self.optimizer.step()
        if self.reads_loss:
            self.last.item()

    def loss(self) -> float:
        """The loss of the last step. Waits for the device."""
        return self.last.item()

    def close(self) -> None:
        torch._dynamo.reset()  # compiled code may hold graphs; other ways compile again when they warm up


Way = Fastkd | Loop
"""A way to run training steps: `way(images, target, plan)`. `way.close()` frees graphs and compiled code."""
Makers = dict[str, Callable[[Notes], Way]]


def options(**more: Any) -> TrainOptions:
    """The training options that all ways share."""
    return TrainOptions(lr=LR, momentum=MOMENTUM, weight_decay=DECAY, **more)


def eager_step(method: Method, device: torch.device) -> Step:
    """fastkd's eager step on a copy of the method."""
    return Step(copy.deepcopy(method), options(), device)


def makers(method: Method, batch: Batch, compiled: bool) -> Makers:
    """The maker of each way by name, fastkd's first. A maker may raise, and adds its choices to the notes."""
    images, device = batch[0], batch[0].device
    found: Makers = {"fastkd eager": lambda notes: Fastkd(eager_step(method, device))}
    if method.asks_teacher:
        found["fastkd best teacher form"] = lambda notes: Fastkd(best_form(method, images, notes))
    if device.type == "cuda":
        found["fastkd graph"] = lambda notes: Fastkd(as_graph(method, images, notes))
        if compiled:
            found["fastkd compiled graph"] = lambda notes: Fastkd(as_graph(method, images, notes, compile="on"))
    found["official eager"] = lambda notes: by_hand(method, device, published=True)
    found["eager channels-last"] = lambda notes: by_hand(method, device)
    if compiled:
        found["compile"] = lambda notes: by_hand(method, device, "default")
        if device.type == "cuda":
            found["compile reduce-overhead"] = lambda notes: by_hand(method, device, "reduce-overhead")
    found["timm task"] = lambda notes: timm_task(method, device)
    found["constant gradient"] = lambda notes: Fastkd(WithoutLoss(copy.deepcopy(method), options(), device))
    found["student only"] = lambda notes: Fastkd(eager_step(METHODS["ce"](copy.deepcopy(method.student)), device))
    return found


def best_form(method: Method, images: Tensor, notes: Notes, **more: Any) -> Step:
    """fastkd's eager step with the fastest teacher form on these images."""
    given = options(**more)
    step = Step(copy.deepcopy(method), given, images.device, compiled=given.compile == "on")
    choose_form(step.method, images, "auto", step.precision, notes.append)
    cast_frozen(step.method, images, step.precision)
    return step


def as_graph(method: Method, images: Tensor, notes: Notes, **more: Any) -> Runner:
    """The same step, replayed as CUDA graphs."""
    return graphed(best_form(method, images, notes, **more), "on", images.device, notes.append)


def by_hand(method: Method, device: torch.device, mode: str = "", published: bool = False) -> Loop:
    """A careful user's loop: channels-last, the teacher cast once; with `mode`, networks and loss are compiled.

    `published`: as the papers' codes. NCHW, the teacher under no_grad in fp32 or autocast, the loss read at every step.
    """
    own = copy.deepcopy(method)
    if published:
        own.to(memory_format=torch.contiguous_format)
    elif own.teacher is not None:
        own.teacher.net.to(Precision("auto", device).dtype)

    def forward(images: Tensor, target: Tensor, plan: Hashable) -> Tensor:
        return add(own(images.contiguous() if published else images, target, plan).values())

    function = torch.compile(forward, dynamic=False, mode=mode) if mode else forward
    return Loop(published_losses()(function), own.param_groups(LR), device, reads_loss=published)


def timm_task(method: Method, device: torch.device) -> Loop:
    """The task of timm's trainer for KD, with the networks of its train.py under --amp --channels-last."""
    own = copy.deepcopy(method)
    if type(method) is not METHODS["kd"] or own.teacher is None:
        raise UserError("timm has a task for kd alone among these methods")
    try:
        from timm.task import DistillationTeacher, LogitDistillationTask
    except ImportError as error:
        raise UserError(f"this timm has no such task ({error})") from None
    for net in (own.student, own.teacher.net):
        if not hasattr(net, "pretrained_cfg"):  # fastkd's networks
            net.__dict__["pretrained_cfg"] = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    task = LogitDistillationTask(
        own.student,
        DistillationTeacher(own.teacher.net, device=device),
        nn.CrossEntropyLoss(),
        task_loss_weight=method.options.ce_weight,
        distill_loss_weight=method.options.kd_weight,
        temperature=method.options.temperature,
        device=device,
        verbose=False,
    ).train()
    return Loop(lambda images, target, plan: task(images, target)["loss"], own.param_groups(LR), device)


@contextmanager
def patch_losses(homes: list[tuple[ModuleType, dict[str, Any]]]) -> Iterator[None]:
    """Within the block the modules have these functions instead of their own.

    fastkd's losses look the functions of fastkd.kernels up in their module. This is quick: it is a part of timed steps.
    """
    before = [{name: vars(home)[name] for name in names} for home, names in homes]
    for home, names in homes:
        vars(home).update(names)
    try:
        yield
    finally:
        for (home, _), own in zip(homes, before, strict=True):
            vars(home).update(own)


@contextmanager
def published_losses() -> Iterator[None]:
    """Within the block the losses are those of the papers' codes, differentiated by autograd."""
    with patch_losses([(home, {n: PUBLISHED[n] for n in names if n in PUBLISHED}) for home, names in HOMES]):
        yield


class WithoutLoss(Step):
    """fastkd's step with fixed gradients into logits and maps in place of the loss."""

    def __init__(self, method: Method, settings: TrainOptions, device: torch.device):
        super().__init__(method, settings, device)
        self.learners: dict[int, Tensor] = {}
        self.noise: dict[tuple, Tensor] = {}
        homes = (*HOMES, (F, ("cross_entropy",)))
        self.homes = [(home, {name: getattr(self, name, self.scalar) for name in names}) for home, names in homes]

    def _backward(self, images: Tensor, target: Tensor, plan: Hashable, share: float) -> None:
        with self.precision.autocast(), patch_losses(self.homes):
            terms = self.module(images, target, plan)
        tensors = list(self.learners.values())
        torch.autograd.backward(tensors, [self._gradient(x) for x in tensors])
        self.learners.clear()
        self.terms.append((terms, len(images)))

    def scalar(self, student: Tensor, *_: Any, **__: Any) -> Tensor:
        """Stands for every loss without a method of its own here."""
        return self._take([student])

    def kd_loss(self, student: Tensor, *_: Any, **__: Any) -> KDTerms:
        none = self._take([student])
        return KDTerms(none, none, none)

    def logit_loss(self, heads: Any, target: Tensor, ce_weights: Any, table: Any, **_: Any) -> LogitLoss:
        learning = [any((c, *row)) for c, row in zip(ce_weights, table, strict=True)]
        heads = [z for z, learns in zip(heads, learning, strict=True) if learns]
        return LogitLoss(*(self._take(heads, shape) for shape in ((), (len(table), 1 + len(table)))))

    def factor_distance(self, parts: Any, teacher: Tensor, weights: Any, p: int = 1) -> FactorDistance:
        return FactorDistance(*(self._take(parts, shape) for shape in ((), (len(parts),))))

    def _take(self, tensors: list[Tensor], shape: tuple[int, ...] = ()) -> Tensor:
        self.learners |= {id(x): x for x in tensors if x.requires_grad}
        return torch.zeros(shape, device=tensors[0].device)

    def _gradient(self, x: Tensor) -> Tensor:
        """Noise as large as the gradient of a mean over the batch; made once."""
        key = (x.shape, x.dtype, x.device)
        if key not in self.noise:
            self.noise[key] = torch.randn_like(x) / x.numel()
        return self.noise[key]
