"""kd_loss_eager.py on the CPU, where asking a tensor for its value costs nothing."""

from torch import Tensor

from ..op import without_autocast
from .grad_output import multiplied
from .logit_loss import careful
from .student_teacher import student_and_teacher


@without_autocast
def compute(
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


def gradient(ctx, grads: Tensor | None, gradients: tuple[Tensor | None, ...]) -> Tensor:
    """The student's; gradients: those of loss, ce and kd that come from above.

    The tensors that ctx holds may have been changed since: they are asked for only if grads, what the forward pass has
    left, cannot be made the wanted ones.
    """
    (ce_weight, _, kd_weight, *_), temperature, *_ = ctx.settings
    both, *own = (0.0 if g is None else g.item() for g in gradients)
    terms = [(weight, both + g) for weight, g in zip((ce_weight, kd_weight), own, strict=True)]
    if grads is None or not multiplied(grads, {given for weight, given in terms if weight}):
        student, teacher, target = ctx.saved_tensors
        grads = student.new_empty((1, *student.shape))
        weights = [weight * given if weight else 0.0 for weight, given in terms]
        compute(student, teacher, target, *weights, temperature, grads)
    return grads[0]
