"""dkd_loss.py where there is no GPU: loss and gradient together, in few passes of torch operations.

Both networks lie in one [2, N, C] buffer, student first.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dkd_loss import Inputs
from ..op import Tensors, acc_dtype
from .logit_loss import scratch


def closed_form(inputs: Inputs, outputs: Tensors, grads: Tensor | None, grad_outputs: Tensors = ()) -> None:
    """See FusedOp."""
    student, teacher, target, alpha, beta, temperature = inputs
    N, y, loss = len(target), target[:, None], outputs[0]
    d, shifted, r, log_sum, known = _rest(student, teacher, y, temperature)
    p, q = d.sigmoid(), (-d).sigmoid()  # of the label, of all others together
    if grads is not None:
        gap = torch.where(d[0] > 0, q[1] - q[0], p[0] - p[1])  # p_s - p_t without cancellation near 1
        scale = d.new_tensor(temperature / N) * (grad_outputs[0] if grad_outputs else 1)
        out = grads if grads.dtype == r.dtype else scratch("gradient", grads.shape, r)
        torch.sub(*r, out=out).mul_(beta * scale).addcmul_(r[0], -alpha * scale * gap)
        out.scatter_(1, y, alpha * scale * gap)
        if out is not grads:
            grads.copy_(out)
    if loss is None:
        return
    tckd = sum(torch.where(t == 0, 0, t * (log[1] - log[0])).sum() for t, log in ((p[1], _log(d)), (q[1], _log(-d))))
    each = torch.sub(shifted[1], shifted[0], out=scratch("spare", r[1].shape, r)).mul_(r[1]).sum(1)
    if each.device.type != "cpu" or not each.isfinite().all():  # a class of probability 0 adds 0, not 0 * inf
        each = torch.where(r[1] == 0, 0, r[1] * (shifted[1] - shifted[0])).sum(1)
    nckd = each.sum() + ((log_sum[0] - log_sum[1]) * known[1]).sum()
    loss.copy_(temperature**2 / N * (alpha * tckd + beta * nckd))


def _log(d: Tensor) -> Tensor:
    """log sigmoid(d); softplus because it runs on one thread: to wake the others takes longer than the few numbers."""
    return -F.softplus(-d, threshold=50)


def _rest(
    student: Tensor, teacher: Tensor, y: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of the classes other than the label, for both networks [2, N, ...]: d [.., 1] = z_y / T - their log-sum-exp,
    their logits / T less the largest (the label's place holds 0), their softmax (the label's place holds anything),
    log-sum-exp of the shifted [.., 1], and whether one of them is above -inf [.., 1]."""
    dtype, inverse, places = acc_dtype([student, teacher]), 1 / temperature, y.expand(2, -1, 1)
    z = scratch("z", (2, *student.shape), student.new_empty((), dtype=dtype))
    for mine, logits in zip(z, (student, teacher), strict=True):
        torch.mul(logits.detach().to(dtype), inverse, out=mine)
    z_y = z.gather(2, places)
    z.scatter_(2, places, -torch.inf)
    top = z.amax(2, keepdim=True)
    known = top != -torch.inf
    z.sub_(top.where(known, 0)).scatter_(2, places, torch.zeros_like(top).masked_fill_(known, -torch.inf))
    r = torch.softmax(z, 2, out=scratch("p", z.shape, z))
    # The largest is exp(0) / sum, which spares a pass of exponentials; xlogy(1, x) is log(x) on one thread.
    log_sum = -torch.special.xlogy(1.0, r.amax(2, keepdim=True))
    return z_y - top - log_sum, z.scatter_(2, places, 0), r, log_sum, known
