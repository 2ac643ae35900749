"""The weights file of timm or torchvision: `load_state_dict(load_file(FILE))`, strict."""

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import UserError
from ..models import create_model
from ..trained import Trained
from ..weights_file import save_network

LIBRARIES = {"timm": "timm", "torchvision": "torchvision", "hf": "transformers", "": "fastkd", "own": "your own"}
ANY = "onnx, torch-export and int8 are for every network"


def check_timm(trained: Trained) -> None:
    _check(trained, "timm")


def check_torchvision(trained: Trained) -> None:
    _check(trained, "torchvision")


def _check(trained: Trained, library: str) -> None:
    if trained.library != library:
        raise UserError(
            f"--format {library}: {trained.model} is a network of {LIBRARIES[trained.library]}, and {library} has none "
            f"with its keys; {ANY}"
        )


def write_timm(trained: Trained, path: Path, images: Tensor | None = None) -> nn.Module:
    """The file holds the note of fastkd too, so that `fastkd eval` and `fastkd predict` read it."""
    save_network(path, trained.net, trained.about)
    net = _fresh(trained)
    net.load_state_dict(load_file(path))
    return net.eval()


def write_torchvision(trained: Trained, path: Path, images: Tensor | None = None) -> nn.Module:
    """As `write_timm`, for torchvision. GoogLeNet and Inception have no auxiliary heads: aux_logits=False."""
    save_network(path, trained.net, trained.about)
    net = _fresh(trained)
    net.load_state_dict(load_file(path))
    return net.eval()


def _fresh(trained: Trained) -> nn.Module:
    name, size = f"{trained.library}/{trained.architecture}", trained.preprocess.image_size
    return create_model(name, len(trained.classes), image_size=size, kwargs=trained.kwargs)
