"""kd_loss.py called eagerly, for a learning student and integer labels: with little around the computation.

The way through logit_loss.py gives the same numbers and takes longer on the host: on a CPU 45 to 90 us, a fifth of the
time at 128 rows of 100 classes; on a GPU some 20 us.
"""

import torch
from torch import Tensor

from .check import check_labels, check_logits, check_settings, check_target, check_weights
from .cpu.kd_loss import compute, gradient
from .logit_loss import _forward, _logit_loss_backward, _write_gradients
from .op import accumulator, plain, savable, taken


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
    return _FusedKD.apply(settings, savable(student), savable(teacher.detach()), target)


def _on_cpu(student: Tensor) -> bool:
    return student.device.type == "cpu"


class _FusedKD(torch.autograd.Function):
    """The first backward takes the gradient of the forward pass if that is what is wanted, or one factor makes it so.

    settings: weights of all terms, temperature, and so on, as the operation in logit_loss.py takes them.
    """

    @staticmethod
    def forward(ctx, settings, student, teacher, target):
        ctx.settings = settings
        ctx.save_for_backward(student, teacher, target)
        ctx.set_materialize_grads(False)
        ctx.on_cpu = _on_cpu(student)
        if not ctx.on_cpu:
            loss, terms, _, ctx.grads = _forward([student, teacher], target, *settings, False)
            ce, _, kd = terms[0].unbind()
            return loss, ce, kd
        check_labels(target, student.shape[1], None)
        ctx.grads = student.new_empty((1, *student.shape))
        (ce_weight, _, kd_weight, *_), temperature, *_ = settings
        ce, kd = compute(student, teacher, target, ce_weight, kd_weight, temperature, ctx.grads)
        dtype = accumulator([student, teacher])
        return tuple(student.new_full((), value, dtype=dtype) for value in (ce + kd, ce, kd))

    @staticmethod
    def backward(ctx, *gradients):
        if torch.is_grad_enabled():
            raise RuntimeError("kd_loss has no second derivative; fastkd.kernels.kd_loss_reference has one")
        by_value, grads = ctx.on_cpu and plain(gradients), taken(ctx, gradients)
        return None, (gradient if by_value else _by_the_kernel)(ctx, grads, gradients), None, None


def _by_the_kernel(ctx, grads: Tensor | None, gradients: tuple[Tensor | None, ...]) -> Tensor:
    """The same where no tensor may be asked for its value: on a GPU, and where somebody watches, as compilers do."""
    student, teacher, target = ctx.saved_tensors
    (loss, ce, kd), left, terms = gradients, grads is not None, None
    if not (ce is None and kd is None):
        none = student.new_zeros((), dtype=accumulator([student, teacher]))
        terms = torch.stack([none if ce is None else ce, none, none if kd is None else kd, none, none, none]).view(2, 3)
    elif loss is None:
        return torch.zeros_like(student)
    if not left:
        grads = student.new_empty((1, *student.shape))
    write = _write_gradients if plain((student, teacher, target, *gradients)) else _logit_loss_backward
    write(grads, [student, teacher], target, *ctx.settings, loss, terms, left)
    return grads[0]
