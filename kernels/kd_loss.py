"""Knowledge distillation from logits (Hinton, Vinyals, Dean 2015, arXiv:1503.02531).

    L = ce_weight * CE(z_s, y) + kd_weight * T^2 * KL(p_t^T || p_s^T),    p^T = softmax(z / T), means over the batch
    dL/dz_s = [ ce_weight (p_s - y) + kd_weight T (p_s^T - p_t^T) ] / N

Shapes: student and teacher logits [N, C], any floating dtype and strides; target [N] int64 or a distribution [N, C].
Computed in fp32, or in fp64 when an input is fp64. Only the student's logits get a gradient. No host sync and no
data-dependent branch, so it compiles without a break and can be captured in a CUDA graph.
`standardize` is logit standardisation (Sun et al. 2024, arXiv:2403.01427): z-score of each row, eps 1e-7, before the
softmax. Today this is plain torch, several passes over the logits; a fused kernel is to replace the body of `kd_loss`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def kd_loss_reference(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    *,
    temperature: float = 4.0,
    ce_weight: float = 0.1,
    kd_weight: float = 0.9,
    label_smoothing: float = 0.0,
    standardize: bool = False,
) -> tuple[Tensor, Tensor]:
    """The weighted terms (ce_weight * CE, kd_weight * T^2 * KL), two scalars whose sum is the loss."""
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    student, teacher = student.to(dtype), teacher.detach().to(dtype)
    target = target.to(dtype) if target.is_floating_point() else target
    ce = F.cross_entropy(student, target, label_smoothing=label_smoothing)
    if standardize:
        student, teacher = _z_score(student), _z_score(teacher)
    log_p_s = F.log_softmax(student / temperature, dim=1)
    log_p_t = F.log_softmax(teacher / temperature, dim=1)
    p_t = log_p_t.exp()
    # A class that the teacher rules out (logit -inf) adds 0, not 0 * inf.
    divergence = torch.where(p_t > 0, p_t * (log_p_t - log_p_s), 0.0).sum() / student.shape[0]
    return ce_weight * ce, kd_weight * temperature**2 * divergence


def _z_score(logits_NC: Tensor) -> Tensor:
    centred = logits_NC - logits_NC.mean(1, keepdim=True)
    return centred / (logits_NC.std(1, keepdim=True) + 1e-7)


def kd_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    *,
    temperature: float = 4.0,
    ce_weight: float = 0.1,
    kd_weight: float = 0.9,
    label_smoothing: float = 0.0,
    standardize: bool = False,
) -> tuple[Tensor, Tensor]:
    """`kd_loss_reference` behind a check of shapes and dtypes; raises ValueError with the shapes it got."""
    _check(student, teacher, target)
    return kd_loss_reference(
        student,
        teacher,
        target,
        temperature=temperature,
        ce_weight=ce_weight,
        kd_weight=kd_weight,
        label_smoothing=label_smoothing,
        standardize=standardize,
    )


def _check(student: Tensor, teacher: Tensor, target: Tensor) -> None:
    if student.dim() != 2 or student.shape != teacher.shape:
        raise ValueError(
            f"student and teacher logits must both be [N, C], got {list(student.shape)} and {list(teacher.shape)}"
        )
    if not (student.is_floating_point() and teacher.is_floating_point()):
        raise ValueError(f"logits must be floating point, got {student.dtype} and {teacher.dtype}")
    if student.shape[0] == 0:
        raise ValueError(f"the batch is empty: logits are {list(student.shape)}")
    soft = target.is_floating_point()
    if target.shape != (student.shape if soft else student.shape[:1]) or not (soft or target.dtype == torch.int64):
        raise ValueError(
            f"target must be int64 [N] or floating [N, C] for logits {list(student.shape)}, "
            f"got {target.dtype} {list(target.shape)}"
        )
