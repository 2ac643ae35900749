"""Networks of timm, torchvision and transformers by name. Partial loading is an error."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import UserError, nearest
from .kwargs import Kwargs, built
from .library_names import check_torchvision_name, library_module, timm_architecture
from .weights import Misfit, copy_weights

Made = TypeVar("Made")
NO_KWARGS: Kwargs = {}
AUXILIARY = {"googlenet": ("aux1", "aux2"), "inception_v3": ("AuxLogits",)}  # torchvision's heads beside the classifier


def timm_model(
    name: str,
    num_classes: int,
    tag: str | None,
    image_size: int | None = None,
    new_classifier: bool = False,
    kwargs: Kwargs = NO_KWARGS,
) -> nn.Module:
    """`resnet50`, or with weights `resnet50.a1_in1k`; `tag` is another way to name them ("pretrained": the default).

    Networks of a fixed image size (ViT, Swin, ...) are made for `image_size`; timm resamples the position embeddings of
    pre-trained weights. With `new_classifier`, weights of another class count are taken too, but for the classifier.
    `kwargs`: of the network's constructor.
    """
    timm = library_module("timm")
    architecture, name_tag = timm_architecture(name), name.partition(".")[2]
    if name_tag and tag not in (None, "pretrained", name_tag):
        raise UserError(f"timm/{name} names the weights {name_tag!r}, and {tag!r} was asked for: leave one of them out")
    wanted = name_tag or tag
    if not wanted:
        return _made_by_timm(architecture, num_classes, image_size, kwargs)
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
        count = timm.get_pretrained_cfg(full).num_classes
        trained = _download(f"timm/{full}", lambda: _made_by_timm(full, count, image_size, kwargs, True))
        return _transfer(trained, _made_by_timm(full, num_classes, image_size, kwargs), f"timm/{full}")
    _check_classes(f"timm/{full}", timm.get_pretrained_cfg(full).num_classes, num_classes)
    return _download(f"timm/{full}", lambda: _made_by_timm(full, num_classes, image_size, kwargs, True))


def _made_by_timm(
    name: str, num_classes: int, image_size: int | None, kwargs: Kwargs, pretrained: bool = False
) -> nn.Module:
    create = partial(library_module("timm").create_model, name, num_classes=num_classes)

    def build(more: Kwargs, weights: bool = False) -> nn.Module:
        if image_size is not None:
            try:
                return create(pretrained=weights, img_size=image_size, **more)
            except TypeError as error:  # raised before anything is built; no list tells which networks take it
                if "img_size" not in str(error):
                    raise
        return create(pretrained=weights, **more)

    if not pretrained:
        return built(f"timm/{name}", kwargs, build)
    if kwargs:  # what they cannot take is no matter of a download
        built(f"timm/{name}", kwargs, build)
    return build(kwargs, True)


def torchvision_model(
    name: str,
    num_classes: int,
    tag: str | None,
    image_size: int | None = None,
    new_classifier: bool = False,
    kwargs: Kwargs = NO_KWARGS,
) -> nn.Module:
    """`resnet18`; `tag` names its weights (`IMAGENET1K_V1`), "pretrained" the default ones; None: no weights.

    Networks of a fixed image size (ViT, MaxViT) without weights are made for `image_size`. The auxiliary heads of
    GoogLeNet and Inception are left out: see `drop_auxiliary`.
    With `new_classifier`, weights of another class count are taken too, but for the classifier.
    """
    models = library_module("torchvision").models
    check_torchvision_name(name)
    if tag is None:
        options: dict[str, Any] = {}
        if image_size is not None and name.startswith("vit_"):
            options = {"image_size": image_size}
        elif image_size is not None and name.startswith("maxvit"):
            options = {"input_size": (image_size, image_size)}
        elif name in AUXILIARY:
            # their own default without its warning, and the input of their pre-trained weights
            options = {"aux_logits": False, "init_weights": True, "transform_input": True}
        plain = partial(models.get_model, name, weights=None, num_classes=num_classes, **options)
        return built(f"torchvision/{name}", kwargs, lambda more: plain(**more))
    if kwargs:
        raise UserError(f"torchvision/{name} has weights ({tag}), which fix its arguments: drop {', '.join(kwargs)}")
    choices = models.get_model_weights(name).__members__
    member = "DEFAULT" if tag == "pretrained" else tag
    if member not in choices:
        raise UserError(_no_weights(f"torchvision/{name}", tag, list(choices)))
    weights = choices[member]
    if len(weights.meta["categories"]) != num_classes and new_classifier:
        trained = _download(f"torchvision/{name}", lambda: drop_auxiliary(models.get_model(name, weights=weights)))
        net = torchvision_model(name, num_classes, None)
        return _transfer(trained, net, f"torchvision/{name} with {weights.name}")
    _check_classes(f"torchvision/{name} with {weights.name}", len(weights.meta["categories"]), num_classes)
    return _download(f"torchvision/{name}", lambda: drop_auxiliary(models.get_model(name, weights=weights)))


def drop_auxiliary(net: nn.Module) -> nn.Module:
    """Remove the auxiliary heads of torchvision's GoogLeNet and Inception, whose outputs stand beside the logits.

    Returns `net`, which is changed.
    """
    if hasattr(net, "aux_logits"):
        setattr(net, "aux_logits", False)  # noqa: B010  # the type checker takes attributes of a network for modules
        for head in (head for heads in AUXILIARY.values() for head in heads if hasattr(net, head)):
            setattr(net, head, None)
    return net


def without_auxiliary(name: str, table: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The state dict `table` of the network `name`, without auxiliary heads that `drop_auxiliary` would remove.

    They have a classifier each, so that weights of another class count would not fit.
    """
    heads = AUXILIARY.get(name.removeprefix("torchvision/"), ()) if name.startswith("torchvision/") else ()
    if not heads:
        return table
    return {key: tensor for key, tensor in table.items() if key.partition(".")[0] not in heads}


