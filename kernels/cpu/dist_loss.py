"""dist_loss.py where there is no GPU: loss and gradient together, in few passes of torch operations."""

from typing import Any

import torch
from torch import Tensor

from ..dist_loss import Inputs
from ..op import Tensors, acc_dtype


def closed_form(inputs: Inputs, outputs: Tensors, grads: Any, grad_outputs: Tensors = ()) -> None:
    """See FusedOp; rows and columns are for the kernels. Five buffers in all: fresh pages cost more."""
    student, teacher, beta, gamma, temperature = inputs
    (N, C), dtype, (loss, rows, columns) = student.shape, acc_dtype([student, teacher]), outputs
    p_s, p_t = ((z.detach().to(dtype) / temperature).softmax(1) for z in (student, teacher))
    gradient = torch.empty_like(p_s) if grads is None or grads.dtype != dtype else grads
    x, y = p_s - 1 / C, p_t - 1 / C  # rows, centred
    r_rows, a, b = _correlation(x, y, 1, gradient)
    for p, z in ((p_s, x), (p_t, y)):  # columns: less their first entry before the mean, so a constant one is exactly 0
        torch.sub(p, p[0], out=z)
        z.sub_(z.mean(0))
    r_columns, A, B = _correlation(x, y, 0, gradient)
    if loss is not None:
        rows.zero_(), columns.zero_()
        loss.copy_(temperature**2 * (beta * (1 - r_rows.mean()) + gamma * (1 - r_columns.mean())))
    if grads is None:
        return
    beta, gamma = -temperature * beta / N, -temperature * gamma / C
    G = x.mul_(gamma * A).addcmul_(y, gamma * B)
    G.addcmul_(p_s, beta * a).addcmul_(p_t, beta * b)  # not centred: the softmax ignores a constant in a row of G
    torch.ops.aten._softmax_backward_data.out(G, p_s, 1, p_s.dtype, grad_input=gradient)
    if grad_outputs:
        gradient.mul_(grad_outputs[0])
    if gradient is not grads:
        grads.copy_(gradient)


def _correlation(x: Tensor, y: Tensor, dim: int, scratch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(r, a, b) of centred x and y: the derivative of r with respect to x is a x + b y; 0 if x or y is constant."""
    xx, yy, xy = (torch.mul(u, v, out=scratch).sum(dim, keepdim=True) for u, v in ((x, x), (y, y), (x, y)))
    x_norm, y_norm = xx.sqrt(), yy.sqrt()
    D = x_norm * y_norm + 1e-8
    constant = x_norm * y_norm == 0
    a = -xy / D * (y_norm / D) / x_norm
    r, a, b = (value.masked_fill(constant, 0) for value in (xy / D, a, 1 / D))
    return r, a, b
