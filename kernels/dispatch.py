"""When an operation may be computed at once, past torch's dispatcher."""

import torch
from torch import Tensor


def plain(tensors: tuple[Tensor, ...]) -> bool:
    """Nobody watches: no compiler, no dispatch mode, no function transform, no tensor subclass.

    Then an op's function is called as it is, which saves 20 to 60 us of host time per call. Else the registered op is,
    so that compilers and captures see it.
    """
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in tensors)
    )
