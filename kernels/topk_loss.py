"""KL divergence from a teacher of whom only the k largest logits are kept, over k + 1 outcomes.

    p, q: softmax(z_t / T), softmax(z_s / T);    r_p, r_q: their mass outside of the k classes
    L = weight * T^2 * [ sum_top p_i log(p_i / q_i) + r_p log(r_p / r_q) ],    mean over the batch

The last outcome is "any other class": the teacher's side has a logit of its own for it, T * logsumexp_rest(z_t / T).
Bias: by the chain rule of the KL, L is smaller than the whole KL by r_p * KL(p given rest || q given rest). Its
gradient with respect to z_s equals the whole KL's in the k classes. In another class j it is weight T (q_j - r_p q_j /
r_q) / N instead of weight T (q_j - p_j) / N: so no entry differs by more than weight T r_p / N, and the absolute
differences of a row sum to 2 weight T r_p / N at most. The student is free to spread r_p over the rest as it likes.

Shapes: student [N, C], values [N, k + 1] floating, classes [N, k] int64, without repeats, 1 <= k < C. Only the student
gets a gradient. Plain torch, which compiles without a break and asks the GPU nothing: beside a network's step its few
launches on [N, C] do not show. `topk_kd_loss_reference` is the definition, `topk_kd_loss` keeps small masses exact.
"""

import torch
from torch import Tensor

from .check import check_floating, check_tensors


def topk_of(logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """(values [N, k + 1], classes [N, k]) of logits [N, C]: the k largest, then the logit of all others together."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    values, classes = logits.topk(k, dim=1)
    others = logits.scatter(1, classes, -torch.inf) / temperature
    return torch.cat([values, temperature * others.logsumexp(1, keepdim=True)], 1), classes


def topk_kd_loss_reference(
    student: Tensor, values: Tensor, classes: Tensor, temperature: float = 4.0, weight: float = 1.0
) -> Tensor:
    """The specification: probabilities of the k + 1 outcomes, and their KL."""
    q = (student / temperature).softmax(1).gather(1, classes)
    q = torch.cat([q, 1 - q.sum(1, keepdim=True)], 1)
    p = (values.detach() / temperature).softmax(1)
    return weight * temperature**2 * (p * (p / q).log()).sum(1).mean()


def topk_kd_loss(
    student: Tensor, values: Tensor, classes: Tensor, temperature: float = 4.0, weight: float = 1.0
) -> Tensor:
    """The same from log-sum-exps, a scalar in fp32, or in fp64 if a tensor is. ValueError if the shapes do not fit."""
    _check(student, values, classes)
    dtype = torch.promote_types(torch.promote_types(student.dtype, values.dtype), torch.float32)
    x = student.to(dtype) / temperature
    others = x.scatter(1, classes, -torch.inf).logsumexp(1, keepdim=True)
    log_q = torch.cat([x.gather(1, classes), others], 1) - x.logsumexp(1, keepdim=True)
    log_p = (values.detach().to(dtype) / temperature).log_softmax(1)
    p = log_p.exp()
    rows = torch.where(p == 0, 0, p * (log_p - log_q))  # an outcome that the teacher rules out adds 0, not 0 * inf
    return weight * temperature**2 * rows.sum(1).mean()


def _check(student: Tensor, values: Tensor, classes: Tensor) -> None:
    check_floating(student_logits=student, values=values)
    check_tensors(classes=classes)
    k = classes.shape[-1]
    shapes = [list(each.shape) for each in (student, values, classes)]
    fits = student.dim() == 2 and shapes[1:] == [[len(student), k + 1], [len(student), k]]
    if not fits or not 1 <= k < student.shape[1] or classes.dtype != torch.int64:
        raise ValueError(
            f"student_logits [N, C], values [N, k + 1] and classes [N, k] int64 with 1 <= k < C are needed, got "
            f"{shapes[0]}, {shapes[1]} and {shapes[2]} {classes.dtype}"
        )
