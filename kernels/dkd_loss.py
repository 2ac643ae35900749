"""Decoupled knowledge distillation (Zhao et al. 2022, arXiv:2203.08679): the label's probability and the rest apart.

    L = T^2 (alpha TCKD + beta NCKD), means over the batch
    TCKD = KL(b_t || b_s), b = (p_y, 1 - p_y), p = softmax(z / T);  NCKD = KL(r_t || r_s), r = softmax over classes != y
    dL/dz_s,k = T / N [ beta (r_s,k - r_t,k) - alpha (p_s,y - p_t,y) r_s,k ],  k != y
    dL/dz_s,y = T / N alpha (p_s,y - p_t,y)

Everything follows from d = z_y / T - logsumexp(z_rest / T): log p_y = -softplus(-d), log(1 - p_y) = -softplus(d), exact
where p_y rounds to 0 or 1. Shapes: student and teacher [N, C], any floating dtype and row stride; target [N] int64.
Computed in fp32 (in fp64 where an input is fp64, by the closed form in torch operations). One launch forward leaves
loss and gradient; one launch backward ends at once if the upstream gradient is 1, else computes the gradient anew.
Bytes per logit in bf16: 6 (read, read, write), 10 above 8,192 classes.

Departures: the official code takes the label out of the softmax by subtracting 1000 from its logit; here it takes no
part. Where a row's other logits are all -inf, r is 0 in place of 0 / 0.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .check import check_labels, check_logits, check_target
from .cpu.dkd_loss import closed_form
from .gpu.dkd_loss import launch
from .op import accumulator, plain, savable, taken


def dkd_loss_reference(
    student: Tensor, teacher: Tensor, target: Tensor, *, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0
) -> Tensor:
    """The specification: autograd through torch's log_softmax and logsumexp."""
    N, C = student.shape
    dtype = accumulator([student, teacher])
    rest = torch.arange(C, device=target.device) != target[:, None]
    log_s, log_t = (_decouple(z.to(dtype) / temperature, target, rest) for z in (student, teacher.detach()))
    tckd, nckd = (
        torch.where(t.exp() == 0, 0, t.exp() * (t - s)).sum() / max(N, 1) for s, t in zip(log_s, log_t, strict=True)
    )
    return temperature**2 * (alpha * tckd + beta * nckd)


def _decouple(z_NC: Tensor, target: Tensor, rest_NC: Tensor) -> tuple[Tensor, Tensor]:
    """log (p_y, 1 - p_y) [N, 2] and log softmax over the other classes [N, C - 1]."""
    others = z_NC[rest_NC].view(len(z_NC), z_NC.shape[1] - 1)
    d = z_NC.gather(1, target[:, None]) - others.logsumexp(1, keepdim=True)
    return F.logsigmoid(torch.cat([d, -d], 1)), others.log_softmax(1)


def dkd_loss(
    student: Tensor, teacher: Tensor, target: Tensor, *, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0
) -> Tensor:
    """The scalar above for logits student and teacher [N, C], C >= 2, and labels target [N] int64.

    The gradient goes to the student; the teacher is a constant. An empty batch gives 0; two classes give NCKD = 0.
    A class of logit -inf has probability 0: it adds nothing where the teacher rules it out, inf where only the student
    does. Raises ValueError on shapes, dtypes or devices that do not fit, temperature <= 0 and, on the CPU or with
    FASTKD_DEBUG=1, labels that are no class; elsewhere such a label makes the loss NaN.
    """
    check_logits([student, teacher])
    check_target(target, student)
    if target.is_floating_point():
        raise ValueError(f"dkd_loss needs labels int64 [N], got {target.dtype} {list(target.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    learns = torch.is_grad_enabled() and student.requires_grad
    return _FusedDKD.apply(
        student, savable(teacher.detach()), target, float(alpha), float(beta), float(temperature), learns
    )


def _compute(student: Tensor, teacher: Tensor):
    return launch if student.is_cuda and accumulator([student, teacher]) == torch.float32 else closed_form


def _forward(
    student: Tensor, teacher: Tensor, target: Tensor, alpha: float, beta: float, temperature: float, learns: bool
) -> tuple[Tensor, Tensor]:
    check_labels(target, student.shape[1], None, "leave rows without a label out")
    loss, grads = _results(student, teacher, learns)
    if len(target) == 0:
        return loss.zero_(), grads
    settings = (alpha, beta, temperature)
    return _compute(student, teacher)(student, teacher, target, *settings, grads if learns else None), grads


_dkd_loss = torch.library.custom_op("fastkd::dkd_loss", _forward, mutates_args=())


def _results(student: Tensor, teacher: Tensor, learns: bool) -> tuple[Tensor, Tensor]:
    loss = student.new_empty((), dtype=accumulator([student, teacher]))
    return loss, student.new_empty(student.shape if learns else (0,))


@_dkd_loss.register_fake
def _(student, teacher, target, alpha, beta, temperature, learns):
    return _results(student, teacher, learns)


def _write_gradients(
    grads: Tensor,
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    alpha: float,
    beta: float,
    temperature: float,
    upstream: Tensor,
    written: bool,
) -> None:
    """Write grads, unless they are `written` for an upstream gradient of 1 and it is 1."""
    if len(target):
        settings = (alpha, beta, temperature, grads, upstream, written)
        _compute(student, teacher)(student, teacher, target, *settings)


_dkd_loss_backward = torch.library.custom_op("fastkd::dkd_loss_backward", _write_gradients, mutates_args=("grads",))


def _setup(ctx, inputs, output):
    student, teacher, target, *ctx.settings, ctx.learns = inputs
    ctx.save_for_backward(student, teacher, target)
    ctx.grads = None  # whoever calls the op holds its gradient too: it is not to be written
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, upstream, _=None):
    if torch.is_grad_enabled():
        raise RuntimeError("dkd_loss has no second derivative; fastkd.kernels.dkd_loss_reference has one")
    if upstream is None or not ctx.learns:
        return (None,) * 7
    student, teacher, target = ctx.saved_tensors
    grads = taken(ctx, (upstream,))
    first = grads is not None
    if not first:
        grads = torch.empty_like(student, memory_format=torch.contiguous_format)
    write = _write_gradients if plain((student, teacher, target, upstream)) else _dkd_loss_backward
    write(grads, student, teacher, target, *ctx.settings, upstream, first)
    return grads, *[None] * 6


_dkd_loss.register_autograd(_backward, setup_context=_setup)


class _FusedDKD(torch.autograd.Function):
    """The same autograd, and eagerly the gradient that the forward pass has left is used: nobody else sees it here.

    A compiled backward may run twice and would find what it wrote: there it computes the gradient.
    """

    @staticmethod
    def forward(ctx, student, teacher, target, alpha, beta, temperature, learns):
        at_once = learns and not torch.compiler.is_compiling()
        compute = _forward if plain((student, teacher, target)) else _dkd_loss
        results = compute(student, teacher, target, alpha, beta, temperature, at_once)
        ctx.save_for_backward(student, teacher, target)
        ctx.settings, ctx.learns = (alpha, beta, temperature), learns
        ctx.grads = results[1] if at_once else None
        ctx.set_materialize_grads(False)
        return results[0]

    @staticmethod
    def backward(ctx, upstream):
        return _backward(ctx, upstream)
