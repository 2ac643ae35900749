"""How an operation is computed: in which dtype, outside autocast, and when at once, past torch's dispatcher."""

import functools

import torch
from torch import Tensor


def plain(tensors: tuple[Tensor | None, ...]) -> bool:
    """Nobody watches: no compiler, no dispatch mode, no function transform, no special tensor.

    Then an op's function is called as it is, which saves 20 to 60 us of host time per call. Else the registered op is,
    so that compilers and captures see it.
    """
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


def savable(x: Tensor) -> Tensor:
    """x, or a copy of what was made in inference mode: autograd refuses to keep that for a backward pass."""
    if torch.compiler.is_compiling() or not x.is_inference() or torch.is_inference_mode_enabled():
        return x
    return x.clone()


def taken(ctx, gradients: tuple[Tensor | None, ...]) -> Tensor | None:
    """The gradients that the forward pass left: for the first backward, which may write them, and for no second one.

    gradients: what comes from above. None where the same call may find what it has written: under compiled autograd,
    whose ctx is a copy of the real one, and where special tensors from above run an operator several times.
    """
    grads, ctx.grads = ctx.grads, None
    return None if torch.compiler.is_compiling() or any(map(_special, gradients)) else grads


def accumulator(tensors: list[Tensor]) -> torch.dtype:
    """fp64 where a tensor is fp64, else fp32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def without_autocast(function):
    """An op's body runs under the caller's autocast, which would multiply matrices in 16 bits."""

    @functools.wraps(function)
    def wrapped(logits, *args, **kwargs):
        device = (logits if isinstance(logits, Tensor) else logits[0]).device.type
        if not torch.is_autocast_enabled(device):
            return function(logits, *args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(logits, *args, **kwargs)

    return wrapped
