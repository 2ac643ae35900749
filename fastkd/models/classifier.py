"""The layer of a network that makes the logits: where it is, and how its classes are put into another order."""

from collections.abc import Sequence

import torch
from torch import nn

from ..errors import UserError

# Two classifiers whose logits are added: networks distilled by a token of its own, in timm and in Hugging Face's
# transformers, and VOLO, which adds logits of its patches.
PAIRS = (("head", "head_dist"), ("cls_classifier", "distillation_classifier"), ("head", "aux_head"))


def classifiers_of(net: nn.Module) -> dict[str, nn.Module]:
    """The layers whose outputs are the logits, by their dotted names in `net`: linear layers or 1x1 convolutions.

    Networks of timm name theirs by `get_classifier`. Distilled DeiT and LeViT, and VOLO, have two. In
    any other network it is the last layer that has weights. Raises UserError if that layer is of another kind, or if
    the layers differ in their number of classes.
    """
    names = {module: name for name, module in net.named_modules()}
    layers = [layer for layer in map(_last_layer, _roots(net)) if isinstance(layer, nn.Module)]
    found = {names[layer]: layer for layer in layers if _makes_classes(layer)}
    if not found or len({count_classes(layer) for layer in found.values()}) > 1:
        last = _last_layer(net)
        ends = (
            f"ends with {names[last]!r}, a {type(last).__name__}" if last is not None else "has no layer with weights"
        )
        raise UserError(
            f"the classifier of this {type(net).__name__} cannot be found: it {ends}, and a linear layer or a 1x1 "
            "convolution was expected; give weights of the same number of classes"
        )
    return found


def classifier_keys(net: nn.Module) -> list[str]:
    """The keys of the classifiers' weights and biases in the state dict of `net`."""
    return [
        f"{name}.{key}" if name else key for name, layer in classifiers_of(net).items() for key in layer.state_dict()
    ]


def count_classes(layer: nn.Module) -> int:
    """The number of classes of a classifier: the rows of its weight."""
    return len(layer.weight)  # type: ignore[arg-type]


def reorder_classes(net: nn.Module, order: Sequence[int]) -> None:
    """Put the logits of `net` into another order, in place: its new logit i is the old logit `order[i]`.

    Raises UserError if `order` is not a permutation of the classes.
    """
    layers = classifiers_of(net).values()
    classes = count_classes(next(iter(layers)))
    if sorted(order) != list(range(classes)):
        raise UserError(f"the order of the classes must hold each of 0 to {classes - 1} once, got {list(order)[:20]}")
    with torch.no_grad():
        for layer in layers:
            for tensor in layer.state_dict().values():
                tensor.copy_(tensor[torch.tensor(order, device=tensor.device)].clone())


def _roots(net: nn.Module) -> list[nn.Module]:
    """The parts of `net` whose last layers make the logits."""
    for module in net.modules():
        for names in PAIRS:
            parts = [part for name in names if isinstance(part := getattr(module, name, None), nn.Module)]
            if len(parts) == len(names) and all(map(_last_layer, parts)):
                return parts
    ask = getattr(net, "get_classifier", None)
    if ask is None:
        return [net]
    answer = ask()
    return list(answer) if isinstance(answer, (tuple, list, nn.ModuleList)) else [answer]


def _last_layer(root: nn.Module) -> nn.Module | None:
    """The last module of `root` that has parameters of its own."""
    return next(
        (m for m in reversed(list(root.modules())) if next(m.parameters(recurse=False), None) is not None), None
    )


def _makes_classes(layer: nn.Module) -> bool:
    """True for a linear layer and a 1x1 convolution: each row of the weight, [classes, ...], makes one logit."""
    if isinstance(layer, nn.Conv2d):
        return layer.kernel_size == (1, 1) and layer.groups == 1
    return isinstance(layer, nn.Linear)
