"""A frozen teacher whose images have another size, mean or standard deviation than the student's.

The loader normalises each image once, for the student. The teacher's copy is converted on the device, inside the step:
x * (std_s / std_t) + (mean_s - mean_t) / std_t per channel, and then a bilinear, antialiased resize to its own size.
Both are linear, so that their order does not matter. A resized image is not the crop that the teacher's own loader
would have made: its accuracy is that of its normalisation, and about that of its size.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class InputSpec:
    """The images that a network takes: their side in pixels, and the normalisation of values in [0, 1]."""

    image_size: int
    mean: tuple[float, ...]  # of red, green and blue
    std: tuple[float, ...]

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "InputSpec | None":
        """From a note such as {"image_size": 224, "mean": [...], "std": [...]}; None if one of them is missing."""
        if not all(values.get(name) for name in ("image_size", "mean", "std")):
            return None
        mean, std = (tuple(map(float, values[name])) for name in ("mean", "std"))
        return cls(int(values["image_size"]), mean, std)

    def as_dict(self) -> dict[str, Any]:
        return {"image_size": self.image_size, "mean": list(self.mean), "std": list(self.std)}

    def __str__(self) -> str:
        mean, std = (" ".join(f"{value:.3g}" for value in values) for values in (self.mean, self.std))
        return f"{self.image_size} x {self.image_size} pixels, mean {mean}, std {std}"


class AdaptInput(nn.Module):
    """Images [N, 3, H, W] made for `given` -> images [N, 3, size, size] made for `wanted`, in the images' dtype.

    Computed in fp32 or wider, and rounded to the batch's dtype once. There is no state in the state dict.
    """

    def __init__(self, given: InputSpec, wanted: InputSpec):
        super().__init__()
        self.given, self.wanted = given, wanted
        self.resizes = given.image_size != wanted.image_size
        self._place(torch.device("cpu"))

    def _place(self, device: torch.device) -> None:
        triples = zip(self.given.mean, self.given.std, self.wanted.mean, self.wanted.std, strict=True)
        numbers = [(std_s / std_t, (mean_s - mean_t) / std_t) for mean_s, std_s, mean_t, std_t in triples]
        # Plain attributes: a buffer would be cast with the network, and averaged between processes.
        self.scale, self.shift = (
            torch.tensor(each, dtype=torch.float32, device=device).view(1, 3, 1, 1)
            for each in zip(*numbers, strict=True)
        )

    def _apply(self, fn: Callable, recurse: bool = True) -> "AdaptInput":
        super()._apply(fn, recurse)
        self._place(fn(self.scale).device)  # moved like a buffer, but never rounded to another dtype
        return self

    def forward(self, images: Tensor) -> Tensor:
        x = torch.addcmul(self.shift, images, self.scale)
        if self.resizes:
            size = (self.wanted.image_size, self.wanted.image_size)
            x = F.interpolate(x, size, mode="bilinear", antialias=True)
        return x.to(images.dtype)


class OwnInput(nn.Module):
    """`OwnInput(net, given, wanted)(images made for given)` -> logits [N, C] of `net` on images made for `wanted`.

    `fastkd.models.staged` divides it like `net`; its stem adapts the images first. Save `plain_network(...)` of it.
    """

    def __init__(self, net: nn.Module, given: InputSpec, wanted: InputSpec):
        super().__init__()
        self.adapt, self.net, self.wanted = AdaptInput(given, wanted), net, wanted
        object.__setattr__(self, "_fastkd_image_size", given.image_size)  # what `stage_shapes` probes with

    def forward(self, images: Tensor) -> Tensor:
        return self.net(self.adapt(images))


def own_input(net: nn.Module, given: InputSpec, wanted: InputSpec) -> nn.Module:
    """`net` itself if it takes the images as they are, else with its own input."""
    return net if given == wanted else OwnInput(net, given, wanted)


def plain_network(net: nn.Module) -> nn.Module:
    """The network without the conversion of its images: what is saved, and whose blocks can be swapped."""
    return net.net if isinstance(net, OwnInput) else net


def library_input(name: str, weights: str) -> InputSpec | None:
    """What images pre-trained weights of timm or torchvision take, by the model's name; None for all others.

    `weights`: "pretrained" or a tag, as for `create_model`; empty if the name holds a tag of timm. None for names and
    tags that do not exist too: `create_model` says what is wrong with them.
    """
    library, _, rest = name.partition("/")
    try:
        if library == "timm":
            return _timm_input(rest, weights)
        if library == "torchvision" and weights:
            return _torchvision_input(rest, weights)
    except (ImportError, KeyError, RuntimeError, ValueError):
        pass
    return None


def _timm_input(name: str, weights: str) -> InputSpec | None:
    import timm

    architecture, _, tag = name.partition(".")
    tag = tag or ("" if weights == "pretrained" else weights)
    config = timm.get_pretrained_cfg(f"{architecture}.{tag}" if tag else architecture)
    if config is None or not (tag or weights):
        return None
    return InputSpec.of({"image_size": config.input_size[-1], "mean": config.mean, "std": config.std})


def _torchvision_input(name: str, weights: str) -> InputSpec | None:
    from torchvision import models

    choices = models.get_model_weights(name).__members__
    preset = choices["DEFAULT" if weights == "pretrained" else weights].transforms()
    return InputSpec.of({"image_size": preset.crop_size[0], "mean": preset.mean, "std": preset.std})
