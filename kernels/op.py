"""What every fused loss shares: one operation registered with torch, and a short way past torch's dispatcher.

A fused loss computes its gradient in the forward pass, while its inputs are in registers or caches.
- Eager call: the function runs at once, which saves 20 to 60 us of host time per call. The first backward pass takes
  the gradient of the forward pass and scales it in place if it must. A second backward pass computes it anew.
- For what has to see operators (a compiler, a dispatch mode, a function transform, a tensor subclass), the registered
  operator is called. Its backward pass computes the gradient, since it may run twice over what it has saved.

All losses are computed in fp32, or in fp64 by the closed forms in cpu/ if student or teacher is fp64. On a GPU a
backward pass is one launch. It ends at once if the forward pass has left the gradient and grad_outputs are 1; else it
computes the gradient anew, so that a loss scale reaches what underflows in fp16.
"""

import functools
import importlib
import inspect
import itertools
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, get_type_hints

import torch
from torch import Tensor

from .gpu.host import on_device

Tensors = Sequence[Any]  # None where a tensor was not kept or not given


def empty_grads(inputs: Any, dtype: torch.dtype) -> Tensor:
    """The gradient, uninitialised: like the student, or for a list [students that need one, *shape of a student].

    For a list it has the students' dtype if they agree, else the `dtype` of the computation.
    """
    students = inputs[0]
    if isinstance(students, Tensor):
        return students.new_empty(students.shape)
    dtypes = {x.dtype for x, need in zip(students, inputs.needs_grad, strict=True) if need}
    dtype = dtypes.pop() if len(dtypes) == 1 else dtype
    return students[0].new_empty((sum(inputs.needs_grad), *students[0].shape), dtype=dtype)


