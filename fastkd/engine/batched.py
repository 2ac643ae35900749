"""What every layer of a step asks for, done for all layers in one launch: casts of weights, counters of BatchNorm.

Under autocast each convolution and linear layer casts its own weights, and the gradients back: two launches a layer.
Each BatchNorm counts its batches: another one. Within `batched(layers, dtype)` the layers find weights that were cast
together. Results keep their bits. The modules are as before after the block.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

CAST = (nn.Conv1d, nn.Conv2d, nn.Linear)  # exactly these: a subclass may compute with its weights outside of autocast
COUNTING = (nn.BatchNorm1d, nn.BatchNorm2d, BatchNormAct2d)


class Layers:
    """The layers of `net` for which `batched` works; `find` looks while the network runs.

    A layer that ran outside of autocast, or whose weights are not fp32, keeps its own casts.
    """

    def __init__(self, net: nn.Module):
        self.net = net
        self.inside: dict[nn.Module, bool] = {}  # did the layer always run under autocast
        norms = (module for module in net.modules() if type(module) in COUNTING)
        self.counting = [norm for norm in norms if norm.momentum is not None and norm.num_batches_tracked is not None]

    @contextmanager
    def find(self) -> Iterator[None]:
        """Note which layers run within the block, and how."""

        def note(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            enabled = torch.is_autocast_enabled(inputs[0].device.type)
            self.inside[layer] = self.inside.get(layer, True) and enabled

        layers = [layer for layer in self.net.modules() if type(layer) in CAST]
        hooks = [layer.register_forward_pre_hook(note) for layer in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def weights(self) -> list[tuple[nn.Module, str, Tensor]]:
        """(layer, name, weight) of all weights that autocast casts."""
        found = [(layer, name, p) for layer, inside in self.inside.items() if inside
                 for name, p in layer.named_parameters(recurse=False)]  # fmt: skip
        return [each for each in found if each[2].dtype == torch.float32]


@contextmanager
def batched(layers: Layers, dtype: torch.dtype) -> Iterator[None]:
    """Cast the layers' weights at the start of the block, and count BatchNorm's batches at its end.

    In between, an attribute of the instance hides the registered parameter or buffer.
    """
    weights, ran = layers.weights(), Counter[Tensor]()
    casts = _Cast.apply(dtype, *(p for *_, p in weights)) if weights else ()
    for (layer, name, _), cast in zip(weights, casts, strict=True):
        layer.__dict__[name] = cast
    for norm in layers.counting:
        norm.__dict__["num_batches_tracked"] = _Batches(norm.num_batches_tracked, ran)
    try:
        yield
    finally:
        for layer, name, _ in weights:
            del layer.__dict__[name]
        for norm in layers.counting:
            del norm.__dict__["num_batches_tracked"]
    if ran:
        torch._foreach_add_(list(ran), list(ran.values()))


class _Batches:
    """Stands for a BatchNorm's counter in its forward: notes that the layer ran."""

    def __init__(self, counter: Tensor, ran: Counter[Tensor]):
        self.counter, self.ran = counter, ran

    def add_(self, batches: int) -> None:
        self.ran[self.counter] += batches


class _Cast(torch.autograd.Function):
    """fp32 weights -> the same in `dtype`; gradients come back in fp32. One launch each way."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        casts = [torch.empty_like(weight, dtype=dtype) for weight in weights]
        torch._foreach_copy_(casts, weights)
        ctx.set_materialize_grads(False)  # a layer that a path leaves out gets no gradient
        return tuple(casts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        given = [grad for grad in grads if grad is not None]
        wide = [torch.empty_like(grad, dtype=torch.float32) for grad in given]
        torch._foreach_copy_(wide, given)
        rest = iter(wide)
        return None, *(None if grad is None else next(rest) for grad in grads)
