"""Which form the frozen teacher runs in (see teacher_forms.py), and the form put in place.

The choice is the same in every process, is written to the checkpoint, and is kept when a run is resumed.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from .. import distributed
from ..errors import UserError
from ..methods.base import Method
from ..methods.forwards import StagedView
from ..methods.frozen import FrozenTeacher
from ..models import Staged
from .precision import Precision, cast_frozen
from .teacher_forms import FormResult, TeacherForm, try_forms

Log = Callable[[str], None]


@contextmanager
def teacher_form(
    method: Method, first_images: Callable[[], Tensor], wanted: str, precision: Precision, log: Log
) -> Iterator[str]:
    """Within the block, the method's teachers run in the `wanted` form; gives the name of the form that is used.

    `first_images()` gives the batch [N, 3, H, W] on which forms are measured; it is called only if one is needed. On
    the CPU, "auto" is "plain": its results have the same bits in every run. After the block the teachers have their
    own weights again. Raises UserError if the wanted form is not possible or wrong.
    """
    if wanted == "auto" and precision.device.type != "cuda":
        wanted = "plain"
    if wanted == "plain" and precision.dtype == torch.float32:
        yield wanted
        return
    images = first_images()
    if wanted != "plain":
        choose = partial(choose_form, method, images, precision=precision, log=log)
        wanted = distributed.from_rank_zero(choose, wanted)
        if distributed.rank():
            choose(wanted)
    put_back = cast_frozen(method, images, precision)
    try:
        yield wanted
    finally:
        put_back()


def choose_form(method: Method, images: Tensor, wanted: str, precision: Precision, log: Log) -> str:
    """Put the `wanted` form of each teacher in place, or with "auto" the fastest; log what was measured.

    `images` [N, 3, H, W] is the batch to measure on. Gives the name of the form. Raises UserError if the wanted form
    is not possible or wrong.
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
    return chosen


def check_form(method: Method, wanted: str) -> None:
    """Raise UserError if the method cannot use the `wanted` form of its teacher. Nothing is run."""
    if wanted in ("auto", "plain"):
        return
    reasons = [_why_plain(*each) for each in _users(method).items()] or ["the method has no teacher"]
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
        figures = f"{form.milliseconds:8.2f} ms  error {form.error:.1e}  same top class {form.agreement:.1%}"
        log(f"teacher form {form.name:9} {form.reason or figures}")
    usable = [form for form in results if not form.reason and wanted in ("auto", form.name)]
    if not usable:
        raise UserError(f"--teacher-form {wanted}: {results[-1].reason}; use --teacher-form auto or plain")
    best = min(usable, key=lambda form: form.milliseconds)
    log(f"teacher form: {best.name}")
    return best