OWN_CODE = {"trust_remote_code": False}  # else transformers asks on the terminal whether to run a folder's code


def hf_model(
    name: str, num_classes: int, tag: str | None, image_size: int | None = None, new_classifier: bool = False
) -> nn.Module:
    """transformers' network for image classification by its name on the Hugging Face hub, or from a local folder.

    `tag`: "pretrained" loads the weights, None gives random ones. Random networks of a fixed image size are made for
    `image_size`. The result takes images and returns logits; its state dict has the keys of transformers' network.
    """
    with hidden_kernels():
        transformers = library_module("transformers", "hf", "fastkd[hf]")
        transformers.utils.is_kernels_available()  # it remembers the answer
    auto, full = transformers.AutoModelForImageClassification, f"hf/{name}"
    if tag not in (None, "pretrained"):
        raise UserError(_no_weights(full, str(tag), ["pretrained"]))
    config = _download(full, lambda: transformers.AutoConfig.from_pretrained(name, **OWN_CODE), "the configuration")
    if tag is not None:
        if not new_classifier:
            _check_classes(full, config.num_labels, num_classes)
        trained = _logits_only(
            _download(full, lambda: auto.from_pretrained(name, dtype=torch.float32, **OWN_CODE)).train()
        )
        if config.num_labels == num_classes:
            return trained
        return _transfer(trained, hf_model(name, num_classes, None), full)
    config.num_labels = num_classes
    config.architectures = config.architectures or []  # transformers iterates over it
    if image_size is not None and getattr(config, "image_size", None):
        config.image_size = image_size
    try:
        return _logits_only(auto.from_config(config, **OWN_CODE).train())
    except ValueError as error:
        raise UserError(f"{full} does not classify images: {' '.join(str(error).split())[:160]}") from error


@contextmanager
def hidden_kernels() -> Iterator[None]:
    """Within the block, the folder kernels/ of a clone of fastkd cannot be imported by this name.

    transformers looks for a package `kernels` of Hugging Face and imports what it finds: a second copy of ours.
    """
    ours, found = Path(__file__).parents[1] / "kernels" / "__init__.py", find_spec("kernels")
    if found is None or not found.origin or not os.path.samefile(found.origin, ours):
        yield
        return
    stand_in = ModuleType("kernels")
    stand_in.__spec__ = ModuleSpec("kernels", None)
    sys.modules["kernels"] = stand_in
    try:
        yield
    finally:
        del sys.modules["kernels"]


def _logits_only(net: nn.Module) -> nn.Module:
    """The same network, of a subclass whose forward pass takes images [N, 3, H, W] and returns logits [N, classes].

    A module around it would change the keys of its state dict.
    """
    kind = type(net)

    class Classifier(kind):  # type: ignore[misc, valid-type]
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(pixel_values=images, return_dict=True).logits

    Classifier.__name__ = Classifier.__qualname__ = kind.__name__
    net.__class__ = Classifier
    object.__setattr__(net, "_fastkd_convert", partial(_with_names_of_now, kind, getattr(net, "config")))  # noqa: B009
    return net


def _with_names_of_now(kind: Any, config: Any, table: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The state dict `table` with the names of the installed transformers, which reads those of other versions.

    None if transformers leaves out a key, or a weight of the network. Tensors of other shapes stay as they are.
    """
    settings = {"output_loading_info": True, "ignore_mismatched_sizes": True, "dtype": torch.float32}
    try:
        with hidden_kernels(), _quiet_transformers():
            net, about = kind.from_pretrained(None, config=config, state_dict=dict(table), **settings)
    except (RuntimeError, ValueError, KeyError, OSError):  # of keys that do not fit
        return None
    others = [key for key, *_ in about.get("mismatched_keys", ())]
    if about["missing_keys"] or about["unexpected_keys"] or not set(others) <= table.keys():
        return None
    return net.state_dict() | {key: table[key] for key in others}


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Within the block, transformers does not report keys that do not fit: our errors name them."""
    logging = library_module("transformers").utils.logging
    level, has_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if has_bar:
            logging.enable_progress_bar()


def _no_weights(model: str, tag: str, choices: list[str]) -> str:
    known = f"its weights are {', '.join(choices[:10])}" if choices else "it has no pre-trained weights"
    return f"{tag!r} is neither a file nor weights of {model}{nearest(tag, choices)}: {known}"


def _check_classes(model: str, have: int, wanted: int) -> None:
    if have != wanted:
        reason = f"{model} was trained for {have} classes and {wanted} are wanted"
        raise Misfit(f"{reason}: its classifier does not fit, and partial loading is an error", have)


def _transfer(trained: nn.Module, net: nn.Module, source: str) -> nn.Module:
    """`net` with the weights of `trained`, all but the classifier's."""
    copy_weights(net, trained.state_dict(), source, new_classifier=True)
    return net


def _download(model: str, build: Callable[[], Made], what: str = "the weights") -> Made:
    try:
        return build()
    except Exception as error:  # both hubs raise the exceptions of their HTTP libraries
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:160]
        form = "file" if what == "the weights" else "folder"
        raise UserError(f"{what} of {model} could not be fetched ({reason}): pass them as a {form}") from error
