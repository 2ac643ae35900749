"""Weights files to export and to predict with, and pictures."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from fastkd import create_model
from fastkd.weights_file import save_network

COLOURS = {"ant": (220, 30, 30), "bee": (30, 220, 30), "cat": (30, 30, 220), "dog": (200, 200, 30)}
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


def pictures(root: Path, count: int, size: tuple[int, int] = (50, 40)) -> Path:
    """Noisy pictures of (width, height) `size`, in about the colour of their class."""
    random = np.random.default_rng(count)
    for name, colour in COLOURS.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            shade = colour + random.normal(0, 70, 3)
            pixels = np.clip(shade + random.normal(0, 50, (size[1], size[0], 3)), 0, 255).astype("uint8")
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


def weights_of(
    path: Path, model: str, image_size: int = 32, noted: str | None = None, exif: bool = False, **more: float
) -> nn.Module:
    """Write random weights with statistics that are not trivial; gives the network in eval mode.

    `noted`: the name in the file, if it is not `model`. `more`: further entries of the note.
    """
    torch.manual_seed(1)
    net = create_model(model, 4, image_size=image_size)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    about = {"data": {"images": 9, "classes": [*COLOURS]}, "model": model if noted is None else noted}
    wanted = {"image_size": image_size, "mean": MEAN, "std": STD, "exif": exif}
    save_network(path, net, about | more | {"input": wanted})
    return net.eval()
