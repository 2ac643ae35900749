"""The UCI handwritten digits: 1,797 real 8x8 images, inside the package, so that a run needs no download.

E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998,
https://doi.org/10.24432/C50P49, licence CC BY 4.0. digits.npz holds its test part (13 of the 43 writers) as
scikit-learn's `load_digits` gives it: images uint8 [1797, 8, 8] with values 0 to 16, target uint8 [1797]. Changed here:
enlarged to 32x32.

Every fifth image of each class is for evaluation: 1,442 to train, 355 to evaluate.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from .resident import ResidentSet

SIDE = 32  # pixels


def read_digits() -> tuple[Tensor, Tensor]:
    """Images [1797, 32, 32] float32 in [0, 1] and target [1797] int64, on the CPU."""
    with np.load(Path(__file__).with_name("digits.npz")) as file:
        images = torch.from_numpy(file["images"]).float().div(16)
        target = torch.from_numpy(file["target"]).long()
    return interpolate(images[:, None], (SIDE, SIDE), mode="bilinear", align_corners=False).squeeze(1), target


def is_for_evaluation(target: Tensor) -> Tensor:
    """bool [N]: every fifth image of each class, in the file's order."""
    ones = torch.nn.functional.one_hot(target)
    position = ones.cumsum(0).gather(1, target[:, None]).squeeze(1)  # 1, 2, 3, ... within the class
    return position % 5 == 0


def digits_set(train: bool) -> ResidentSet:
    """The images to train on or those to evaluate, uint8 [N, 32, 32, 1], rounded."""
    images, target = read_digits()
    chosen = is_for_evaluation(target) != train
    pixels = images[chosen].mul(255).round().to(torch.uint8)
    return ResidentSet(tuple("0123456789"), pixels[..., None], target[chosen])
