"""attention_transfer.py where there is no GPU: one pass over each map, the rest is small. Also the path of fp64."""

from typing import Any

import torch
from torch import Tensor

from ..attention_transfer import Inputs
from ..op import Tensors


def closed_form(inputs: Inputs, outputs: Tensors, grads: Any, grad_outputs: Tensors = ()) -> None:
    """See FusedOp."""
    (student, teacher, weight), (loss, k) = inputs, outputs
    if loss is None or teacher is None:
        _write_gradient(student, k, grads, grad_outputs[0])
        return
    (N, HW), C = k.shape, student.shape[1]
    q_s, q_t = (_mean_square(f, k.dtype) for f in (student, teacher))
    norm_s, norm_t = (torch.linalg.vector_norm(q, dim=1, keepdim=True) for q in (q_s, q_t))
    inverse = 1 / norm_s.clamp(min=1e-12)
    a = q_s * inverse
    e = a - q_t * (1 / norm_t.clamp(min=1e-12))  # rounded like a: equal maps differ by exactly 0
    loss.copy_(weight / (N * HW) * e.square().sum())
    # where the norm is clamped it is a constant and has no gradient of its own
    pull = torch.where(norm_s < 1e-12, 0, (a * e).sum(1, keepdim=True))
    k.copy_((4 * weight / (C * N * HW)) * inverse * (e - a * pull))


def _mean_square(f_NCHW: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.linalg.vector_norm(f_NCHW, dim=1, dtype=dtype).square_().div_(f_NCHW.shape[1]).flatten(1)


def _write_gradient(student: Tensor, k: Tensor, grads: Tensor, grad_loss: Tensor) -> None:
    N, _, H, W = student.shape
    scale = (k * grad_loss).view(N, 1, H, W)
    if student.dtype == k.dtype:
        torch.mul(student, scale, out=grads)
    else:
        grads.copy_(student.to(k.dtype) * scale)
