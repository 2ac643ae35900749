"""logit_loss.py where there is no GPU: loss and gradients together, in few passes of torch operations.

At batch 128 and 100 classes the time on a CPU is that of the calls, not of the numbers. So integer labels without
options have two ways with half the calls of logit_loss_general.py: one student and one teacher, or any heads. Both
give up where logits are large or a class is ruled out (logit -inf); the general way is exact there too.

The divergence of two heads that agree to 0.01 is a small difference of large sums: one student and one teacher are off
by some 0.04 % in the mean at T = 1, up to 4 times eager torch's error, and by 0.2 % at T = 4, where eager's is the
same. For any heads the error is some 1e-7 of E[z] whatever the divergence: 0.1 to 0.2 % at T = 1, up to 15 times that
of torch's own log_softmax and kl_div. Gradients come from p_i - p_j and are not concerned.
"""

import functools
import math
import threading
from typing import cast

import torch
from torch import Tensor

from ..logit_loss import Inputs
from ..op import Tensors

WIDEST = 40.0
"""Beyond this, in a log-probability of a label or a log-sum, fp32 sums of unshifted logits lose digits."""


class _Scratch(threading.local):
    """scratch(name, shape, like) -> [shape] of like's dtype, with whatever was there before.

    The C library gives megabytes back to the system at once, and fetching them anew costs more than computing with
    them. One buffer per name and dtype is held, for each thread. Evaluation in inference mode may be the first to ask:
    what is made there could not be written outside of it, so buffers and views are made as if outside.
    """

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        self.views: dict[tuple[str, torch.dtype], Tensor] = {}

    def __call__(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        if like.device.type != "cpu":
            return like.new_empty(shape)
        key = (name, like.dtype)
        view = self.views.get(key)
        if view is None or view.shape != shape:
            with torch.inference_mode(False):
                buffer, size = self.buffers.get(key), math.prod(shape)
                if buffer is None or not size <= len(buffer) <= 4 * size:
                    buffer = self.buffers[key] = like.new_empty(size)
                view = self.views[key] = buffer[:size].view(shape)
        return view


scratch = _Scratch()


def closed_form(inputs: Inputs, outputs: Tensors, grads: Tensor, grad_outputs: Tensors = ()) -> None:
    """See FusedOp."""
    if inputs.class_weights is not None or inputs.mask_kd or inputs.reduction != "mean":
        from .logit_loss_rows import by_rows  # it imports scratch from here, as the general way does

        by_rows(inputs, outputs, grads, grad_outputs)
        return
    target = inputs.target
    if target is None:  # no term uses it
        target = inputs.heads[0].new_zeros(len(inputs.heads[0]), dtype=torch.int64)
        inputs = inputs._replace(target=target)
    on_cpu = inputs.heads[0].device.type == "cpu"
    if on_cpu and grad_outputs:  # reading what comes from above costs nothing here: it becomes a part of the weights
        grad_loss, grad_terms = grad_outputs
        common, own = 0.0 if grad_loss is None else grad_loss.item(), [0.0] * len(inputs.weights)
        if grad_terms is not None:
            own = grad_terms.flatten().tolist()
        products = [w * (common + gradient) if w else 0.0 for w, gradient in zip(inputs.weights, own, strict=True)]
        inputs, grad_outputs = inputs._replace(weights=products), ()
    heads, _, _, weights, _, smoothing, ignore_index, standardize, _, _, needs_grad = inputs
    if not on_cpu or smoothing or standardize or target.is_floating_point() or ignore_index is not None:
        terms = None
    elif len(heads) != 2 or needs_grad[1] or any((weights[1], *weights[3:])):
        terms = _many_heads(inputs, grads)
    else:  # without a gradient the same terms, to the bit: the registered op computes them apart from the gradients
        room = grads if needs_grad[0] else scratch("unused", (1, *heads[0].shape), grads)
        terms = _student_and_teacher(inputs, room)
    if terms is None:
        from .logit_loss_general import general  # it imports scratch from here

        general(inputs, outputs, grads, grad_outputs)
    elif outputs[0] is not None:
        outputs[0].copy_(terms.sum())
        outputs[1].copy_(terms)


def _student_and_teacher(inputs: Inputs, grads: Tensor) -> Tensor | None:
    """grads: [1, N, C]"""
    (student, teacher), target, _, (ce_weight, _, kd_weight, *_), temperature, *_ = inputs
    assert target is not None
    (N, C), dtype = student.shape, torch.promote_types(torch.result_type(student, teacher), torch.float32)
    fits = grads.dtype == dtype
    like = grads if fits else grads.new_empty((), dtype=dtype)
    z, ahead, at_label = scratch("z", (2, N, C), like), scratch("ahead", (N, C), like), like.new_empty(5, N, 1)
    p_1 = grads[0] if fits else scratch("p_1", (N, C), like)  # the student at temperature 1
    (s, t), z_s, z_t, label = z.unbind(), student.to(dtype), teacher.to(dtype), target[:, None]
    labels = label.expand(2, N, 1)
    torch.mul(z_s, 1 / temperature, out=s)
    torch.mul(z_t, 1 / temperature, out=t)
    torch.sub(t, s, out=ahead)
    torch.gather(z, 2, labels, out=at_label[:2])
    torch.softmax(z, 2, out=z)
    torch.gather(z, 2, labels, out=at_label[2:4])
    ratio = ahead.mul_(t).sum(1).sum(dtype=torch.float64).item()
    s.sub_(t).mul_(kd_weight * temperature / N)
    torch.softmax(z_s, 1, out=p_1)
    torch.gather(p_1, 1, label, out=at_label[4])
    p_1.scatter_(1, label, -1, reduce="add")
    torch.add(s, p_1, alpha=ce_weight / N, out=grads[0])
    exact = at_label.double()  # the divergence of nearly equal heads is a small difference of these
    exact[2:].log_()
    exact[:2].sub_(exact[2:4])  # log-sum = z - log p, at any class
    lowest, highest = exact.aminmax()
    if not (-WIDEST <= lowest.item() and highest.item() <= WIDEST and math.isfinite(ratio)):
        return None
    log_sum_s, log_sum_t, _, _, log_p = exact.sum((1, 2)).tolist()
    ce, kd = -ce_weight / N * log_p, kd_weight * temperature**2 / N * (ratio + log_sum_s - log_sum_t)
    return grads.new_tensor([[ce, 0, kd], [0, 0, 0]], dtype=torch.float64)


def _many_heads(inputs: Inputs, grads: Tensor) -> Tensor | None:
    """With z the logits over T and L their log-sums, log p = z - L, and for all pairs of heads in one product

    sum_c p_j log p_i = cross[j, i] - L_i,    KL(p_j || p_i) = (L_i - cross[j, i]) - (L_j - cross[j, j])

    Subtracting one head from all before the product would save digits, for one more pass over the logits.
    """
    heads, target, _, weights, temperature, *_, needs_grad = inputs
    assert target is not None
    H, (N, C) = len(heads), heads[0].shape
    dtype = functools.reduce(torch.promote_types, (z.dtype for z in heads), torch.float32)
    scale, towards, from_label = _constants(tuple(weights), tuple(needs_grad), temperature, N, dtype)
    z = torch.stack(list(heads), out=scratch("z", (H, N, C), scale.to(dtype)))
    if temperature != 1:
        z.mul_(1 / temperature)
    p = torch.softmax(z, 2, out=scratch("p", z.shape, z))
    label = target.view(1, N, 1).expand(H, N, 1)
    log_p = p.gather(2, label).double().log_()
    log_sum = z.gather(2, label).double().sub_(log_p)
    if not torch.maximum(log_sum.abs(), -log_p).amax() <= WIDEST:
        return None
    cross = torch.bmm(p.transpose(0, 1), z.permute(1, 2, 0)).sum(0, dtype=torch.float64)
    divergence = log_sum.sum(1, dtype=torch.float64) - cross.T
    divergence = divergence - divergence.diagonal()
    gradient = grads if grads.dtype == dtype else scratch("gradient", grads.shape, z)
    torch.mm(towards, p.view(H, N * C), out=gradient.view(len(grads), N * C))
    if temperature != 1:
        _add_labels(inputs, z, log_p, gradient)
        if not log_p.amin() >= -WIDEST:
            return None
    gradient.scatter_add_(2, label[: len(grads)], from_label.expand(-1, N, 1))
    if gradient is not grads:
        grads.copy_(gradient)
    ce = -log_p.sum(1, dtype=torch.float64)
    terms = torch.cat([ce, divergence], 1).mul_(scale).to(dtype)
    return terms if math.isfinite(terms.sum()) else None


def _add_labels(inputs: Inputs, room: Tensor, log_p: Tensor, gradient: Tensor) -> None:
    """The cross-entropies' part where their softmax, at temperature 1, is not that of the divergences."""
    rows, ce_weights = iter(gradient), inputs.weights[:: len(inputs.heads) + 1]
    for i, (head, weight, learner) in enumerate(zip(inputs.heads, ce_weights, inputs.needs_grad, strict=True)):
        mine = next(rows) if learner else None
        if weight:
            p = torch.softmax(head.to(room.dtype), 1, out=room[i])
            log_p[i] = p.gather(1, cast(Tensor, inputs.target)[:, None]).double().log_()
            if mine is not None:
                mine.add_(p, alpha=weight / len(p))


@functools.lru_cache(maxsize=64)
def _constants(
    weights: tuple[float, ...], needs_grad: tuple[bool, ...], temperature: float, N: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """[H, 1 + H] factors of the terms; [learners, H] from softmax to gradients; [learners, 1, 1] what labels add."""
    H, learners = len(needs_grad), [i for i, learner in enumerate(needs_grad) if learner]
    scale = torch.tensor(weights, dtype=torch.float64, device="cpu").view(H, H + 1) / N
    ce, pulls = scale[:, 0], scale[:, 1:]
    towards = (pulls.sum(1).diag() - pulls) * temperature
    if temperature == 1:
        towards += ce.diag()
    from_label = -ce[learners, None, None].to(dtype)
    pulls *= temperature**2
    return scale, towards[learners].to(dtype), from_label
