"""A trained network with all that its weights file says of it: the classes, and the images that it takes."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from . import weights_file
from .data.preprocess import Preprocess
from .errors import UserError, check_classes, count_of
from .models import create_model, load_weights, read_state_dict
from .models.checkpoint_files import STUDENT, unfinished, weights_of
from .models.kwargs import parse_kwargs
from .models.weights import blaming

NEEDED = {
    "model": "--model NAME",
    "classes": "--classes NAME... (or their number)",
    "image_size": "--image-size N",
    "mean": "--mean R G B",
    "std": "--std R G B",
}
"""What a weights file has to say, and the option for one that does not."""
TRAIN_IT = "`fastkd train --student-weights FILE` trains a new one"


@dataclass(frozen=True)
class Trained:
    """A network in eval mode, fp32, on the CPU."""

    weights: Path
    model: str  # the name for `create_model`, or the class of a network that it does not know
    net: nn.Module
    classes: tuple[str, ...]  # in the order of the logits
    preprocess: Preprocess
    about: dict[str, Any]  # the note of the weights file, with what was given
    kwargs: dict[str, Any]  # arguments of the network, such as drop_path_rate
    is_own: bool = False  # a network that `create_model` does not know

    @property
    def library(self) -> str:
        """`timm`, `torchvision` or `hf` for transformers; "" for fastkd's networks, "own" for other modules."""
        if self.is_own:
            return "own"
        return self.model.partition("/")[0] if "/" in self.model else ""

    @property
    def architecture(self) -> str:
        """The name in its library, without the tag of pre-trained weights: `resnet18`."""
        name = self.model.partition("/")[2] or self.model
        return name.partition(".")[0] if self.library == "timm" else name


def load_trained(
    weights: Path,
    model: str | nn.Module = "",
    option: str = "--weights ",
    *,
    classes: Sequence[str] = (),
    **images: Any,
) -> Trained:
    """The network of a run folder, of a best.pt in one, or of any weights file.

    `model`: its name, if the file has none, or a network that gets the weights. `classes`: the names in the order of
    the logits, or one number: that many classes, named by their numbers. `images`: image_size, mean, std, crop_pct,
    interpolation, exif. What is given comes before what the file says. Errors write `option` before the name of the
    file. Raises UserError, with the options to give, if something that is needed is not known.
    """
    weights = Path(weights_of(os.fspath(weights)))
    check_file(weights, option)
    about = weights_file.read_about(weights)
    classes = names_of(classes) or about.get("data", {}).get("classes", [])
    noted = about.get("input", {}) | {name: value for name, value in images.items() if value}
    known = {"model": model or about.get("model"), "classes": classes, **noted}
    preprocess = Preprocess.of(noted)
    if lacking := [name for name in NEEDED if known.get(name) in (None, "", 0, [], ())]:
        read_state_dict(weights)  # a file that holds no weights says so
        raise UserError(f"{option}{weights} does not say {what_to_give(lacking)}")
    assert preprocess is not None
    about = about | {"data": about.get("data", {}) | {"classes": list(classes)}}
    about["input"] = {name: list(value) if isinstance(value, tuple) else value for name, value in noted.items()}
    kwargs = parse_kwargs(about.get("kwargs", ()), f"{option}{weights} notes the argument")
    if isinstance(model, nn.Module):
        net, name = model.cpu(), type(model).__name__
        with blaming(option, lambda count: f"give a network of {count_of(count, 'class')}" if count else TRAIN_IT):
            load_weights(net, weights)
    else:
        name = model or network_of(weights, option)
        with blaming(option, lambda count: f"name its classes, or give --classes {count}" if count else TRAIN_IT):
            net = create_model(name, len(classes), weights, image_size=preprocess.image_size, kwargs=kwargs)
    return Trained(weights, name, net.eval(), tuple(classes), preprocess, about, kwargs, isinstance(model, nn.Module))


def names_of(classes: Sequence[str]) -> list[str]:
    """The names of the classes. Raises UserError if two are equal."""
    if len(classes) == 1 and str(classes[0]).isdecimal():
        count = int(classes[0])
        if not 1 <= count <= 1_000_000:
            raise UserError(f"--classes {count}: give the names of the classes, or their number")
        return [str(number) for number in range(count)]
    check_classes(classes, "--classes")
    return list(classes)


def what_to_give(lacking: Sequence[str]) -> str:
    """The end of a message: what a weights file does not say, and the options that say it."""
    words = {"model": "which network it is for", "classes": "its classes", "image_size": "the size of its images"}
    lines = [words.get(name, f"the {name} of its images") for name in lacking]
    own = "; for a network of your own see docs/export.md" if "model" in lacking else ""
    return f"{', '.join(lines)}: give {', '.join(NEEDED[name] for name in lacking)}{own}"


def check_file(weights: Path, option: str) -> None:
    """Raise UserError if `weights` is no file."""
    given = f"{option}{weights}"
    if os.path.isdir(weights):
        hint = unfinished(weights) or "it is no run folder; name one, or a weights file"
        raise UserError(f"{given} holds no {STUDENT}: {hint}")
    if not os.path.isfile(weights):
        what = "file or run folder" + (" (a tag of a library's weights needs --model NAME)" if option else "")
        raise UserError(f"{given}: there is no such {what}; check the path")


def network_of(weights: Path, option: str = "--weights ") -> str:
    """The network's name in a weights file of fastkd. Raises UserError if there is none."""
    given = f"{option}{weights}"
    check_file(weights, option)
    model = weights_file.read_about(weights).get("model")
    if not model:
        read_state_dict(weights)  # a file that holds no weights says so
        raise UserError(f"{given} does not say {what_to_give(['model'])}")
    if not re.fullmatch(r"[\w+-][\w./+-]{0,199}", model) or ".." in model or os.path.exists(model.partition("/")[2]):
        raise UserError(
            f"{given}: its note names the network {model!r:.80}, which is a path or a place to load from: "
            "a note may name networks alone; give --model NAME"
        )
    return model