class FusedOp:
    """The operation `fastkd::<name>` and its backward pass `fastkd::<name>_backward`.

    Inputs: a NamedTuple. Its first field is the student's tensor, or a list of tensors: only they get a gradient. Next
    come constant tensors, of which one may be called `teacher`, then settings. A list of students needs the setting
    `needs_grad`, a list of bool.
    outputs(inputs, new) -> the outputs called `names`, uninitialised; new(shape) has the dtype of the computation. The
    first `values` are differentiable results. Those from `saved_from` on are kept for the backward pass.
    cpu/<name>.py has closed_form(inputs, outputs, grads), which writes outputs, and grads unless it is None or has no
    rows. Given grad_outputs too it is the backward pass and writes grads alone; outputs that were not kept are then
    None. On a GPU, `launch` of gpu/<name>.py takes its place. Its last argument `written` says that grads hold the
    gradient for grad_outputs of 1.
    grads(inputs, dtype) -> the gradient, uninitialised. writes_grads(inputs, on_gpu): True if the forward pass can
    write it. check(inputs) may look at values. A second value holds terms, whose factors are the setting `weights`.
    """

    def __init__(
        self,
        name: str,
        Inputs: Any,
        *,
        names: tuple[str, ...] = ("loss",),
        outputs: Callable[[Any, Callable[..., Tensor]], tuple[Tensor, ...]] = lambda inputs, new: (new(()),),
        values: int = 1,
        saved_from: int = 0,
        keeps_constants: bool = True,
        grads: Callable[[Any, torch.dtype], Tensor] = empty_grads,
        writes_grads: Callable[[Any, bool], bool] = lambda inputs, on_gpu: True,
        check: Callable[[Any], None] = lambda inputs: None,
        reference: str = "",
    ):
        self.name, self.Inputs, self.outputs, self.grads = name, Inputs, outputs, grads
        self.values, self.saved_from, self.keeps_constants = values, saved_from or values, keeps_constants
        self.writes_grads, self.check, self.reference = writes_grads, check, reference or f"{name}_reference"
        hints = get_type_hints(Inputs)
        self.constants = sum(hint in (Tensor, Tensor | None) for hint in list(hints.values())[1:])
        self.places = {each: place for place, each in enumerate(Inputs._fields[1 + self.constants :])}
        results = (Tensor,) * (len(names) + 1)
        self.op = _register(name, self._operator, {**hints, "write_grads": bool}, tuple.__class_getitem__(results))
        self.op.register_fake(self._fake)
        self.op.register_autograd(self._operator_backward, setup_context=self._setup)
        saved = dict.fromkeys(names[self.saved_from :], Tensor)
        above = {f"grad_{value}": Tensor | None if values > 1 else Tensor for value in names[:values]}
        self.backward_op = _register(f"{name}_backward", self._backward_operator, {**hints, **saved, **above}, Tensor)
        self.backward_op.register_fake(functools.partial(self._backward_operator, fake=True))

    def __call__(self, inputs: Any) -> tuple[Tensor, ...]:
        """The values."""
        many, tensors = not isinstance(inputs[0], Tensor), [clone_if_inference(x) for x in _flat(inputs[0])]
        constants = [x if x is None else clone_if_inference(x) for x in inputs[1 : 1 + self.constants]]
        others = (*constants, *inputs[1 + self.constants :])
        if not can_bypass_dispatcher((*tensors, *constants)):
            return self.op(tensors if many else tensors[0], *others, False)[: self.values]
        write_grads = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        return FusedLoss.apply(self, many, others, write_grads, *tensors)

    def forward(self, inputs: Any, write_grads: bool) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """(outputs, grads)"""
        first, (on_gpu, dtype) = _flat(inputs[0])[0], _device_and_dtype(inputs)
        with _context(first.device, on_gpu):
            inputs, grads, outputs = self._allocate(inputs, dtype, write_grads and self.writes_grads(inputs, on_gpu))
            self.check(inputs)
            if first.numel():
                (self.launch if on_gpu else self.closed_form)(inputs, outputs, grads)
            else:
                torch._foreach_zero_(outputs)
        return outputs, grads

    def backward(self, inputs: Any, saved: Tensors, grad_outputs: Tensors, grads: Tensor | None = None) -> Tensor:
        """The gradient for grad_outputs. grads: the one for grad_outputs of 1, which is overwritten."""
        on_gpu, dtype = _device_and_dtype(inputs, saved)
        written, grads = grads is not None, self.grads(inputs, dtype) if grads is None else grads
        outputs = [*[None] * self.saved_from, *saved]
        with _context(grads.device, on_gpu):
            if on_gpu and grads.numel():
                self.launch(inputs, outputs, grads, grad_outputs, written)
            elif grads.numel():
                self.closed_form(inputs, outputs, grads, grad_outputs)
        return grads

    @functools.cached_property
    def closed_form(self) -> Callable[..., None]:
        return importlib.import_module(f".cpu.{self.name}", __package__).closed_form

    @functools.cached_property
    def launch(self) -> Callable[..., None]:
        return importlib.import_module(f".gpu.{self.name}", __package__).launch  # imports Triton

    def gradients(self, ctx: Any, grad_outputs: Tensors) -> list[Tensor | None]:
        """One for each student; None if it needs none."""
        if torch.is_grad_enabled():
            raise RuntimeError(f"{self.name} has no second derivative; fastkd.kernels.{self.reference} has one")
        needs_grad = ctx.settings[self.places["needs_grad"]] if ctx.many else [True]
        weights = ctx.settings[self.places["weights"]] if "weights" in self.places else ()
        if all(gradient is None for gradient in grad_outputs) or not any(needs_grad):
            return [None] * len(ctx.dtypes)
        grads, ctx.grads = ctx.grads, None  # only the first backward pass gets it, because it may write it
        if not can_bypass_dispatcher(grad_outputs):
            inputs, saved = self._saved(ctx)
            grads = self.backward_op(*inputs, *saved, *grad_outputs)
        elif grads is None or not scale_in_place(grads, *grad_outputs, weights=weights):
            grads = self.backward(*self._saved(ctx), grad_outputs, grads)
        rows = iter(grads.unbind() if ctx.many else [grads])
        return [next(rows).to(dtype) if need else None for dtype, need in zip(ctx.dtypes, needs_grad, strict=True)]

    def _saved(self, ctx: Any) -> tuple[Any, Tensors]:
        """(inputs, saved outputs). Only where they are needed: torch refuses tensors that were changed since."""
        count, tensors = len(ctx.dtypes), ctx.saved_tensors
        students = list(tensors[:count]) if ctx.many else tensors[0]
        saved_from = count + self.constants
        return self.Inputs(students, *tensors[count:saved_from], *ctx.settings), tensors[saved_from:]

    def _allocate(self, inputs: Any, dtype: torch.dtype, write_grads: bool) -> tuple[Any, Tensor | None, tuple]:
        """(inputs, grads, outputs). Unless grads are written, they are None and no student of a list learns."""
        many = not isinstance(inputs[0], Tensor)
        if many and not write_grads:
            inputs = inputs._replace(needs_grad=[False] * len(inputs[0]))
        grads = self.grads(inputs, dtype) if many or write_grads else None
        new = functools.partial(torch.empty, dtype=dtype, device=_flat(inputs[0])[0].device)
        return inputs, grads, self.outputs(inputs, new)

    def _operator(self, *given: Any) -> tuple[Tensor, ...]:
        outputs, grads = self.forward(self.Inputs(*given[:-1]), given[-1])
        return (*outputs, outputs[0].new_empty(0) if grads is None else grads)

    def _fake(self, *given: Any) -> tuple[Tensor, ...]:
        inputs = self.Inputs(*given[:-1])
        on_gpu, dtype = _device_and_dtype(inputs)
        _, grads, outputs = self._allocate(inputs, dtype, given[-1] and self.writes_grads(inputs, on_gpu))
        return (*outputs, outputs[0].new_empty(0) if grads is None else grads)

    def _backward_operator(self, *given: Any, fake: bool = False) -> Tensor:
        fields = len(self.Inputs._fields)
        inputs, saved = self.Inputs(*given[:fields]), given[fields : -self.values]
        if fake:
            return self.grads(inputs, _device_and_dtype(inputs, saved)[1])
        return self.backward(inputs, saved, given[-self.values :])

    def _setup(self, ctx: Any, inputs: tuple, output: Tensors) -> None:
        students, constants, settings = inputs[0], inputs[1 : 1 + self.constants], inputs[1 + self.constants : -1]
        ctx.settings, ctx.grads, ctx.many = settings, None, not isinstance(students, Tensor)
        ctx.dtypes = [x.dtype for x in _flat(students)]
        kept = constants if self.keeps_constants else [None] * self.constants
        ctx.save_for_backward(*_flat(students), *kept, *output[self.saved_from : -1])
        ctx.mark_non_differentiable(*(x for x in output[self.values :] if x is not None))
        ctx.set_materialize_grads(False)

    def _operator_backward(self, ctx: Any, *grad_outputs: Tensor | None) -> tuple:
        """The gradient of every input of the operator."""
        gradients = self.gradients(ctx, grad_outputs[: self.values])
        nothing = (None,) * (self.constants + len(ctx.settings) + 1)
        return (gradients if ctx.many else gradients[0]), *nothing


