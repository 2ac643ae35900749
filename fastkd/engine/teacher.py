"""The teacher in its fastest form: it is frozen, so it need not run as it was trained.

    plain      as it is, under autocast, which casts its weights anew at every forward pass
    folded     BatchNorm folded into the convolutions in fp32, then cast once; outside autocast
    fused      folded, and ReLU and residual additions done by the convolutions, where that is faster layer by layer
    compiled   folded, through torch.compile

Each form is compared with the plain one on the first batch, and refused where it disagrees.
"""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..methods.base import FrozenTeacher, Method
from ..models import Staged, staged
from .fuse_conv_bn import FusedConvolution, folded, fused
from .precision import Precision

FORMS = ("plain", "folded", "fused", "compiled")
ROUNDS = 5
LARGEST_ERROR = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}  # of a probability


class TeacherForm(nn.Module):
    """A form of a teacher in one number format: `features(images)` -> (logits, maps), as Staged; outside autocast."""

    def __init__(self, parts: list[nn.Module], dtype: torch.dtype, tapped: bool):
        super().__init__()
        self.parts, self.dtype, self.tapped = nn.ModuleList(parts), dtype, tapped

    def features(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        with torch.autocast(images.device.type, enabled=False):
            return self.run(images.to(self.dtype))

    def run(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        maps = []
        for part in self.parts:
            x = part(x)
            maps.append(x)
        return x, maps[1:-1] if self.tapped else []


class FormResult(NamedTuple):
    """A form on one batch."""

    name: str
    view: nn.Module | None
    milliseconds: float
    error: float
    """Largest difference of a probability from the plain teacher in fp32."""
    agreement: float
    """Share of the images with the same top class."""
    reason: str = ""
    """Why it cannot be used."""


def choose_form(method: Method, images: Tensor, wanted: str, precision: Precision, log: Callable[[str], None]) -> str:
    """Put the `wanted` form (or with "auto" the fastest) of each teacher in place; says what was measured.

    UserError where the wanted one is not possible or wrong.
    """
    parts = [m for m in method.modules() if isinstance(m, Method) and m.teacher]
    teachers = {m.teacher: _is_tapped(m.teacher, parts) for m in parts}  # one for all parts of a sum
    chosen = "plain"
    check_form(method, wanted)
    for teacher, tapped in teachers.items():
        reason = _must_be_plain(method, teacher)
        if reason or wanted == "plain":
            log(f"teacher form: plain{', ' + reason if reason else ''}")
            continue
        tried = try_forms(teacher, images, wanted, precision, tapped)
        chosen = _put_in_place(method, teacher, tried, wanted, log)
    return chosen


def check_form(method: Method, wanted: str) -> None:
    """UserError where the `wanted` form would not be used; known before anything is done."""
    if wanted in ("auto", "plain"):
        return
    teachers = {m.teacher for m in method.modules() if isinstance(m, Method) and m.teacher}
    reasons = [_must_be_plain(method, teacher) for teacher in teachers] or ["the method has no teacher"]
    if reason := next(filter(None, reasons), ""):
        raise UserError(f"--teacher-form {wanted}: {reason}; use --teacher-form auto or plain")


def _is_tapped(teacher: FrozenTeacher, parts: list[Method]) -> bool:
    """Whether a part asks for its maps; a form that was put in place before for its logits alone is no sign of it."""
    return any(getattr(part.staged_views[teacher], "tapped", True) for part in parts if teacher in part.staged_views)


def _must_be_plain(method: Method, teacher: FrozenTeacher) -> str:
    if not any(m.asks_teacher for m in method.modules() if isinstance(m, Method) and m.teacher is teacher):
        return "the method never runs the teacher as a whole"
    if teacher.batch_statistics:
        return "its BatchNorm takes the statistics of the batch"
    views = [m.staged_views[teacher] for m in method.modules() if isinstance(m, Method) and teacher in m.staged_views]
    if not all(isinstance(view, (Staged, TeacherForm)) for view in views):
        return "the method needs its maps before the activation"
    return ""


def _put_in_place(method: Method, teacher: FrozenTeacher, tried: list[FormResult], wanted: str, log) -> str:
    for form in tried:
        figures = f"{form.milliseconds:8.2f} ms  error {form.error:.1e}  same top class {form.agreement:.1%}"
        log(f"teacher form {form.name:9} {form.reason or figures}")
    usable = [form for form in tried if not form.reason and (wanted in ("auto", form.name))]
    if not usable:
        raise UserError(f"--teacher-form {wanted}: {tried[-1].reason}; use --teacher-form auto or plain")
    best = min(usable, key=lambda form: form.milliseconds)
    log(f"teacher form: {best.name}")
    for part in (m for m in method.modules() if isinstance(m, Method) and m.teacher is teacher and best.view):
        part.staged_views[teacher] = best.view
    return best.name


@torch.no_grad()
def try_forms(
    teacher: FrozenTeacher, images: Tensor, wanted: str, precision: Precision, tapped: bool
) -> list[FormResult]:
    """Every form that is asked for, on one batch; the plain one always."""
    names = FORMS if wanted == "auto" else ("plain", wanted)
    if wanted == "auto" and images.device.type != "cuda":
        names = names[:3]  # compiling takes longer than it saves there
    plain = staged(teacher.net) if tapped else teacher.net
    right = teacher.net(images.float()).float().softmax(1)
    views = {name: _built(name, teacher.net, images, precision.dtype, tapped) for name in names}
    built = [name for name, view in views.items() if name == "plain" or isinstance(view, TeacherForm)]
    calls = {name: _call(name, views[name], plain, images, precision) for name in built}
    outputs = {name: call() for name, call in calls.items()}
    times = _timed(calls, images.device)
    tried = []
    for name, view in views.items():
        if name not in calls:
            tried.append(FormResult(name, None, float("nan"), float("nan"), float("nan"), f"not possible: {view}"))
            continue
        p = outputs[name].float().softmax(1)
        error, agreement = (p - right).abs().max().item(), (p.argmax(1) == right.argmax(1)).float().mean().item()
        limit, reason = LARGEST_ERROR[precision.dtype], ""
        if name != "plain" and not error <= limit:
            reason = f"refused: it differs by {error:.1e} in a probability, {limit:g} is allowed"
        tried.append(FormResult(name, view, times[name], error, agreement, reason))
    return tried


def _built(name: str, net: nn.Module, images: Tensor, dtype: torch.dtype, tapped: bool):
    """The form; or, where it cannot be had, why not."""
    if name == "plain":
        return None
    try:
        twin = folded(net, images[:2].float()).to(dtype, memory_format=torch.channels_last)
        parts = _parts(twin, tapped)
        if name == "fused":
            parts = [fused(part) for part in parts]
            _choose_layers(parts, images.to(dtype))
        view = TeacherForm(parts, dtype, tapped).eval().requires_grad_(False)
        if name == "compiled":
            view.run = torch.compile(view.run, dynamic=False)
        return view
    except Exception as error:  # torch.fx and the compiler raise of any kind; the reason is shown
        return f"{type(error).__name__}: {error}".splitlines()[0][:160]


def _parts(net: nn.Module, divided: bool) -> list[nn.Module]:
    if not divided:
        return [net]
    view = staged(net)
    return [view.stem, *view.stages, view.head]


def _choose_layers(parts: list[nn.Module], images: Tensor) -> None:
    """Time every fused convolution both ways on what it is given, and keep the faster."""

    def choose(module: FusedConvolution, inputs) -> None:
        times = {}
        for way in (True, False):
            module.fused = way
            times[way] = _timed({"": lambda: FusedConvolution.forward(module, *inputs)}, images.device)[""]
        module.fused = times[True] <= times[False]

    layers = [layer for part in parts for layer in part.modules() if isinstance(layer, FusedConvolution)]
    hooks = [layer.register_forward_pre_hook(choose) for layer in layers]
    for part in parts:
        images = part(images)
    for hook in hooks:
        hook.remove()


def _call(name: str, view, plain: nn.Module, images: Tensor, precision: Precision) -> Callable[[], Tensor]:
    if name != "plain":
        return lambda: view.features(images)[0]

    def call():
        with precision.autocast():
            return plain(images)

    return call


def _timed(calls: dict[str, Callable], device: torch.device) -> dict[str, float]:
    """Milliseconds of each, the median of a few rounds in turn."""
    found = {name: [] for name in calls}
    for number in range(ROUNDS + 1):
        for name, call in calls.items():
            _wait(device)
            start = time.perf_counter()
            call()
            _wait(device)
            if number:  # the first warms up
                found[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(times) for name, times in found.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
