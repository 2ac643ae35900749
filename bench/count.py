"""What a step asks of the machine: operators or kernels, host syncs, convolutions in the slow layout, memory."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastkd.bench.clock import Work, kernels

QUESTIONS = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select", "allclose", "bincount")
QUESTIONS += ("_unique2", "unique_dim", "unique_consecutive", "repeat_interleave")
FREE = ("view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "split", "unbind", "detach")
FREE += ("alias", "as_strided", "unsqueeze", "squeeze", "reshape", "split_with_sizes", "lift_fresh", "_reshape_alias")


class Counter(TorchDispatchMode):
    """Operators that compute something, forward and backward; one of fastkd counts as one, as it does on CUDA."""

    def __init__(self):
        super().__init__()
        self.operators, self.syncs, self.convolutions, self.slow = 0, 0, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, result = func.overloadpacket.__name__, func(*args, **(kwargs or {}))
        self.operators += name not in FREE
        self.syncs += name in QUESTIONS or _by_mask(name, args)
        if "convolution" in name:
            maps = [x for x in tree_leaves((args, result)) if isinstance(x, Tensor) and x.dim() == 4]
            self.convolutions += 1
            self.slow += not all(x.is_contiguous(memory_format=torch.channels_last) for x in maps)
        return result


def _by_mask(name: str, args: tuple) -> bool:
    indices = args[1] if name in ("index", "index_put", "index_put_") else ()
    return any(i is not None and i.dtype == torch.bool for i in indices)


def counted(step: Callable[[], None]) -> Counter:
    """Of one call of `step`."""
    with Counter() as counter:
        step()
    return counter


def per_step(step: Callable[[], None], steps: int, device: torch.device) -> dict[str, float]:
    """Means over the `steps` that `step()` makes: kernels and syncs on CUDA, operators and syncs on the CPU.

    On the CPU not of what is compiled: torch runs that eagerly while somebody counts.
    """
    if device.type == "cuda":
        found = {"kernels": kernels(Work(lambda: None, lambda _: step())), "syncs": cuda_syncs(step)}
    else:
        counter = counted(step)
        found = {"operators": counter.operators, "syncs": counter.syncs}
    return {name: number / steps for name, number in found.items()}


def cuda_syncs(step: Callable[[], None]) -> int:
    """How often torch itself says that the host waited for the device."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in said)
