"""Knowledge distillation from logits (Hinton, Vinyals, Dean 2015, arXiv:1503.02531).

    L = ce_weight * CE(z_s, y) + kd_weight * T^2 * KL(p_t^T || p_s^T),    p^T = softmax(z / T), means over the batch
    dL/dz_s = [ ce_weight (p_s - y) + kd_weight T (p_s^T - p_t^T) ] / N

Shapes: student and teacher logits [N, C], any floating dtype and strides; target [N] int64 or a distribution [N, C].
Only the student's logits get a gradient. On a GPU there is no host sync and no data-dependent branch, so it compiles
without a break and can be captured in a CUDA graph.
`standardize` is logit standardisation (Sun et al. 2024, arXiv:2403.01427): z-score of each row, eps 1e-7, before the
softmax. `kd_loss_reference` says what is computed; `kd_loss` is the case of two heads of logit_loss.py, one pass over
the logits: 6 bytes per pair of logits in bf16 where the reference moves 76.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .logit_loss import logit_loss, standardized


class KDTerms(NamedTuple):
    """Weighted scalars, or [N] with reduction "none"; all differentiable."""

    loss: Tensor
    """ce + kd"""
    ce: Tensor
    """ce_weight * CE"""
    kd: Tensor
    """kd_weight * T^2 * KL"""


def kd_loss_reference(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    *,
    temperature: float = 4.0,
    ce_weight: float = 0.1,
    kd_weight: float = 0.9,
    label_smoothing: float = 0.0,
    standardize: bool = False,
    class_weights: Tensor | None = None,
    reduction: str = "mean",
) -> KDTerms:
    """The specification: autograd through torch's own softmaxes."""
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    student, teacher = student.to(dtype), teacher.detach().to(dtype)
    ce = student.new_zeros(student.shape[0] if reduction == "none" else ())
    if target is not None:
        target = target.to(dtype) if target.is_floating_point() else target
        weight = None if class_weights is None else class_weights.to(dtype)
        ce = F.cross_entropy(student, target, weight, label_smoothing=label_smoothing, reduction=reduction)
    if standardize:
        student, teacher = standardized(student), standardized(teacher)
    log_p_s = F.log_softmax(student / temperature, dim=1)
    log_p_t = F.log_softmax(teacher / temperature, dim=1)
    p_t = log_p_t.exp()
    # A class that the teacher rules out (logit -inf) adds 0, not 0 * inf.
    rows = torch.where(p_t == 0, 0.0, p_t * (log_p_t - log_p_s))
    divergence = rows.sum(1) if reduction == "none" else rows.sum()
    if reduction == "mean":
        divergence = divergence / student.shape[0]
    ce, kd = ce_weight * ce, kd_weight * temperature**2 * divergence
    return KDTerms(ce + kd, ce, kd)


def kd_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    *,
    temperature: float = 4.0,
    ce_weight: float = 0.1,
    kd_weight: float = 0.9,
    label_smoothing: float = 0.0,
    ignore_index: int | None = None,
    standardize: bool = False,
    class_weights: Tensor | None = None,
    mask_kd: bool = False,
    reduction: str = "mean",
) -> KDTerms:
    """The same in one pass, with its gradient. Raises ValueError with the shapes that do not fit.

    target: None if ce_weight is 0. `ignore_index`, `mask_kd`, `class_weights`, `reduction` and an empty batch: see
    `logit_loss`.
    """
    fused = logit_loss(
        [student, teacher.detach() if isinstance(teacher, Tensor) and teacher.requires_grad else teacher],
        target,
        [ce_weight, 0.0],
        [[0.0, kd_weight], [0.0, 0.0]],
        temperature=temperature,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        standardize=standardize,
        class_weights=class_weights,
        mask_kd=mask_kd,
        reduction=reduction,
        names=("student_logits", "teacher_logits"),
    )
    ce, _, kd = fused.terms.select(-2, 0).unbind(-1)
    return KDTerms(fused.loss, ce, kd)
