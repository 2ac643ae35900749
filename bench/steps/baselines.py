"""The ways to run a training step: fastkd's, and the baselines without it.

All have the same networks with the same weights, the same batch on the device, the same number format (autocast to
bf16 on CUDA, fp32 on the CPU, if no other is asked for) and SGD with momentum.
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
from fastkd.engine.teacher_forms import FORMS
from fastkd.errors import UserError
from fastkd.kernels.factor_distance import FactorDistance
from fastkd.kernels.kd_loss import KDTerms
from fastkd.kernels.logit_loss import LogitLoss
from fastkd.losses import logits
from fastkd.methods import METHODS, kd
from fastkd.methods.base import Method
from fastkd.methods.forwards import Taught

LR, MOMENTUM, DECAY = 0.01, 0.9, 1e-4
BOUNDS = ("constant gradient", "student only")  # no loss or another loss: bounds of the time, not compared
SETTINGS = {
    "fastkd eager": ("plain", "off", "off"),
    "fastkd best teacher form": ("auto", "off", "off"),
    "fastkd graph": ("auto", "on", "off"),
    "fastkd compiled graph": ("auto", "on", "on"),
    "fastkd compiled": ("auto", "off", "on"),
    **{f"fastkd graph, {form} teacher": (form, "on", "off") for form in FORMS},
}  # fastkd's ways: --teacher-form, --graph, and whether the step is compiled
EXTRA = (*list(SETTINGS)[4:], "compile max-autotune")  # ways that take part only if they are asked for
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
    """A training loop as people write it, in fp16 with torch's GradScaler.

    `reads_loss`: it reads the loss at every step, which waits for the device.
    """

    def __init__(self, forward: Forward, groups: list[dict], precision: Precision, reads_loss: bool = False):
        self.forward, self.reads_loss, self.precision = forward, reads_loss, precision
        self.optimizer = torch.optim.SGD(groups, lr=LR, momentum=MOMENTUM, weight_decay=DECAY, foreach=True)

    def __call__(self, images: Tensor, target: Tensor, plan: Hashable) -> None:
        with self.precision.autocast():
            self.last = self.forward(images, target, plan)
        self.optimizer.zero_grad()
        scaler = self.precision.scaler  # it does nothing, but in fp16
        scaler.scale(self.last).backward()
        scaler.step(self.optimizer)
        scaler.update()
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


def eager_step(method: Method, device: torch.device, amp_dtype: str = "auto") -> Step:
    """fastkd's eager step on a copy of the method."""
    return Step(copy.deepcopy(method), options(amp_dtype=amp_dtype), device)


def makers(method: Method, batch: Batch, compiled: bool, amp_dtype: str = "auto") -> Makers:
    """The maker of each way by name, fastkd's first. A maker may raise, and adds its choices to the notes."""
    device, student = batch[0].device, method.student
    found = our_makers(method, batch[0], compiled, amp_dtype)
    found["official eager"] = lambda notes: by_hand(method, device, amp_dtype, published=True)
    found["eager channels-last"] = lambda notes: by_hand(method, device, amp_dtype)
    if compiled:
        found["compile"] = lambda notes: by_hand(method, device, amp_dtype, "default")
        if device.type == "cuda":
            found["compile reduce-overhead"] = lambda notes: by_hand(method, device, amp_dtype, "reduce-overhead")
            found["compile max-autotune"] = lambda notes: by_hand(method, device, amp_dtype, "max-autotune")
    found["timm task"] = lambda notes: timm_task(method, device, amp_dtype)
    if amp_dtype != "float16":  # fixed gradients do not follow the loss scale
        found["constant gradient"] = lambda notes: Fastkd(WithoutLoss(copy.deepcopy(method), options(), device))
    found["student only"] = lambda notes: Fastkd(eager_step(METHODS["ce"](copy.deepcopy(student)), device, amp_dtype))
    return found


def our_makers(method: Method, images: Tensor, compiled: bool, amp_dtype: str) -> Makers:
    """The makers of fastkd's ways that are possible here; see SETTINGS."""
    device, fastest = images.device, ["auto"]
    found: Makers = {"fastkd eager": lambda notes: Fastkd(eager_step(method, device, amp_dtype))}

    def maker(form: str, graph: str, compiles: bool) -> Callable[[Notes], Way]:
        make, forms = best_form if graph == "off" else as_graph, fastest if form == "auto" else [form]
        more = {"compile": "on" if compiles else "off", "amp_dtype": amp_dtype}
        return lambda notes: Fastkd(make(method, images, notes, forms, **more))

    for name, (form, graph, compiles) in list(SETTINGS.items())[1:]:
        possible = method.asks_teacher or "teacher" not in name
        possible &= device.type == "cuda" or graph == "off"
        if possible and (compiled or (compiles == "off" and form != "compiled")):
            found[name] = maker(form, graph, compiles == "on")
    return found


def best_form(method: Method, images: Tensor, notes: Notes, forms: list[str] | None = None, **more: Any) -> Step:
    """fastkd's eager step with the teacher in the form `forms[0]`.

    If that is "auto", it is the fastest one on these images. Its name then replaces "auto" in `forms`: the next way
    with the same list does not measure again.
    """
    forms = forms or ["auto"]
    given = options(**more)
    step = Step(copy.deepcopy(method), given, images.device, compiled=given.compile == "on")
    forms[0] = choose_form(step.method, images, forms[0], step.precision, notes.append)
    cast_frozen(step.method, images, step.precision)
    return step


def as_graph(method: Method, images: Tensor, notes: Notes, forms: list[str] | None = None, **more: Any) -> Runner:
    """The same step, replayed as CUDA graphs."""
    return graphed(best_form(method, images, notes, forms, **more), "on", images.device, notes.append)


def by_hand(
    method: Method, device: torch.device, amp_dtype: str = "auto", mode: str = "", published: bool = False
) -> Loop:
    """A careful user's loop: channels-last, the teacher cast once; with `mode`, networks and loss are compiled.

    `published`: as the papers' codes. NCHW, the teacher under no_grad in fp32 or autocast, the loss read at every step.
    """
    own, precision = copy.deepcopy(method), Precision(amp_dtype, device)
    if published:
        own.to(memory_format=torch.contiguous_format)
    elif own.teacher is not None:
        own.teacher.net.to(precision.dtype)

    def forward(images: Tensor, target: Tensor, plan: Hashable) -> Tensor:
        return add(own(images.contiguous() if published else images, target, plan).values())

    function = torch.compile(forward, dynamic=False, mode=mode) if mode else forward
    return Loop(published_losses()(function), own.param_groups(LR), precision, reads_loss=published)


def timm_task(method: Method, device: torch.device, amp_dtype: str = "auto") -> Loop:
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
    precision = Precision(amp_dtype, device)
    return Loop(lambda images, target, plan: task(images, target)["loss"], own.param_groups(LR), precision)


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

    def _backward(self, images: Tensor, target: Tensor, plan: Hashable, taught: Taught, share: float) -> None:
        with self.precision.autocast(), patch_losses(self.homes):
            terms = self.module(images, target, plan, taught)
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
