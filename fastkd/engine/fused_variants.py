"""Which calls each fused convolution of a teacher is made of: the fastest on its own input."""

from collections import Counter
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from .fuse_conv_bn import FusedConvolution
from .timing import time_calls

CALLS = 4  # of a layer in one graph: one alone takes as long as the launch of a graph


@torch.no_grad()
def choose_variants(sequence: Sequence[nn.Module], images: Tensor) -> None:
    """Time every variant of every fused convolution on its input, and keep the fastest. Equal layers are timed once."""
    known: dict[tuple, str] = {}

    def choose(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(module, FusedConvolution)
        c = module.convolution
        layer = (c.weight.shape, c.bias is None, c.stride, c.padding, c.dilation, c.groups)
        key = (*layer, *((x.shape, x.stride()) for x in inputs))
        if key not in known:
            known[key] = _fastest(module, inputs)
        module.variant = known[key]

    layers = [layer for module in sequence for layer in module.modules() if isinstance(layer, FusedConvolution)]
    hooks = [layer.register_forward_pre_hook(choose) for layer in layers]
    try:
        for module in sequence:
            images = module(images)
    finally:
        for hook in hooks:
            hook.remove()


def _fastest(layer: FusedConvolution, inputs: tuple[Tensor, ...]) -> str:
    calls, problem = {}, None
    for variant in layer.variants(*inputs):
        calls[variant] = partial(_run, layer, variant, inputs)
        try:
            calls[variant]()
        except RuntimeError as error:  # cuDNN and oneDNN do not know every layer
            del calls[variant]
            problem = error
    if not calls:
        raise RuntimeError("no variant of a convolution runs") from problem
    times = time_calls(calls, inputs[0].device, CALLS)
    return min(calls, key=lambda variant: times[variant].milliseconds)


def _run(layer: FusedConvolution, variant: str, inputs: tuple[Tensor, ...]) -> Tensor:
    layer.variant = variant
    return FusedConvolution.forward(layer, *inputs)  # without the hooks


def count_variants(net: nn.Module | None) -> str:
    """How many fused convolutions run in each variant, for the log; empty if there are none."""
    layers = [layer for layer in net.modules() if isinstance(layer, FusedConvolution)] if net is not None else []
    counts = Counter(layer.variant for layer in layers)
    return f"; convolutions: {', '.join(f'{n} {name}' for name, n in counts.items())}" if counts else ""
