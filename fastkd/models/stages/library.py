"""Where the stages of networks without a family of their own end, by the names of modules.

timm names the modules at which the resolution changes, in `feature_info`. For torchvision's there is a table. In
networks of transformers the layers are a list, and an image shows where the resolution changes. Stages are those of the
last four resolutions: what comes before is the stem. A network of one resolution (ViT, Mixer) has four stages of
equally many blocks.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..sizes import image_size_of, probe
from .layout import layout_of

STAGES = 4
LISTED = {  # the modules that end the stages, by the class of the network
    # without the last norm: a ReLU overwrites its output
    "torchvision.models.densenet.DenseNet": " ".join(f"features.denseblock{k}" for k in (1, 2, 3, 4)),
    "torchvision.models.googlenet.GoogLeNet": "conv3 inception3b inception4e inception5b",
    "torchvision.models.inception.Inception3": "Conv2d_4a_3x3 Mixed_5d Mixed_6e Mixed_7c",
    "torchvision.models.maxvit.MaxVit": "blocks.0 blocks.1 blocks.2 blocks.3",
    "torchvision.models.mnasnet.MNASNet": "layers.8 layers.9 layers.11 layers.13",
    "torchvision.models.shufflenetv2.ShuffleNetV2": "stage2 stage3 conv5",
    "torchvision.models.swin_transformer.SwinTransformer": "features.1 features.3 features.5 features.7",
    "timm.models.hrnet.HighResolutionNet": "layer1 final_layer",  # between them several maps pass side by side
}


class Ends(NamedTuple):
    """Modules by name: where the first stage begins, and where each stage ends."""

    first: str
    names: list[str]


def library_stages(model: nn.Module) -> Ends | None:
    """The stages of a network of timm, torchvision or transformers; None if they are not known."""
    module, name = type(model).__module__, type(model).__name__
    listed = LISTED.get(f"{module}.{name}")
    if listed is not None:
        return _last_of_each(list(enumerate(listed.split())))
    if f"{module}.{name}" == "torchvision.models.vision_transformer.VisionTransformer":
        blocks = model.get_submodule("encoder.layers").named_children()
        return _last_of_each([(0, f"encoder.layers.{child}") for child, _ in blocks])
    if isinstance(getattr(model, "feature_info", None), list):
        return _of_timm(model)
    return _of_a_list(model) if hasattr(model, "config") else None


def widened(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Every name replaced by the outermost module around it that holds no other of the names.

    timm's names may lie within a block, beside its shortcut, where a network cannot be cut (Xception).
    """
    result = []
    for name in names:
        parts = name.split(".")
        around = [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]
        alone = [outer for outer in around if sum(other.startswith(outer + ".") for other in names) <= (outer != name)]
        result.append(alone[0])
    return result


def _of_timm(model: Any) -> Ends | None:
    known = {name for name, _ in model.named_modules()}
    infos = [(info["reduction"], info["module"]) for info in model.feature_info]
    return _last_of_each([(reduction, name) for reduction, name in infos if name in known])


def _of_a_list(model: nn.Module) -> Ends | None:
    """The layers of the first list of two modules or more that all run in a forward pass."""
    for name, layers in model.named_modules():
        if isinstance(layers, nn.ModuleList) and len(layers) > 1:
            names = [f"{name}.{i}" for i in range(len(layers))]
            heights = _heights(model, names)
            return _last_of_each(list(zip(heights, names, strict=True))) if heights else None
    return None


def _heights(model: nn.Module, names: list[str]) -> list[int] | None:
    """The heights of the maps of these modules for one image; None if they do not all give maps or tokens."""
    seen: dict[str, int] = {}
    layout = layout_of(model)

    def keep(name: str, output: Tensor | tuple[Tensor, ...]) -> None:
        seen[name] = layout.map(output if isinstance(output, Tensor) else output[0]).shape[2]

    def hook(name: str) -> Any:
        return lambda module, args, output: keep(name, output)

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        probe(model, [model], image_size_of(model))
    finally:
        for handle in handles:
            handle.remove()
    return [seen[name] for name in names] if len(seen) == len(names) else None


def _last_of_each(modules: list[tuple[int, str]]) -> Ends | None:
    """`modules`: the resolution and the name of each, in forward order. A single resolution gives equal stages."""
    groups = [[name for _, name in group] for _, group in groupby(modules, key=lambda module: module[0])]
    if len(groups) == 1:
        names, count = groups[0], min(STAGES, len(groups[0]))
        return Ends(names[0], [names[len(names) * k // count - 1] for k in range(1, count + 1)])
    kept = groups[-STAGES:]
    return Ends(kept[0][0], [group[-1] for group in kept]) if kept else None
