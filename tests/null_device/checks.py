"""What is checked of a step while it runs: where its tensors are, and the layout of its convolutions."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FORWARD = ("convolution", "cudnn_convolution", "cudnn_convolution_relu", "cudnn_convolution_add_relu")


@contextmanager
def no_host_sync() -> Iterator[None]:
    """Within the block, an operation that waits for the device raises (torch's own check)."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Watch(TorchDispatchMode):
    """Records, of the operations of a block and of their backward, tensors on the CPU and lost channels-last layouts.

    `convolutions` counts those seen: with none of them nothing was checked.
    """

    def __init__(self) -> None:
        super().__init__()
        self.on_cpu: set[str] = set()
        self.layouts: set[str] = set()
        self.convolutions = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
        if any(x.device.type == "cpu" for x in tensors):
            self.on_cpu.add(str(func))
        name = func.overloadpacket.__name__
        if name in FORWARD:
            self._check(name, input=args[0], weight=args[1])
        if name == "convolution_backward":
            self._check(name, grad_output=args[0], input=args[1], weight=args[2], grad_weight=result[1])
        return result

    def _check(self, name: str, **tensors: Tensor | None) -> None:
        self.convolutions += 1
        for role, x in tensors.items():
            if x is not None and not x.is_contiguous(memory_format=torch.channels_last):
                self.layouts.add(f"{name}: {role} {tuple(x.shape)} with strides {x.stride()}")
