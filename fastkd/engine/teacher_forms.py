"""The forms that a frozen teacher may run in; one is chosen and put in place.

    plain      the network as it is, under autocast, which casts its weights anew in every forward pass
    folded     BatchNorm folded into the convolutions in fp32, then cast once; outside autocast
    fused      folded; convolutions also compute ReLU and residual addition, layer by layer where that is faster
    compiled   folded, through torch.compile

Blocks of the teacher that IAKD swaps into the student are folded unless the form is plain (folded_gates.py).

Each form is built and timed on one batch. It is compared with the plain network in fp32 and refused if a probability
differs too much. The form is the same in every process, is written to the checkpoint, and is kept when a run is
resumed. Which calls a fused convolution makes is measured anew by each process, so that last bits may differ.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from .. import distributed
from ..errors import UserError
from ..methods.base import Method
from ..methods.forwards import StagedView
from ..methods.frozen import FrozenTeacher, is_absent
from ..models import Staged, tapped
from ..models.stages.layout import CONVOLUTIONAL, Layout, layout_of
from .folded_gates import LARGEST_ERROR, fold_gates, foldable, unfold_gates
from .fuse_conv_bn import fuse_conv_bn, fuse_relu
from .fused_variants import choose_variants, count_variants
from .precision import Precision, cast_frozen
from .timing import time_calls

FORMS = ("plain", "folded", "fused", "compiled")

Log = Callable[[str], None]


class TeacherForm(nn.Module):
    """A teacher as a sequence of modules in one dtype; runs outside autocast.

    With `wants_features` the modules are stem, stages and head, as in `fastkd.models.Staged`. With `compiled` the first
    call compiles. Batches of another number of images than that call's run the modules as they are: the last batch of
    an epoch is not worth a second compilation. Images of another size are (--train-size).
    """

    def __init__(
        self,
        sequence: list[nn.Module],
        dtype: torch.dtype,
        wants_features: bool,
        compiled: bool = False,
        layout: Layout = CONVOLUTIONAL,
    ):
        super().__init__()
        self.sequence, self.dtype, self.wants_features = nn.ModuleList(sequence), dtype, wants_features
        self.layout = layout
        self.compiled = torch.compile(self._run, dynamic=False) if compiled else None
        self.usual = 0  # images in the batches that are compiled for

    def features(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Images [N, 3, H, W] -> (logits [N, C], one map [N, C, H, W] per stage, or none without `wants_features`)."""
        logits, outputs = self.outputs(images)
        return logits, self.maps(outputs)

    def maps(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs of stages as maps [N, C, H, W]."""
        return self.layout.maps(outputs)

    def outputs(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Images [N, 3, H, W] -> (logits [N, C], the output of every stage, or none without `wants_features`)."""
        x = images.to(self.dtype, memory_format=torch.channels_last)
        self.usual = self.usual or len(images)
        run = self.compiled if self.compiled and len(images) == self.usual else self._run
        # The compiler compiles anew if autocast's settings change, also where it is switched off: give all of them.
        with torch.autocast(images.device.type, torch.bfloat16, enabled=False, cache_enabled=False), torch.no_grad():
            return run(x)

    def forward(self, images: Tensor) -> Tensor:
        return self.outputs(images)[0]

    def _run(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        maps = []
        for module in self.sequence:
            x = module(x)
            maps.append(x)
        return x, maps[1:-1] if self.wants_features else []


@dataclass
class FormResult:
    """A form on one batch."""

    name: str
    view: TeacherForm | None = None  # None for the plain form, and for one that could not be built
    reason: str = ""  # why the form cannot be used; empty if it can
    milliseconds: float = math.nan  # of a forward pass
    error: float = math.nan  # largest difference of a probability from the plain teacher in fp32
    agreement: float = math.nan  # fraction of the images with the same top class
    note: str = ""  # how the form was timed, if not as the others, and what its layers run


@contextmanager
def teacher_form(
    method: Method,
    first_images: Callable[[], Tensor],
    wanted: str,
    precision: Precision,
    log: Log,
    asked: str = "",
) -> Iterator[str]:
    """Within the block, the method's teachers run in the `wanted` form; gives the name of the form that is used.

    `first_images()` gives the batch [N, 3, H, W] on which forms are measured; it is called only if one is needed. On
    the CPU and with --deterministic, "auto" is "plain": its results have the same bits in every run. After the block
    the teachers have their own weights again, and swapped-in blocks are the teacher's own. Raises UserError if the
    wanted form is not possible or wrong. `asked`: the user's option, if `wanted` is what an earlier run or rank 0 has
    made of it.
    """
    if is_absent(method.teacher):
        yield wanted
        return
    if wanted == "auto" and (precision.device.type != "cuda" or torch.are_deterministic_algorithms_enabled()):
        wanted = "plain"
    if wanted == "plain" and precision.dtype == torch.float32:
        yield wanted
        return
    images = first_images()
    try:
        if wanted != "plain":
            choose = partial(choose_form, method, images, precision=precision, log=log, asked=asked or wanted)
            wanted = distributed.from_rank_zero(choose, wanted)
            if distributed.rank():
                choose(wanted)
        put_back = cast_frozen(method, images, precision)
        try:
            yield wanted
        finally:
            put_back()
    finally:
        unfold_gates(method)


def choose_form(method: Method, images: Tensor, wanted: str, precision: Precision, log: Log, asked: str = "") -> str:
    """Put the `wanted` form of each teacher in place, or with "auto" the fastest; log what was measured.

    `images` [N, 3, H, W] is the batch to measure on; `asked`: see `teacher_form`. Gives the name of the form. Raises
    UserError if the wanted form is not possible or wrong.
    """
    check_form(method, wanted)
    chosen = "plain"
    for teacher, users in _users(method).items():
        reason = _why_plain(teacher, users)
        if reason or wanted == "plain":
            log(f"teacher form: plain{', ' + reason if reason else ''}")
            continue
        # A form from an earlier run may be in place for the logits alone.
        views = _views(teacher, users)
        wants_features = any(not isinstance(view, TeacherForm) or view.wants_features for view in views)
        best = _best(try_forms(teacher, images, wanted, precision, wants_features), wanted, log)
        chosen = best.name
        if best.view is not None:
            for user in users:
                user.staged_views[teacher] = best.view
    if chosen != "plain" or wanted in ("auto", "folded") and not method.asks_teacher:
        return fold_gates(method, images, asked or wanted, chosen, precision, log)
    return chosen


def check_form(method: Method, wanted: str) -> None:
    """Raise UserError if the method cannot use the `wanted` form of its teacher. Nothing is run."""
    if wanted in ("auto", "plain") or is_absent(method.teacher):
        return
    reasons = [_why_plain(*each) for each in _users(method).items()] or ["the method has no teacher"]
    if wanted == "folded" and not method.asks_teacher and foldable(method):
        return
    if reason := next(filter(None, reasons), ""):
        raise UserError(f"--teacher-form {wanted}: {reason}; use --teacher-form auto or plain")


def _users(method: Method) -> dict[FrozenTeacher, list[Method]]:
    """By teacher, the methods that have it: the method itself, and those of a sum."""
    users: dict[FrozenTeacher, list[Method]] = {}
    for module in method.modules():
        if isinstance(module, Method) and module.teacher is not None:
            users.setdefault(module.teacher, []).append(module)
    return users


def _views(teacher: FrozenTeacher, users: list[Method]) -> list[StagedView]:
    return [user.staged_views[teacher] for user in users if teacher in user.staged_views]


def _why_plain(teacher: FrozenTeacher, users: list[Method]) -> str:
    """Why the teacher must run as it is, or the empty string."""
    if not any(user.asks_teacher for user in users):
        return "the method never runs the teacher as a whole"
    if teacher.batch_statistics:
        return "its BatchNorm takes the statistics of the batch"
    if not all(isinstance(view, (Staged, TeacherForm)) for view in _views(teacher, users)):
        return "the method needs its maps before the activation"
    return ""


def _best(results: list[FormResult], wanted: str, log: Log) -> FormResult:
    """The fastest form that may be used. Raises UserError if there is none."""
    for form in results:
        figures = f"{form.milliseconds:8.2f} ms  error {form.error:.1e}  same top class {form.agreement:.1%}{form.note}"
        log(f"teacher form {form.name:9} {form.reason or figures}")
    usable = [form for form in results if not form.reason and wanted in ("auto", form.name)]
    if not usable:
        raise UserError(f"--teacher-form {wanted}: {results[-1].reason}; use --teacher-form auto or plain")
    best = min(usable, key=lambda form: form.milliseconds)
    log(f"teacher form: {best.name}")
    return best


@torch.no_grad()
def try_forms(
    teacher: FrozenTeacher, images: Tensor, wanted: str, precision: Precision, wants_features: bool
) -> list[FormResult]:
    """The plain form and the `wanted` one, or with "auto" all forms, on one batch of images [N, 3, H, W].

    On the CPU, "auto" leaves out "compiled": compiling takes longer there than it saves.
    """
    plain = tapped(teacher.net) if wants_features else teacher.net

    def plain_logits() -> Tensor:
        with precision.autocast():
            return plain(images)

    names: Sequence[str] = (wanted,)
    if wanted == "auto":
        names = FORMS[1:] if images.device.type == "cuda" else FORMS[1:3]
    results = {"plain": FormResult("plain")}
    calls: dict[str, Callable[[], Tensor]] = {"plain": plain_logits}
    for name in names:
        try:
            view = _build(name, teacher.net, images, precision.dtype, wants_features)
            results[name], calls[name] = FormResult(name, view), partial(view, images)
        except Exception as error:  # torch.fx and the compiler raise any kind; the reason is shown
            reason = "not possible: " + " ".join(f"{type(error).__name__}: {error}".split())[:160]
            results[name] = FormResult(name, reason=reason)
    right, limit = teacher.net(images.float()).float().softmax(1), LARGEST_ERROR[precision.dtype]
    times = time_calls(calls, images.device)
    for name, call in calls.items():
        form, p = results[name], call().float().softmax(1)
        form.milliseconds, form.error = times[name].milliseconds, (p - right).abs().max().item()
        form.note = f"; timed with the host's launches: {times[name].reason}" if times[name].reason else ""
        form.note += count_variants(form.view)
        form.agreement = (p.argmax(1) == right.argmax(1)).float().mean().item()
        if name != "plain" and not form.error <= limit:
            form.reason = f"refused: it differs by {form.error:.1e} in a probability, {limit:g} is allowed"
    return list(results.values())


def _build(name: str, net: nn.Module, images: Tensor, dtype: torch.dtype, wants_features: bool) -> TeacherForm:
    twin = fuse_conv_bn(net, images[:2].float()).to(dtype).to(memory_format=torch.channels_last)
    sequence, layout = [twin], layout_of(net)
    if wants_features:
        view = tapped(twin)
        sequence = [view.stem, *view.stages, view.head]
    if name == "fused":
        sequence = [fuse_relu(module) for module in sequence]
        choose_variants(sequence, images.to(dtype))
    form = TeacherForm(sequence, dtype, wants_features, name == "compiled", layout).eval().requires_grad_(False)
    form.features(images)  # an error, also one of the compiler, is raised here
    return form
