"""kd_loss.py where there is no GPU, for a learning student and integer labels: with little around the computation.

The way through logit_loss.py gives the same numbers and takes 45 to 90 us more on the host: a fifth of the time at 128
rows of 100 classes.
"""

import torch
from torch import Tensor

from .check import check_labels, check_logits, check_settings, check_target, check_weights
from .dispatch import accumulator, plain, savable, taken, without_autocast
from .logit_loss import _logit_loss_backward
from .logit_loss_cpu import careful
from .student_teacher_cpu import student_and_teacher
from .upstream_cpu import multiplied


def fits(student: Tensor, teacher: Tensor, target: Tensor) -> bool:
    """Whether `kd_terms` is for these, of which nothing is known but that they are tensors."""
    if student.device.type != "cpu" or not plain((student, teacher, target)):
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
    check_weights([ce_weight, 0, kd_weight, 0, 0, 0], 2)
    check_labels(target, student.shape[1], None)
    settings = float(ce_weight), float(kd_weight), temperature
    return _Terms.apply(*settings, savable(student), savable(teacher.detach()), target)


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
    """(ce, kd); the gradient goes into grads [1, N, C]."""
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


class _Terms(torch.autograd.Function):
    """The first backward takes the gradient of the forward pass if one factor makes of it what is wanted."""

    @staticmethod
    def forward(ctx, ce_weight, kd_weight, temperature, student, teacher, target):
        ctx.weights, ctx.temperature = (ce_weight, kd_weight), temperature
        ctx.save_for_backward(student, teacher, target)
        ctx.set_materialize_grads(False)
        ctx.grads = student.new_empty((1, *student.shape))
        ce, kd = _compute(student, teacher, target, ce_weight, kd_weight, temperature, ctx.grads)
        dtype = accumulator([student, teacher])
        return tuple(student.new_full((), value, dtype=dtype) for value in (ce + kd, ce, kd))

    @staticmethod
    def backward(ctx, *gradients):
        if torch.is_grad_enabled():
            raise RuntimeError("kd_loss has no second derivative; fastkd.kernels.kd_loss_reference has one")
        if torch.compiler.is_compiling():
            return None, None, None, _by_the_op(ctx, *gradients), None, None
        both, *own = (0.0 if gradient is None else gradient.item() for gradient in gradients)
        given = [both + gradient if weight else 0.0 for gradient, weight in zip(own, ctx.weights, strict=True)]
        grads = taken(ctx)
        if grads is None or not multiplied(grads, {g for g, weight in zip(given, ctx.weights, strict=True) if weight}):
            student, teacher, target = ctx.saved_tensors
            grads = student.new_empty((1, *student.shape))
            weights = [weight * gradient for weight, gradient in zip(ctx.weights, given, strict=True)]
            _compute(student, teacher, target, *weights, ctx.temperature, grads)
        return None, None, None, grads[0], None, None


def _by_the_op(ctx, loss: Tensor | None, ce: Tensor | None, kd: Tensor | None) -> Tensor:
    """For compiled autograd, which can ask no tensor for its value and may run what it has traced again."""
    student, teacher, target = ctx.saved_tensors
    (ce_weight, kd_weight), none = ctx.weights, student.new_zeros((), dtype=accumulator([student, teacher]))
    ce, kd = (none if gradient is None else gradient for gradient in (ce, kd))
    terms = torch.stack([ce, none, kd, none, none, none]).view(2, 3)
    weights, grads = [ce_weight, 0.0, kd_weight, 0.0, 0.0, 0.0], student.new_empty((1, *student.shape))
    settings = (weights, ctx.temperature, 0.0, None, False, [True, False])
    _logit_loss_backward(grads, [student, teacher], target, *settings, loss, terms, False)
    return grads[0]
