"""attention_transfer.py where there is no GPU: one pass over each map, the rest is small."""

from typing import Any

import torch

from ..attention_transfer import Inputs
from ..op import Tensors


def closed_form(inputs: Inputs, outputs: Tensors, grads: Any, grad_outputs: Tensors = ()) -> None:
    """See FusedOp."""
    (student, teacher, weight), (loss, k) = inputs, outputs
    (N, HW), (_, C, H, W) = k.shape, student.shape
    if teacher is None:
        scale = (k * grad_outputs[0]).view(N, 1, H, W)
        if student.dtype == k.dtype:
            torch.mul(student, scale, out=grads)
        else:
            grads.copy_(student.to(k.dtype) * scale)
        return
    norms = (torch.linalg.vector_norm(f, dim=1, dtype=k.dtype) for f in (student, teacher))
    q_s, q_t = (q.square_().div_(f.shape[1]).flatten(1) for q, f in zip(norms, (student, teacher), strict=True))
    norm_s, norm_t = (torch.linalg.vector_norm(q, dim=1, keepdim=True) for q in (q_s, q_t))
    inverse = 1 / norm_s.clamp(min=1e-12)
    a = q_s * inverse
    e = a - q_t * (1 / norm_t.clamp(min=1e-12))  # rounded like a: equal maps differ by exactly 0
    loss.copy_(weight / (N * HW) * e.square().sum())
    # where the norm is clamped it is a constant and has no gradient of its own
    pull = torch.where(norm_s < 1e-12, 0, (a * e).sum(1, keepdim=True))
    k.copy_((4 * weight / (C * N * HW)) * inverse * (e - a * pull))
