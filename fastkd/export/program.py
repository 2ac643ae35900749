"""torch.export: the network as a program of PyTorch, which runs without the network's code (.pt2)."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..trained import Trained
from .verify import Reloaded

NOTE = "fastkd.json"  # of the extra files in a .pt2: the classes and the images, see `note_of`


def check(trained: Trained) -> None:
    """Every network can be exported, or torch says why not."""


def note_of(trained: Trained) -> dict[str, Any]:
    """What a program has to know of the network: the classes in the order of the logits, and the images."""
    image = trained.preprocess
    return {
        "classes": list(trained.classes),
        "resize": image.resize,
        "image_size": image.image_size,
        "mean": list(image.mean),
        "std": list(image.std),
        "interpolation": image.interpolation,
        "exif": image.exif,
        "model": trained.model,
    }


def example_of(trained: Trained) -> Tensor:
    """Two images: a size of 1 would be taken for a constant."""
    size = trained.preprocess.image_size
    return torch.zeros(2, 3, size, size)


@torch.no_grad()
def program_of(net: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    """The program of a network in eval mode, for any number of images."""
    return torch.export.export(net, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))


def save_program(program: torch.export.ExportedProgram, trained: Trained, path: Path) -> nn.Module:
    """Write the program with its note, and read it back."""
    torch.export.save(program, path, extra_files={NOTE: json.dumps(note_of(trained))})
    return Reloaded(torch.export.load(path).module())


def write(trained: Trained, path: Path, images: Tensor | None = None) -> nn.Module:
    """Load it by `torch.export.load(FILE).module()`."""
    return save_program(program_of(trained.net, example_of(trained)), trained, path)
