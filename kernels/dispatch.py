"""How an operation is computed: in which dtype, outside autocast, and when at once, past torch's dispatcher."""

import functools

import torch
from torch import Tensor

_PLAIN = {Tensor, torch.nn.Parameter, type(None)}


def plain(tensors: tuple[Tensor | None, ...]) -> bool:
    """Nobody watches: no compiler, no dispatch mode, no function transform, no tensor subclass.

    Then an op's function is called as it is, which saves 20 to 60 us of host time per call. Else the registered op is,
    so that compilers and captures see it.
    """
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and _PLAIN.issuperset(map(type, tensors))
    )


def savable(x: Tensor) -> Tensor:
    """x, or a copy of what was made in inference mode: autograd refuses to keep that for a backward pass."""
    if torch.compiler.is_compiling() or not x.is_inference() or torch.is_inference_mode_enabled():
        return x
    return x.clone()


def taken(ctx) -> Tensor | None:
    """The gradients that the forward pass left: for the first backward, which may write them, and for no second one.

    None under compiled autograd, whose ctx is a copy of the real one, so that a second backward would find them again.
    """
    grads, ctx.grads = ctx.grads, None
    return None if torch.compiler.is_compiling() else grads


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
