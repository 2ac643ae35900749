"""Networks by name, their weights, and their stages."""

import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import nn

from ..errors import UserError, nearest
from .checkpoint_files import FOLDER_FILES, SUFFIXES, UNFINISHED, read_state_dict
from .classifier import classifiers_of, reorder_classes
from .ensemble import Ensemble
from .kwargs import Kwargs, KwargsOfFile
from .library_names import check_torchvision_name, timm_architecture
from .nets.mobilenet import CifarMobileNet, CifarMobileNetV2
from .nets.resnet import DEPTHS, WIDTHS_X4, CifarResNet, CifarResNet50, WideResNet
from .nets.shufflenet import CifarShuffleNetV1, CifarShuffleNetV2
from .nets.vgg import CONVOLUTIONS, CifarVGG
from .sizes import blaming_size, check_image_size, note_name
from .stages.preactivation import PreActivation
from .stages.staged import Staged, name_stages, stage_shapes, staged, tapped
from .weights import copy_weights, layout_note_of, load_weights, new_classifier_of
from .zoo import NO_KWARGS, drop_auxiliary, hf_model, timm_model, torchvision_model, without_auxiliary

__all__ = [
    "Ensemble",
    "PreActivation",
    "Staged",
    "check_name",
    "classifiers_of",
    "create_model",
    "is_weights_file",
    "layout_note_of",
    "load_weights",
    "model_names",
    "name_stages",
    "new_classifier_of",
    "read_state_dict",
    "reorder_classes",
    "stage_shapes",
    "staged",
    "tapped",
]

WIDE = ((16, 1), (16, 2), (28, 2), (28, 10), (40, 1), (40, 2))  # those that are listed; any wrn_D_K can be built
CIFAR_NETS: dict[str, Callable[[int], nn.Module]] = {
    **{f"resnet{depth}": partial(CifarResNet, depth) for depth in DEPTHS},
    **{f"resnet{depth}x4": partial(CifarResNet, depth, widths=WIDTHS_X4) for depth in (8, 32)},
    **{f"wrn_{depth}_{width}": partial(WideResNet, depth, width) for depth, width in WIDE},
    **{name: partial(CifarVGG, convolutions) for name, convolutions in CONVOLUTIONS.items()},
    "mobilenet": CifarMobileNet,
    "mobilenetv2": CifarMobileNetV2,
    "cifar_resnet50": CifarResNet50,
    "shufflenet_v1": CifarShuffleNetV1,
    "shufflenet_v2": CifarShuffleNetV2,
}
NAMES_ELSEWHERE = {  # of RepDistiller and mdistiller, in small letters, by our names; "-" counts as "_"
    "shufflev1": "shufflenet_v1",
    "shufflev2": "shufflenet_v2",
    "shufflenetv1": "shufflenet_v1",
    "shufflenetv2": "shufflenet_v2",
    "mobile_half": "mobilenetv2",
}


def create_model(
    name: str,
    num_classes: int,
    weights: str | os.PathLike | None = None,
    *,
    image_size: int | None = None,
    new_classifier: bool = False,
    kwargs: Kwargs = NO_KWARGS,
) -> nn.Module:
    """A network for images [N, 3, H, W] and `num_classes` classes, fp32, on the CPU, in train mode.

    `name`: one of `model_names()`, any `wrn_D_K`, `timm/<name>`, `torchvision/<name>`, or `hf/<name or folder>` for
    transformers' networks. `weights`: a file or folder (see `read_state_dict`), "pretrained" for the library's default
    weights, or the tag of other weights: timm's (also as part of the name, `timm/resnet50.a1_in1k`) or torchvision's
    (`IMAGENET1K_V2`). A file overrides a tag in the name. `image_size`: the height and width of the images. Networks of
    a fixed size are made for it, and one image of it is tried. The network returns logits alone: auxiliary heads of
    GoogLeNet and Inception are dropped.
    With `new_classifier`, weights of another number of classes are taken too: the classifier keeps its initial values,
    and `new_classifier_of(net)` names its keys. Every other key must match exactly.
    `kwargs`: arguments of the constructor of a network of timm or torchvision, such as {"drop_path_rate": 0.1}.
    Raises UserError for unknown names, weights and arguments, for weights of another number of classes, for an image
    size that the network cannot take, and when a download fails.
    """
    if not isinstance(num_classes, int) or num_classes < 1:
        raise UserError(f"num_classes is {num_classes!r}: a net needs at least one class")
    file = weights if weights is not None and is_weights_file(weights) else None
    tag = None if file is not None or weights is None else str(weights)
    state = None
    if file is not None and kwargs:
        state = read_state_dict(file)
        kwargs = KwargsOfFile(kwargs, state, str(file))

    def at_random(size: int) -> nn.Module:
        plain = name.partition(".")[0] if name.startswith("timm/") else name
        return _network(plain, num_classes, None, size, None, kwargs=kwargs)

    with blaming_size(name, image_size, at_random):
        model = _network(name, num_classes, tag, image_size, file, new_classifier, kwargs)
    note_name(model, name, kwargs)
    if file is not None:
        state = read_state_dict(file) if state is None else state
        copy_weights(model, without_auxiliary(name, state), str(file), new_classifier)
    drop_auxiliary(model)
    if image_size is not None:
        check_image_size(model, name, image_size, at_random)
    return model


