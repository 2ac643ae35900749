"""Networks of timm and torchvision by name. Partial loading is an error."""

from collections.abc import Callable
from importlib import import_module
from types import ModuleType

from torch import nn

from ..errors import UserError, nearest
from .weights import HINT, copy_weights


def timm_model(name: str, num_classes: int, tag: str | None, new_classifier: bool = False) -> nn.Module:
    """`resnet50`, or with weights `resnet50.a1_in1k`; `tag` is another way to name them ("pretrained": the default).

    With `new_classifier`, weights of another class count are taken too, but for the classifier.
    """
    timm = _library("timm")
    architecture, _, name_tag = name.partition(".")
    if not timm.is_model(architecture):
        raise UserError(f"timm has no model {architecture!r}{nearest(architecture, timm.list_models())}")
    if name_tag and tag not in (None, "pretrained", name_tag):
        raise UserError(f"timm/{name} names the weights {name_tag!r}, and {tag!r} was asked for: leave one of them out")
    wanted = name_tag or tag
    if not wanted:
        return timm.create_model(architecture, num_classes=num_classes)
    names = [listed.partition(".") for listed in timm.list_pretrained(f"{architecture}*")]
    tags = [tag for listed, _, tag in names if listed == architecture]
    default = timm.get_pretrained_cfg(architecture)
    if wanted == "pretrained" and default is not None and default.has_weights:
        wanted = default.tag or ""  # empty if the architecture's only weights have no tag
    elif wanted not in tags:
        raise UserError(_no_weights(f"timm/{architecture}", wanted, tags))
    full = f"{architecture}.{wanted}".removesuffix(".")
    if timm.get_pretrained_cfg(full).num_classes != num_classes and new_classifier:
        # The weights' own class count: timm then checks every key, and so does copy_weights.
        trained = _download(f"timm/{full}", lambda: timm.create_model(full, pretrained=True))
        return _transfer(trained, timm.create_model(full, num_classes=num_classes), f"timm/{full}")
    _check_classes(f"timm/{full}", timm.get_pretrained_cfg(full).num_classes, num_classes)
    return _download(f"timm/{full}", lambda: timm.create_model(full, pretrained=True, num_classes=num_classes))


def torchvision_model(name: str, num_classes: int, tag: str | None, new_classifier: bool = False) -> nn.Module:
    """`resnet18`; `tag` names its weights (`IMAGENET1K_V1`), "pretrained" the default ones; None: no weights.

    With `new_classifier`, weights of another class count are taken too, but for the classifier.
    """
    models = _library("torchvision").models
    names = models.list_models(module=models)
    if name not in names:
        raise UserError(f"torchvision has no classification model {name!r}{nearest(name, names)}")
    if tag is None:
        return models.get_model(name, weights=None, num_classes=num_classes)
    choices = models.get_model_weights(name).__members__
    member = "DEFAULT" if tag == "pretrained" else tag
    if member not in choices:
        raise UserError(_no_weights(f"torchvision/{name}", tag, list(choices)))
    weights = choices[member]
    if len(weights.meta["categories"]) != num_classes and new_classifier:
        trained = _download(f"torchvision/{name}", lambda: models.get_model(name, weights=weights))
        net = models.get_model(name, weights=None, num_classes=num_classes)
        return _transfer(trained, net, f"torchvision/{name} with {weights.name}")
    _check_classes(f"torchvision/{name} with {weights.name}", len(weights.meta["categories"]), num_classes)
    return _download(f"torchvision/{name}", lambda: models.get_model(name, weights=weights))


def _library(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError as error:
        raise UserError(
            f"models '{name}/...' need {name}, which cannot be imported ({error}): pip install {name}"
        ) from error


def _no_weights(model: str, tag: str, choices: list[str]) -> str:
    known = f"its weights are {', '.join(choices[:10])}" if choices else "it has no pre-trained weights"
    return f"{tag!r} is neither a file nor weights of {model}{nearest(tag, choices)}: {known}"


def _check_classes(model: str, have: int, wanted: int) -> None:
    if have != wanted:
        raise UserError(
            f"{model} was trained for {have} classes and {wanted} are wanted: its classifier does not fit, and partial "
            f"loading is an error; {HINT}"
        )


def _transfer(trained: nn.Module, net: nn.Module, source: str) -> nn.Module:
    """`net` with the weights of `trained`, all but the classifier's."""
    copy_weights(net, trained.state_dict(), source, new_classifier=True)
    return net


def _download(model: str, build: Callable[[], nn.Module]) -> nn.Module:
    try:
        return build()
    except Exception as error:  # both hubs raise the exceptions of their HTTP libraries
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:160]
        raise UserError(f"the weights of {model} could not be fetched ({reason}): pass them as a file") from error
