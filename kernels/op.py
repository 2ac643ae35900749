"""What every fused loss shares: one operation registered with torch, and a short way past torch's dispatcher.

A fused loss computes its gradient in the forward pass, while the inputs are in registers or caches. `FusedOp` holds the
rest of the story once: autograd, compilers, and eager calls.

- Eager call: the function runs at once, which saves 20 to 60 us of host time per call. The first backward pass takes
  the gradient of the forward pass and scales it in place if it must. A second backward pass computes it anew.
- Anything that has to see operators (a compiler, a dispatch mode, a function transform, a tensor subclass): the
  registered operator is called. Its backward pass computes the gradient, because such a pass may run twice over what
  it has saved.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .cpu.scale import scale_in_place

Grads = Sequence[Tensor | None]


class FusedOp:
    """The operation `fastkd::<name>` and its backward pass `fastkd::<name>_backward`.

    forward(students, *constants, *settings, write_grads) -> (*values, *saved, grads): `students` is a tensor or a list
    of tensors, the only inputs with a gradient. `values` of the outputs are differentiable. Outputs from `saved_from`
    on, but for grads, are kept for the backward pass. `grads` has no elements if nothing was written.
    backward(grads, students, *constants, *saved, *settings, *grad_outputs, written): writes grads. `written` says that
    they hold the gradient for grad_outputs of 1.
    empty_outputs: the arguments of forward -> its outputs, uninitialised.
    empty_grads: the arguments of backward from students to settings -> grads, uninitialised.

    A list of students needs `needs_grad`, a list of bool, as the last of its settings. grads then has one row for each
    student that needs a gradient. The second of two values holds terms; settings[counts] is false for a term whose
    gradient does not count.
    """

    def __init__(
        self,
        name: str,
        forward: Callable[..., tuple[Tensor, ...]],
        backward: Callable[..., None],
        empty_outputs: Callable[..., tuple[Tensor, ...]],
        empty_grads: Callable[..., Tensor],
        *,
        constants: int,
        values: int = 1,
        saved_from: int = 0,
        keeps_constants: bool = True,
        counts: int = 0,
        reference: str = "",
    ):
        self.name, self.forward, self.backward, self.empty_grads = name, forward, backward, empty_grads
        self.constants, self.values, self.saved_from = constants, values, saved_from or values
        self.keeps_constants, self.counts, self.reference = keeps_constants, counts, reference or f"{name}_reference"
        self.op = torch.library.custom_op(f"fastkd::{name}", forward, mutates_args=())
        self.op.register_fake(empty_outputs)
        self.op.register_autograd(self._backward, setup_context=self._setup)
        self.backward_op = torch.library.custom_op(f"fastkd::{name}_backward", self._fresh(), mutates_args=())
        self.backward_op.register_fake(lambda *inputs: empty_grads(*inputs[:-values]))
        self.eager = _eager_function(self)

    def __call__(self, students: Tensor | list[Tensor], *inputs: Any) -> tuple[Tensor, ...]:
        """The values. inputs: constants and settings."""
        many, tensors = isinstance(students, list), [clone_if_inference(x) for x in _flat(students)]
        constants = [x if x is None else clone_if_inference(x) for x in inputs[: self.constants]]
        inputs = (*constants, *inputs[self.constants :])
        if not can_bypass_dispatcher((*tensors, *constants)):
            return self.op(tensors if many else tensors[0], *inputs, False)[: self.values]
        write_grads = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        return self.eager.apply(many, (*inputs, write_grads), *tensors)

    def _fresh(self) -> Callable[..., Tensor]:
        """backward without `grads` and `written`: it returns new grads. torch reads the schema from the signature."""

        @functools.wraps(self.backward)
        def fresh(*inputs: Any) -> Tensor:
            grads = self.empty_grads(*inputs[: -self.values])
            self.backward(grads, *inputs, False)
            return grads

        signature = inspect.signature(self.backward)
        kept = list(signature.parameters.values())[1:-1]
        fresh.__signature__ = signature.replace(parameters=kept, return_annotation=Tensor)  # type: ignore[attr-defined]
        return fresh

    def _setup(self, ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        students, constants, settings = inputs[0], inputs[1 : 1 + self.constants], inputs[1 + self.constants : -1]
        saved = output[self.saved_from : -1]
        ctx.settings, ctx.grads, ctx.many = settings, None, isinstance(students, (list, tuple))
        ctx.dtypes = [x.dtype for x in _flat(students)]
        ctx.save_for_backward(*_flat(students), *(constants if self.keeps_constants else ()), *saved)
        ctx.mark_non_differentiable(*output[self.values :])
        ctx.set_materialize_grads(False)

    def _backward(self, ctx: Any, *grad_outputs: Tensor | None) -> tuple:
        """The gradient of every input of forward."""
        gradients = self.gradients(ctx, grad_outputs[: self.values])
        nothing = (None,) * (self.constants + len(ctx.settings) + 1)
        return (gradients if ctx.many else gradients[0]), *nothing

    def gradients(self, ctx: Any, grad_outputs: Grads) -> list[Tensor | None]:
        """One for each student; None if it needs none."""
        if torch.is_grad_enabled():
            raise RuntimeError(f"{self.name} has no second derivative; fastkd.kernels.{self.reference} has one")
        needs_grad = ctx.settings[-1] if ctx.many else [True]
        if all(gradient is None for gradient in grad_outputs) or not any(needs_grad):
            return [None] * len(ctx.dtypes)
        grads = pop_saved_grad(ctx)
        if not can_bypass_dispatcher(grad_outputs):
            grads = self.backward_op(*self._inputs(ctx), *grad_outputs)
        elif grads is None or not scale_in_place(grads, *grad_outputs, counts=ctx.settings[self.counts]):
            written, inputs = grads is not None, self._inputs(ctx)
            grads = self.empty_grads(*inputs) if grads is None else grads
            self.backward(grads, *inputs, *grad_outputs, written)
        rows = iter(grads.unbind()) if ctx.many else iter([grads])
        return [next(rows).to(dtype) if need else None for dtype, need in zip(ctx.dtypes, needs_grad, strict=True)]

    def _inputs(self, ctx: Any) -> tuple:
        """The arguments of backward from students to settings."""
        tensors, count = ctx.saved_tensors, len(ctx.dtypes)
        students = list(tensors[:count]) if ctx.many else tensors[0]
        return (students, *tensors[count:], *ctx.settings)


def _eager_function(op: FusedOp) -> type[torch.autograd.Function]:
    class Eager(torch.autograd.Function):
        """The same autograd without the operator."""

        @staticmethod
        def forward(ctx: Any, many: bool, inputs: tuple, *students: Tensor) -> Tensor | tuple[Tensor, ...]:
            given = (list(students) if many else students[0], *inputs)
            outputs = op.forward(*given)
            op._setup(ctx, given, outputs)
            if outputs[
                -1
            ].numel():  # not among the saved tensors: the first backward writes it, a second must not use it
                ctx.grads = outputs[-1]
            return outputs[: op.values]

        @staticmethod
        def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple:
            return None, None, *op.gradients(ctx, grad_outputs)

    return Eager


def _flat(students: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (students,) if isinstance(students, Tensor) else tuple(students)


def can_bypass_dispatcher(tensors: Iterable[Tensor | None]) -> bool:
    """True if nothing has to see operators: no compiler, no dispatch mode, no function transform, no special tensor."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._ops._len_torch_dispatch_stack_pre_dispatch() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and not any(map(_special, tensors))
    )