def _network(
    name: str,
    num_classes: int,
    tag: str | None,
    size: int | None,
    file: str | os.PathLike | None,
    new_classifier: bool = False,
    kwargs: Kwargs = NO_KWARGS,
) -> nn.Module:
    """The network as its library makes it, with the weights of `tag` but without those of `file`."""
    library, slash, rest = name.partition("/")
    if kwargs and library not in ("timm", "torchvision"):
        raise UserError(
            f"{name} takes no arguments ({', '.join(kwargs)}): they are for networks of timm and torchvision; drop them"
        )
    if not slash:
        if tag is not None:
            raise UserError(f"{tag!r} is not a file, and {name!r} has no pre-trained weights: pass a weights file")
        return _cifar_net(name)(num_classes)
    if library == "timm":
        rest = rest if file is None else rest.partition(".")[0]
        return timm_model(rest, num_classes, tag, size, new_classifier, kwargs)
    if library == "torchvision":
        return torchvision_model(rest, num_classes, tag, size, new_classifier, kwargs)
    if library == "hf":
        return hf_model(rest, num_classes, tag, size, new_classifier)
    raise _unknown_library(library, name)


def _unknown_library(library: str, name: str) -> UserError:
    return UserError(f"unknown model library {library!r} in {name!r}{nearest(library, ['timm', 'torchvision', 'hf'])}")


def check_name(name: str) -> None:
    """Raise UserError if there is no network of this name. None is built, and the names of `hf/` are not looked up."""
    library, slash, rest = name.partition("/")
    if not slash:
        _cifar_net(name)
    elif library == "timm":
        timm_architecture(rest)
    elif library == "torchvision":
        check_torchvision_name(rest)
    elif library != "hf":
        raise _unknown_library(library, name)


def model_names() -> list[str]:
    """The names of the networks in `nets/`."""
    return list(CIFAR_NETS)


def is_weights_file(weights: str | os.PathLike) -> bool:
    """True for a path object, a name with a separator or a known suffix, and a name of a file or a folder of weights.

    The folder of a run that is not finished counts too: its error names the best state so far. Any other folder does
    not hide "pretrained", or a tag, of the same name.
    """
    text = os.fspath(weights)
    if not isinstance(weights, str) or os.sep in text or text.endswith(SUFFIXES):
        return True
    return os.path.isfile(text) or any(os.path.isfile(Path(text) / name) for name in (*FOLDER_FILES, UNFINISHED))


def _cifar_net(name: str) -> Callable[[int], nn.Module]:
    """What makes the network for a number of classes. Raises UserError for an unknown name."""
    if name in CIFAR_NETS:
        return CIFAR_NETS[name]
    wide = re.fullmatch(r"wrn_(\d+)_([1-9]\d*)", name)
    if wide is None:
        from torchvision import models

        plain = name.lower().replace("-", "_")
        ours_there = NAMES_ELSEWHERE.get(plain, plain if plain in CIFAR_NETS else "")
        hint = f" (did you mean {ours_there!r}?)" if ours_there else nearest(name, CIFAR_NETS)
        if name == "ResNet50":  # so called there
            hint = " (did you mean 'cifar_resnet50'?)"
        elif name in models.list_models(module=models):  # by spelling, resnet50 would be close to resnet56
            hint = f" (did you mean 'torchvision/{name}'?)"
        ours = ", ".join(CIFAR_NETS)
        raise UserError(
            f"unknown model {name!r}{hint}: ours are {ours}; else 'timm/NAME', 'torchvision/NAME' or 'hf/NAME'"
        )
    depth, width = int(wide[1]), int(wide[2])
    if depth < 10 or (depth - 4) % 6:
        near = max(10, 4 + 6 * round((depth - 4) / 6))
        raise UserError(f"unknown model {name!r} (did you mean 'wrn_{near}_{width}'?): the depth in wrn_D_K is 6n + 4")
    return partial(WideResNet, depth, width)
