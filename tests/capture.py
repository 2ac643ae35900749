"""An imitation of a CUDA graph for machines without a GPU, exact where it matters.

`with Capture() as graph:` runs and records every ATen and custom op with its arguments and results. `graph.replay()`
runs the same calls on the same tensors, below autograd, and puts each result where the recorded one lies. Python does
not run again: a learning rate that was a Python float, a choice made by the host, an input that is not copied into its
static buffer show up as wrong numbers. An op that would ask the GPU a question is an error, as in a real capture.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FORBIDDEN = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select", "allclose", "bincount")
FORBIDDEN += ("_unique2", "unique_dim", "unique_consecutive", "repeat_interleave")


class Capture(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masked = name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        if name in FORBIDDEN or masked:
            raise RuntimeError(f"host sync: {func} asks the device a question, which a captured graph cannot")
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    @property
    def names(self) -> list[str]:
        return [str(func) for func, *_ in self.calls]

    def replay(self) -> None:
        with torch.no_grad(), torch._C._AutoDispatchBelowAutograd(), torch._C._DisableAutocast():
            for func, args, kwargs, result in self.calls:
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.detach().copy_(new)
