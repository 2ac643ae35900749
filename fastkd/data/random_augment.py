"""RandAugment and random erasing of training crops in host memory: `--aa` and `--reprob`.

RandAugment (arXiv:1909.13719) is timm's, random erasing (arXiv:1708.04896) is torchvision's. Both draw from global
generators. Here these are seeded for each image from (seed, view, sample), as all draws are (draws.py), and are put
back afterwards. So the numbers of workers and processes change no image. Another version of timm or torchvision may.

Per image of 224 pixels on one core: RandAugment takes about 2 ms, most of it Pillow's; erasing 0.25 ms.
"""

import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ..errors import UserError
from .draws import words

POLICIES = 48  # the stream of the seeds, see augment.py
ERASED_AREA, ERASED_ASPECT = (0.02, 1 / 3), (0.3, 1 / 0.3)  # timm's; the aspect is log-uniform
SECTIONS = r"m\d+|n[1-9]\d*|p[01](\.\d+)?|mstd\d+(\.\d+)?|mmax\d+|inc[01]|t(weights|3aw|3a)"

Policy = Callable[[Any], Any]  # of a Pillow image


def check_policy(text: str) -> None:
    """Raise UserError unless `text` is a RandAugment policy in timm's words; timm passes over what it does not know."""
    if text and not re.fullmatch(f"rand(-({SECTIONS}))*", text):
        raise UserError(
            f"--aa {text!r}: give RandAugment in timm's words, such as rand-m7-mstd0.5-inc1: rand, then any of m "
            "(magnitude), n (operations an image), p (probability of each), mstd (deviation of the magnitude), mmax "
            "(its limit), inc1 (operations that grow with it), tweights, t3a, t3aw (choice of operations)"
        )


class RandomAugment:
    """(crop uint8 [3, H, W], its seeds) -> another such crop: RandAugment, then erasing with the mean colour.

    `aa`: timm's policy, "" for none. `reprob`: probability that a rectangle is erased. `mean`: of each channel in
    [0, 1]; it also fills what RandAugment leaves empty. `interpolation`: of RandAugment's rotations and shears.
    """

    def __init__(self, aa: str, reprob: float, mean: tuple[float, ...], interpolation: str):
        self.aa, self.interpolation = aa, interpolation
        self.colour = tuple(min(255, round(255 * value)) for value in mean)
        self.erase = v2.RandomErasing(reprob, ERASED_AREA, ERASED_ASPECT, list(self.colour)) if reprob else None

    def __bool__(self) -> bool:
        return bool(self.aa or self.erase)

    def __call__(self, crop: Tensor, seeds: tuple[int, int, int]) -> Tensor:
        with seeded(*seeds):
            if self.aa:
                policy = _policy(self.aa, crop.shape[-1], self.colour, self.interpolation)
                crop = F.pil_to_tensor(policy(F.to_pil_image(crop)))
            return self.erase(crop) if self.erase else crop


def seeds_of(seed: int, view: int, samples: Tensor) -> list[tuple[int, int, int]]:
    """The seeds of the three generators for each sample, int64 [N]; each is from 0 to 2^32 - 1."""
    python, numpy, torchs, _ = words(seed, view, samples, POLICIES)
    return list(zip(python.tolist(), numpy.tolist(), torchs.tolist(), strict=True))


@contextmanager
def seeded(python: int, numpy: int, torchs: int) -> Iterator[None]:
    """Within the block, the global generators of Python, NumPy and torch's CPU start at these seeds."""
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    random.seed(python)
    np.random.seed(numpy)
    torch.default_generator.manual_seed(torchs)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])


@cache
def _policy(text: str, side: int, colour: tuple[int, ...], interpolation: str) -> Policy:
    """timm's transform for crops of `side` pixels, with the parameters that timm's training gives it."""
    from timm.data.auto_augment import rand_augment_transform
    from timm.data.transforms import str_to_pil_interp

    about = {"translate_const": int(side * 0.45), "img_mean": colour, "interpolation": str_to_pil_interp(interpolation)}
    policy = rand_augment_transform(text, about)
    for operation in policy.ops:
        if operation.name.startswith("Posterize"):
            operation.aug_fn = partial(_posterize, operation.aug_fn)
    return policy


def _posterize(operation: Callable[..., Any], image: Any, bits: int, **options: Any) -> Any:
    """timm's Posterize, with 1 bit where timm asks for 0: Pillow 13 refuses that."""
    return operation(image, max(bits, 1), **options)