def _register(name: str, function: Callable[..., Any], parameters: dict[str, Any], returns: Any) -> Any:
    """`function` as the operator fastkd::<name>. torch reads the schema from the signature, which is made here."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    named = [inspect.Parameter(each, kind, annotation=hint) for each, hint in parameters.items()]

    def operator(*given: Any) -> Any:
        return function(*given)

    operator.__signature__ = inspect.Signature(named, return_annotation=returns)  # type: ignore[attr-defined]
    return torch.library.custom_op(f"fastkd::{name}", operator, mutates_args=())


class FusedLoss(torch.autograd.Function):
    """The same autograd without the operator."""

    @staticmethod
    def forward(ctx: Any, op: FusedOp, many: bool, others: tuple, write_grads: bool, *students: Tensor) -> tuple:
        inputs = op.Inputs(list(students) if many else students[0], *others)
        outputs, grads = op.forward(inputs, write_grads)
        op._setup(ctx, (*inputs, write_grads), (*outputs, None))
        if grads is not None and grads.numel():  # not a saved tensor: the first backward pass overwrites it
            ctx.grads = grads
        ctx.op = op
        return outputs[: op.values]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple:
        return None, None, None, None, *ctx.op.gradients(ctx, grad_outputs)


def scale_in_place(
    grads: Tensor, grad_loss: Tensor | None, grad_terms: Tensor | None = None, *, weights: Sequence[float]
) -> bool:
    """Scale the saved gradient in place if one factor is enough. Returns True if done; always False off the CPU.

    grad_terms: the gradient of each term. weights: those of the terms; one of weight 0 has no gradient.
    """
    first, *both = (gradient for gradient in (grad_loss, grad_terms) if gradient is not None)
    if first.device.type != "cpu":  # reading values would wait for the device
        return False
    given = (first + both[0] if both else first).flatten().tolist()
    factors = set(given if grad_terms is None else itertools.compress(given, weights))
    if factors <= {1.0}:
        return True
    if len(factors) > 1 or grads.dtype.itemsize < 4:  # 16 bits may have lost what a large factor would have kept
        return False
    grads.mul_(factors.pop())
    return True


def _flat(students: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (students,) if isinstance(students, Tensor) else tuple(students)


def _context(device: torch.device, on_gpu: bool) -> AbstractContextManager[object]:
    """The GPU is the current one; a closed form is outside of autocast, which would multiply matrices in 16 bits."""
    if on_gpu:
        return on_device(device)
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()


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
    of_torch = x is None or type(x) in (Tensor, torch.nn.Parameter)
    return not of_torch or x is not None and (x.is_meta or torch._C._functorch.is_legacy_batchedtensor(x))


def clone_if_inference(x: Tensor) -> Tensor:
    """x, or a copy if it was made in inference mode: autograd refuses to save such a tensor for a backward pass."""
    if torch.compiler.is_compiling() or not x.is_inference() or torch.is_inference_mode_enabled():
        return x
    return x.clone()


def acc_dtype(tensors: Iterable[Tensor | None]) -> torch.dtype:
    """The dtype of the computation: fp64 if a tensor is fp64, else fp32."""
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in tensors) else torch.float32


def _device_and_dtype(inputs: Any, saved: Tensors = ()) -> tuple[bool, torch.dtype]:
    """(does the Triton kernel compute this, dtype). It computes in fp32; fp64 goes to the closed form everywhere."""
    students = _flat(inputs[0])
    dtype = acc_dtype((*students, getattr(inputs, "teacher", None), *saved))
    return runs_on_gpu(students[0].device, dtype), dtype


def runs_on_gpu(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cuda" and dtype == torch.float32


def is_compiled_for_cpu(x: Tensor) -> bool:
    """True inside torch.compile on the CPU, where Inductor fuses a plain formula better than it calls an operator."""
    return torch.compiler.is_compiling() and x.device.type == "cpu"
