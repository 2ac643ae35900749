"""Networks by name, their weights, and their stages."""

import os
import re
from pathlib import Path

from torch import nn

from ..errors import UserError, nearest
from .nets.mobilenet import CifarMobileNet
from .nets.mobilenetv2 import CifarMobileNetV2
from .nets.resnet import DEPTHS, WIDTHS_X4, CifarResNet
from .nets.vgg import CONVOLUTIONS, CifarVGG
from .nets.wrn import WideResNet
from .stages.preactivation import PreActivation
from .stages.shapes import stage_shapes
from .stages.staged import Staged, name_stages, staged
from .weights import SUFFIXES, load_weights, read_state_dict
from .zoo import timm_model, torchvision_model

__all__ = [
    "PreActivation",
    "Staged",
    "create_model",
    "load_weights",
    "model_names",
    "name_stages",
    "read_state_dict",
    "stage_shapes",
    "staged",
]

X4_DEPTHS = {"resnet8x4": 8, "resnet32x4": 32}
WIDE = ("wrn_16_1", "wrn_16_2", "wrn_28_2", "wrn_28_10", "wrn_40_1", "wrn_40_2")  # listed; any wrn_D_K can be built


def create_model(name: str, num_classes: int, weights: str | os.PathLike | None = None) -> nn.Module:
    """A network for images [N, 3, H, W] and `num_classes` classes, fp32, on the CPU, in train mode.

    `name`: one of `model_names()`, any `wrn_D_K`, `timm/<name>` or `torchvision/<name>`. `weights`: a file (see
    `read_state_dict`), "pretrained" for the library's default weights, or the tag of other weights: timm's (also as
    part of the name, `timm/resnet50.a1_in1k`) or torchvision's (`IMAGENET1K_V2`). A file overrides a tag in the name.
    Raises UserError for unknown names and weights, for pre-trained weights of another number of classes, and when a
    download fails.
    """
    if not isinstance(num_classes, int) or num_classes < 1:
        raise UserError(f"num_classes is {num_classes!r}: a net needs at least one class")
    file = weights if weights is not None and _is_file(weights) else None
    tag = None if file is not None or weights is None else str(weights)
    model = _build(name, num_classes, tag, from_file=file is not None)
    if file is not None:
        load_weights(model, file)
    return model


def model_names() -> list[str]:
    """The names of the networks in `nets/`."""
    resnets = [f"resnet{depth}" for depth in DEPTHS]
    return [*resnets, *X4_DEPTHS, *WIDE, *CONVOLUTIONS, "mobilenet", "mobilenetv2"]


def _is_file(weights: str | os.PathLike) -> bool:
    """True for a path object, a name with a separator or a known suffix, and the name of an existing file."""
    text = os.fspath(weights)
    return not isinstance(weights, str) or os.sep in text or text.endswith(SUFFIXES) or Path(text).is_file()


def _build(name: str, num_classes: int, tag: str | None, from_file: bool) -> nn.Module:
    """`from_file`: the weights come from a file, so a tag in the name is not used."""
    library, slash, rest = name.partition("/")
    if library == "timm" and slash:
        return timm_model(rest.partition(".")[0] if from_file else rest, num_classes, tag)
    if library == "torchvision" and slash:
        return torchvision_model(rest, num_classes, tag)
    if slash:
        raise UserError(f"unknown model library {library!r} in {name!r}{nearest(library, ['timm', 'torchvision'])}")
    model = _cifar_net(name, num_classes)
    if tag is not None:
        raise UserError(f"{tag!r} is not a file, and {name!r} has no pre-trained weights: pass a weights file")
    return model


def _cifar_net(name: str, num_classes: int) -> nn.Module:
    if name in X4_DEPTHS:
        return CifarResNet(X4_DEPTHS[name], num_classes, WIDTHS_X4)
    if name in CONVOLUTIONS:
        return CifarVGG(CONVOLUTIONS[name], num_classes)
    if name in ("mobilenet", "mobilenetv2"):
        return CifarMobileNet(num_classes) if name == "mobilenet" else CifarMobileNetV2(num_classes)
    if name in model_names() and name.startswith("resnet"):
        return CifarResNet(int(name.removeprefix("resnet")), num_classes)
    if wide := re.fullmatch(r"wrn_(\d+)_([1-9]\d*)", name):
        return _wide(name, int(wide[1]), int(wide[2]), num_classes)
    ours = ", ".join(model_names())
    raise UserError(f"unknown model {name!r}{_hint(name)}: ours are {ours}; else 'timm/NAME' or 'torchvision/NAME'")


def _wide(name: str, depth: int, width: int, num_classes: int) -> nn.Module:
    if depth < 10 or (depth - 4) % 6:
        near = max(10, 4 + 6 * round((depth - 4) / 6))
        raise UserError(f"unknown model {name!r} (did you mean 'wrn_{near}_{width}'?): the depth in wrn_D_K is 6n + 4")
    return WideResNet(depth, width, num_classes)


def _hint(name: str) -> str:
    """The torchvision network of that name, if there is one: by spelling, resnet50 would be close to resnet56."""
    from torchvision import models

    if name in models.list_models(module=models):
        return f" (did you mean 'torchvision/{name}'?)"
    return nearest(name, model_names())
