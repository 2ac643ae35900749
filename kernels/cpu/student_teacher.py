"""The closed form for one student and one teacher with integer labels: half the calls of logit_loss_cpu.py.

At batch 128 and 100 classes the time on a CPU is that of the calls, not of the numbers.
The divergence of two heads that agree to 0.01 is off by some 0.04 % in the mean at T = 1, up to 4 times eager torch's
error, and by 0.2 % at T = 4, where eager's is the same.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..op import accumulator
from .scratch import scratch

WIDEST = 40.0
"""Beyond this, in a log-probability of a label or a log-sum, fp32 sums of unshifted logits lose digits."""


def student_and_teacher(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    ce_weight: float,
    kd_weight: float,
    temperature: float,
    grads: Tensor,
) -> tuple[float, float] | None:
    """(weighted CE, weighted T^2 KL), means over the batch; the gradient goes into grads [1, N, C].

    None where this would not be exact: the caller then computes with more care. That is where logits are large, or a
    class is ruled out (logit -inf).
    """
    (N, C), dtype = student.shape, accumulator([student, teacher])
    fits = grads.dtype == dtype
    room = scratch.kept(_room, (N, C), grads if fits else grads.new_empty((), dtype=dtype))
    z_s, z_t = student.to(dtype), teacher.to(dtype)
    p_1 = grads[0] if fits else scratch("p_1", (N, C), room.z)  # the student at temperature 1
    label = target[:, None]
    labels = label.expand(2, N, 1)
    torch.mul(z_s, 1 / temperature, out=room.s)
    torch.mul(z_t, 1 / temperature, out=room.t)
    torch.sub(room.t, room.s, out=room.ahead)
    torch.gather(room.z, 2, labels, out=room.z_label)
    torch.softmax(room.z, 2, out=room.z)
    torch.gather(room.z, 2, labels, out=room.p_label)
    ratio = room.ahead.mul_(room.t).sum(1).sum(dtype=torch.float64).item()
    room.s.sub_(room.t).mul_(kd_weight * temperature / N)
    torch.softmax(z_s, 1, out=p_1)
    torch.gather(p_1, 1, label, out=room.p_1_label)
    p_1.scatter_(1, label, -1, reduce="add")
    torch.add(room.s, p_1, alpha=ce_weight / N, out=grads[0])
    room.exact.copy_(room.at_label)  # the divergence of nearly equal heads is a small difference of these
    room.log_p.log_()
    room.log_sum.sub_(room.log_p_T)  # z - log p, at any class
    lowest, highest = room.exact.aminmax()
    if not (-WIDEST <= lowest.item() and highest.item() <= WIDEST and math.isfinite(ratio)):
        return None
    log_sum_s, log_sum_t, _, _, log_p = room.exact.sum((1, 2)).tolist()
    return -ce_weight / N * log_p, kd_weight * temperature**2 / N * (ratio + log_sum_s - log_sum_t)


class Room(NamedTuple):
    """Buffers, and the views of them that are written: making these anew takes 15 to 30 us."""

    z: Tensor
    """[2, N, C]: student and teacher over T, then their softmax; s and t are its halves."""
    s: Tensor
    t: Tensor
    ahead: Tensor
    """[N, C]"""
    at_label: Tensor
    """[5, N, 1]: z_label [2], p_label [2], p_1_label"""
    z_label: Tensor
    p_label: Tensor
    p_1_label: Tensor
    exact: Tensor
    """The same in fp64 (at fp64 the same tensor), made into log_sum [2] and log_p [3]; log_p_T [2] is p_label's."""
    log_sum: Tensor
    log_p: Tensor
    log_p_T: Tensor


def _room(N: int, C: int, like: Tensor) -> Room:
    z, ahead, at_label = like.new_empty(2, N, C), like.new_empty(N, C), like.new_empty(5, N, 1)
    exact = at_label.double()
    labels = at_label[:2], at_label[2:4], at_label[4]
    return Room(z, *z.unbind(), ahead, at_label, *labels, exact, exact[:2], exact[2:], exact[2:4])
