"""map_distance.py where there is no GPU: value and gradient together, in pieces that stay in the cache."""

import torch
from torch import Tensor

from ..map_distance import Inputs
from ..op import Tensors, acc_dtype

_PIECE = 1 << 18
"""Elements, measured: 2^16 pays for calls, 2^20 and more for memory."""


def closed_form(inputs: Inputs, outputs: Tensors, grads: Tensor | None, grad_outputs: Tensors = ()) -> None:
    """See FusedOp."""
    (student, teacher, margin, scale), value = inputs.dense(), outputs[0]
    dtype = acc_dtype([student, teacher])
    if margin is not None:
        margin = margin.to(dtype)[:, None, None]
    factor = 2 * scale * grad_outputs[0] if grad_outputs else 2 * scale
    samples = max(1, _PIECE // student[0].numel())
    pieces = [x.split(samples) for x in ((student, teacher) if grads is None else (student, teacher, grads))]
    sums = []
    for s, t, *g in zip(*pieces, strict=True):
        s, t = s.to(dtype), t.to(dtype) if margin is None else torch.maximum(t.to(dtype), margin)
        residual = s - t
        if margin is not None:
            # at least 0 where t' <= 0: a bound of -inf elsewhere, which this function leaves in one vectorised pass
            nothing = torch.full((), -torch.inf, dtype=dtype, device=t.device).expand_as(t)
            torch.maximum(residual, torch.ops.aten.threshold_backward(nothing, t, 0), out=residual)
        if value is not None:
            flat = (
                residual.permute(0, 2, 3, 1).flatten()
                if residual.is_contiguous(memory_format=torch.channels_last)
                else residual.flatten()
            )
            sums.append(torch.dot(flat, flat))
        if g and g[0].dtype == dtype:
            torch.mul(residual, factor, out=g[0])
        elif g:
            g[0].copy_(residual.mul_(factor))  # half the time of out= where the dtype is another
    if value is not None:
        value.copy_(scale * torch.stack(sums).sum())
