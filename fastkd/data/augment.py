"""What is drawn for the images of an epoch: crops, flips, and the mixtures of mixup and CutMix.

Every draw is a function of (seed, view, sample): all loaders, batch sizes, processes and devices have the same. A view
is one augmented form of each image. It is the number of the epoch, or with `--views V` the epoch modulo V: then each
image has V forms, which come back in turn, and what a teacher says of them can be kept.

Floating-point numbers are computed on the CPU, whatever device `samples` is on: exponentials differ between devices.
"""

import math
from functools import cache

import numpy as np
import torch
from torch import Tensor

from .draws import fractions, integers, words

CROPS, BOXES, MIXES = 0, 16, 32  # streams; the boxes take one for each try
TRIES = 10
AREA, ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)  # of random resized crops, as in torchvision


def crops_and_flips(seed: int, view: int, samples: Tensor, pad: int, flip: bool) -> tuple[Tensor, Tensor]:
    """(corners int64 [N, 2] from 0 to 2 pad, flips bool [N]) of the samples, int64 [N], in this view."""
    top, left, side, _ = words(seed, view, samples, CROPS)
    corners = torch.stack([integers(top, 2 * pad + 1), integers(left, 2 * pad + 1)], 1)
    return corners, (side >> 31 == 1) if flip else torch.zeros_like(side, dtype=torch.bool)


def resized_boxes(seed: int, view: int, samples: Tensor, sizes: Tensor | tuple[int, int], tries: int = TRIES) -> Tensor:
    """(top, left, height, width) float32 [N, 4] in pixels, as torchvision's RandomResizedCrop draws them.

    sizes: (height, width) of all images, or int64 [N, 2]. An area of 0.08 to 1 of the image and an aspect of 3/4 to
    4/3, log-uniform; the first of `tries` boxes that fits. If none does, the largest centred box with such an aspect.
    On the CPU. 0.5 ms for 256 samples on one core.
    """
    samples, sizes = samples.cpu(), torch.as_tensor(sizes).expand(len(samples), 2).double()
    height, width = sizes[:, 0], sizes[:, 1]
    boxes = _centred(height, width)
    if tries == 0 or not len(samples):
        return boxes.float()
    streams = torch.arange(BOXES, BOXES + tries)[:, None]
    area, aspect, row, column = (fractions(word).double() for word in words(seed, view, samples, streams))  # [tries, N]
    area = (AREA[0] + (AREA[1] - AREA[0]) * area) * height * width
    ratio = ((2 * aspect - 1) * math.log(ASPECT[1])).exp()
    tall, wide = (area / ratio).sqrt().round(), (area * ratio).sqrt().round()
    fits = (tall >= 1) & (tall <= height) & (wide >= 1) & (wide <= width)
    drawn = torch.stack([(row * (height - tall + 1)).floor(), (column * (width - wide + 1)).floor(), tall, wide], 2)
    first = drawn[fits.int().argmax(0), torch.arange(len(samples))]
    return torch.where(fits.any(0)[:, None], first, boxes).float()


def _centred(height: Tensor, width: Tensor) -> Tensor:
    """The largest centred boxes whose aspect is within ASPECT, [N, 4]."""
    tall = torch.minimum(height, (width / ASPECT[0]).round())
    wide = torch.minimum(width, (height * ASPECT[1]).round())
    return torch.stack([((height - tall) / 2).floor(), ((width - wide) / 2).floor(), tall, wide], 1)


def mixtures(
    seed: int, view: int, samples: Tensor, size: tuple[int, int], mixup: float = 0.0, cutmix: float = 0.0
) -> Tensor:
    """How each image is mixed with its partner, float32 [N, 6] on the CPU: (weight, share, top, left, bottom, right).

    mixup (arXiv:1710.09412): weight * image + (1 - weight) * partner; the box is empty. CutMix (arXiv:1905.04899): the
    box is the partner's, the weight 1. `share` is that of the image's own label. `mixup` and `cutmix` are the alphas of
    Beta(alpha, alpha), of which one is above 0; with both, each image draws one of the two. CutMix's box has an area of
    (1 - Beta) around a uniform centre, is cut off at the border, and `share` counts what is left. size: (height, width)
    of the images in pixels.
    """
    samples, (height, width) = samples.cpu(), size
    kind, level, row, column = (fractions(word).double() for word in words(seed, view, samples, MIXES))
    is_cut = (kind < 0.5) if mixup and cutmix else torch.full_like(kind, bool(cutmix), dtype=torch.bool)
    share = torch.where(is_cut, _beta(level, cutmix or mixup), _beta(level, mixup or cutmix))
    half = torch.where(is_cut, (1 - share).sqrt() / 2, 0)
    y, x = (row * height).floor(), (column * width).floor()
    top, bottom = (y - half * height).round().clamp(min=0), (y + half * height).round().clamp(max=height)
    left, right = (x - half * width).round().clamp(min=0), (x + half * width).round().clamp(max=width)
    left_over = 1 - (bottom - top) * (right - left) / (height * width)
    weight = torch.where(is_cut, 1.0, share)
    return torch.stack([weight, torch.where(is_cut, left_over, share), top, left, bottom, right], 1).float()


def _beta(level: Tensor, alpha: float) -> Tensor:
    """The quantiles of Beta(alpha, alpha) at levels float64 [N] in [0, 1)."""
    lower = torch.minimum(level, 1 - level).numpy()
    half = torch.from_numpy(np.interp(lower, *_quantiles(alpha)) ** max(1, 1 / alpha))
    return torch.where(level <= 0.5, half, 1 - half)


@cache
def _quantiles(alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """(the distribution function, x^min(1, alpha)) at 4,097 places from x = 0 to 1/2: a smooth curve for any alpha.

    The distribution is x^a (1-x)^a sum_n c_n x^n but for a constant, where c_0 = 1 and c_n = c_(n-1) (2a + n - 1) /
    (a + n): all terms are positive, and from some n on each is less than 0.6 of the one before.
    """
    power = np.linspace(0, 0.5 ** min(1, alpha), 4097)
    x, series, term = power ** max(1, 1 / alpha), np.zeros(4097), np.ones(4097)
    for n in range(1, 60 + int(8 * alpha)):
        series += term
        term = term * (2 * alpha + n - 1) / (alpha + n) * x
    distribution = (4 * x * (1 - x)) ** alpha * series  # with the 4, no large alpha makes all of it 0
    return distribution / distribution[-1] / 2, power
