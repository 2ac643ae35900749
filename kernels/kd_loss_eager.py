"""kd_loss.py called eagerly, for a learning student and integer labels: with little around the computation.

The way through logit_loss.py gives the same numbers and takes 45 to 90 us more on the host: on a CPU a fifth of the
time at 128 rows of 100 classes, on a GPU a quarter of what a call takes the host.
"""

import torch
from torch import Tensor

from .check import check_labels, check_logits, check_settings, check_target, check_weights
from .dispatch import accumulator, plain, savable, taken, without_autocast
from .logit_loss import _forward, _logit_loss_backward, _write_gradients
from .logit_loss_cpu import careful
from .student_teacher_cpu import student_and_teacher
from .upstream_cpu import multiplied


def fits(student: Tensor, teacher: Tensor, target: Tensor) -> bool:
    """Whether `kd_terms` is for these, of which nothing is known but that they are tensors."""
    if not plain((student, teacher, target)):
        return False  # before the size: a compiler would make what it is asked for a constant
    learns = student.requires_grad and torch.is_grad_enabled()
    return learns and student.numel() > 0 and not target.is_floating_point()


def kd_terms(
    student: Tensor, teacher: Tensor, target: Tensor, ce_weight: float, kd_weight: float, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, ce, kd), all differentiable; what does not fit is an error, as in logit_loss.py."""
    check_logits([student, teacher])
    check_target(target, student)
    check_settings(temperature, 0.0)
    weights = [float(ce_weight), 0.0, float(kd_weight), 0.0, 0.0, 0.0]
    check_weights(weights, 2)
    settings = weights, temperature, 0.0, None, False, [True, False]
    return _Terms.apply(settings, savable(student), savable(teacher.detach()), target)


def _on_cpu(student: Tensor) -> bool:
    return student.device.type == "cpu"


class _Terms(torch.autograd.Function):
    """The first backward takes the gradient of the forward pass if that is what is wanted, or one factor makes it so.

    settings: weights of all terms, temperature, and so on, as the operation in logit_loss.py takes them.
    """

    @staticmethod
    def forward(ctx, settings, student, teacher, target):
        ctx.settings = settings
        ctx.save_for_backward(student, teacher, target)
        ctx.set_materialize_grads(False)
        if not _on_cpu(student):
            loss, terms, _, ctx.grads = _forward([student, teacher], target, *settings, False)
            ce, _, kd = terms[0].unbind()
            return loss, ce, kd
        check_labels(target, student.shape[1], None)
        ctx.grads = student.new_empty((1, *student.shape))
        (ce_weight, _, kd_weight, *_), temperature, *_ = settings
        ce, kd = _compute(student, teacher, target, ce_weight, kd_weight, temperature, ctx.grads)
        dtype = accumulator([student, teacher])
        return tuple(student.new_full((), value, dtype=dtype) for value in (ce + kd, ce, kd))

    @staticmethod
    def backward(ctx, *gradients):
        if torch.is_grad_enabled():
            raise RuntimeError("kd_loss has no second derivative; fastkd.kernels.kd_loss_reference has one")
        tensors, grads = ctx.saved_tensors, taken(ctx)
        by_value = _on_cpu(tensors[0]) and not torch.compiler.is_compiling()
        return None, (_by_value if by_value else _by_the_kernel)(ctx.settings, tensors, grads, *gradients), None, None


@without_autocast
def _compute(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    ce_weight: float,
    kd_weight: float,
    temperature: float,
    grads: Tensor,
) -> tuple[float, float]:
    """(ce, kd) on the CPU; the gradient goes into grads [1, N, C]."""
    terms = student_and_teacher(student, teacher, target, ce_weight, kd_weight, temperature, grads)
    if terms is not None:
        return terms
    options = {"smoothing": 0.0, "ignore_index": None, "standardize": False, "count_hits": False}
    weights = [ce_weight, 0.0, kd_weight, 0.0, 0.0, 0.0]
    _, table, _ = careful(
        [student, teacher], target, weights, temperature, learns=[True, False], grads=grads, **options
    )
    ce, _, kd = table[0].tolist()
    return ce, kd


def _by_value(settings: tuple, tensors: tuple[Tensor, ...], grads: Tensor | None, *gradients: Tensor | None) -> Tensor:
    """The student's gradient on the CPU, where what comes from above (of loss, ce, kd) can be looked at."""
    (ce_weight, _, kd_weight, *_), temperature, *_ = settings
    both, *own = (0.0 if gradient is None else gradient.item() for gradient in gradients)
    terms = [(weight, both + gradient) for weight, gradient in zip((ce_weight, kd_weight), own, strict=True)]
    if grads is None or not multiplied(grads, {given for weight, given in terms if weight}):
        grads = tensors[0].new_empty((1, *tensors[0].shape))
        _compute(*tensors, *(weight * given if weight else 0.0 for weight, given in terms), temperature, grads)
    return grads[0]


def _by_the_kernel(
    settings: tuple,
    tensors: tuple[Tensor, ...],
    grads: Tensor | None,
    loss: Tensor | None,
    ce: Tensor | None,
    kd: Tensor | None,
) -> Tensor:
    """On a GPU, and for compiled autograd: neither may ask a tensor for its value, and a compiler sees operators."""
    student, teacher, target = tensors
    left, terms = grads is not None, None
    if not (ce is None and kd is None):
        none = student.new_zeros((), dtype=accumulator([student, teacher]))
        terms = torch.stack([none if ce is None else ce, none, none if kd is None else kd, none, none, none]).view(2, 3)
    if not left:
        grads = student.new_empty((1, *student.shape))
    write = _logit_loss_backward if torch.compiler.is_compiling() else _write_gradients
    write(grads, [student, teacher], target, *settings, loss, terms, left)
    return grads[0]
