"""Casts of weights, and counters and statistics of BatchNorm, for all layers of a step: in one launch each.

Under autocast each convolution and linear layer casts its own weights, and the gradients back: two launches a layer.
Each BatchNorm counts its batches: another one. `BatchedLayers` notes in one step which layers do this. In later steps
they find weights that were cast together, and no counter. Results keep their bits, unless something else reads these
weights during the step: it finds the cast ones.
"""

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .exchange import ALIGNMENT

CAST = (nn.Conv1d, nn.Conv2d, nn.Linear)  # exactly these: a subclass may compute with its weights outside of autocast
NAMES = {"weight", "bias"}  # with other parameters, a hook makes the weight: spectral and weight norm
NORMS = ("BatchNorm1d", "BatchNorm2d", "BatchNormAct2d")  # of torch and timm


def join_buffers(net: nn.Module, device: torch.device) -> Tensor:
    """One tensor of which the float32 buffers of `net` become views: one launch saves or restores all of them.

    A batch that holds an infinity makes BatchNorm's running means NaN for good, even if the weights are not updated.
    So a skipped step restores the statistics too.
    Move `net` to its device first: `to()` would give it separate buffers again, which the tensor does not see. It has
    no elements if there are no such buffers.
    """
    places = [
        (module, name, buffer)
        for module in net.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and buffer.dtype == torch.float32 and buffer.numel()
    ]
    sizes = [-(-buffer.numel() // ALIGNMENT) * ALIGNMENT for *_, buffer in places]
    joined = torch.zeros(sum(sizes), device=device)
    for (module, name, buffer), block in zip(places, joined.split(sizes), strict=True):
        module._buffers[name] = block[: buffer.numel()].view(buffer.shape).copy_(buffer)
    return joined


class BatchedLayers:
    """The layers of `net`. Steps of one `kind` run the same layers."""

    def __init__(self, net: nn.Module):
        self.net = net
        self.inside: dict[nn.Module, bool] = {}  # did the layer always run under autocast
        self.batches: dict[Hashable, Counter[Tensor]] = defaultdict(Counter)  # by kind and counter: runs in a step

    @contextmanager
    def record(self, kind: Hashable) -> Iterator[None]:
        """Note the layers that run within the block, which is a step."""
        self.batches[kind].clear()

        def cast(layer: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            enabled = torch.is_autocast_enabled((*inputs, *named.values())[0].device.type)
            self.inside[layer] = self.inside.get(layer, True) and enabled

        def count(norm: Any, _: Any) -> None:
            if norm.training and norm.num_batches_tracked is not None:  # hidden while a block is recomputed
                self.batches[kind][norm.num_batches_tracked] += 1

        layers = [layer for layer in self.net.modules() if type(layer) in CAST and layer._parameters.keys() <= NAMES]
        hooks = [layer.register_forward_pre_hook(cast, with_kwargs=True) for layer in layers]
        hooks += [norm.register_forward_pre_hook(count) for norm in self._norms()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def apply(self, kind: Hashable, dtype: torch.dtype) -> Iterator[None]:
        """Around a step: cast its weights at the start, count its batches at the end.

        In between, an attribute of the instance hides the registered parameter or buffer.
        """
        weights, counters = self._weights() if dtype != torch.float32 else [], self.batches[kind]
        casts = _Cast.apply(dtype, *(p for *_, p in weights)) if weights else ()
        norms = [norm for norm in self._norms() if norm.num_batches_tracked in counters]
        try:
            for (layer, name, _), cast in zip(weights, casts, strict=True):
                layer.__dict__[name] = cast
            for norm in norms:
                norm.__dict__["num_batches_tracked"] = None
            yield
        finally:
            for layer, name, _ in weights:
                layer.__dict__.pop(name, None)
            for norm in norms:
                norm.__dict__.pop("num_batches_tracked", None)
        if counters:
            torch._foreach_add_(list(counters), list(counters.values()))

    def _weights(self) -> list[tuple[nn.Module, str, Tensor]]:
        """(layer, name, weight) of all fp32 weights that autocast casts, and that learn."""
        found = [(layer, name, p) for layer, inside in self.inside.items() if inside
                 for name, p in layer.named_parameters(recurse=False)]  # fmt: skip
        return [each for each in found if each[2].dtype == torch.float32 and each[2].requires_grad]

    def _norms(self) -> list[Any]:
        """Those whose forward needs no counter: with `momentum` None it is a factor."""
        norms = [module for module in self.net.modules() if type(module).__name__ in NORMS]
        return [norm for norm in norms if norm.momentum is not None and norm.num_batches_tracked is not None]


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