def _special(x: Tensor | None) -> bool:
    """A subclass, a tensor without data, or a batch of gradients that looks like one (is_grads_batched)."""
    if x is None:
        return False
    return type(x) not in (Tensor, torch.nn.Parameter) or x.is_meta or torch._C._functorch.is_legacy_batchedtensor(x)


def pop_saved_grad(ctx: Any) -> Tensor | None:
    """The gradient that the forward pass left. Only the first backward pass gets it, because it may write it."""
    grads, ctx.grads = ctx.grads, None
    return grads


def clone_if_inference(x: Tensor) -> Tensor:
    """x, or a copy if it was made in inference mode: autograd refuses to save such a tensor for a backward pass."""
    if torch.compiler.is_compiling() or not x.is_inference() or torch.is_inference_mode_enabled():
        return x
    return x.clone()


def acc_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """The dtype of the computation: fp64 if a tensor is fp64, else fp32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def runs_on_gpu(tensors: Sequence[Tensor]) -> bool:
    """True if the Triton kernel takes these tensors. It computes in fp32; fp64 goes to the closed form everywhere."""
    return tensors[0].device.type == "cuda" and acc_dtype(tensors) == torch.float32


def is_compiled_for_cpu(x: Tensor) -> bool:
    """True inside torch.compile on the CPU, where Inductor fuses a plain formula better than it calls an operator."""
    return torch.compiler.is_compiling() and x.device.type == "cpu"


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Runs an operation outside of the caller's autocast, which would multiply matrices in 16 bits."""

    @functools.wraps(function)
    def wrapped(logits: Tensor | Sequence[Tensor], *args: Any, **kwargs: Any) -> Any:
        device = _flat(logits)[0].device.type
        if not torch.is_autocast_enabled(device):
            return function(logits, *args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(logits, *args, **kwargs)

    return wrapped
