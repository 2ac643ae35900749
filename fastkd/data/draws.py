"""Random numbers that depend on nothing but (seed, epoch, sample): the same in every loader, batch and process.

Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") is a counter-based generator. Its key
is the seed, its counter the sample, the epoch and a stream. All is integer arithmetic on int64 tensors, so that the CPU
and the GPU give the same bits.
"""

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)  # what the key grows by in each round
ROUNDS = 10
CROPS, BOXES = 0, 16  # streams: offsets and flips; the boxes of random resized crops take one stream for each try


def philox(counter: list[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Four words from 0 to 2^32 - 1, int64 [N] each, from a counter of four such words and a key of two."""
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        low, high = x0 * MULTIPLIERS[0], x2 * MULTIPLIERS[1]  # the low 64 bits of the products
        x0, x1, x2, x3 = _upper(high) ^ x1 ^ k0, high & WORD, _upper(low) ^ x3 ^ k1, low & WORD
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return [x0, x1, x2, x3]


def _upper(product: Tensor) -> Tensor:
    return (product >> 32) & WORD


def words(seed: int, epoch: int, samples: Tensor, stream: int) -> list[Tensor]:
    """Four random words from 0 to 2^32 - 1 of each sample, int64 [N] each. samples: their numbers, int64 [N]."""
    rest = torch.full_like(samples, epoch & WORD), torch.full_like(samples, stream)
    return philox([samples & WORD, _upper(samples), *rest], (seed & WORD, seed >> 32 & WORD))


def integers(word: Tensor, limit: int) -> Tensor:
    """Integers from 0 to limit - 1, each as likely as the others but for limit / 2^32."""
    return _upper(word * limit)


def fractions(word: Tensor) -> Tensor:
    """Float32 numbers in [0, 1): the upper 24 bits, so that every device has the same."""
    return (word >> 8).float() * 2.0**-24


def crops_and_flips(seed: int, epoch: int, samples: Tensor, pad: int, flip: bool) -> tuple[Tensor, Tensor]:
    """(corners int64 [N, 2] from 0 to 2 pad, flips bool [N]) of the samples in this epoch."""
    top, left, side, _ = words(seed, epoch, samples, CROPS)
    corners = torch.stack([integers(top, 2 * pad + 1), integers(left, 2 * pad + 1)], 1)
    return corners, (side >> 31 == 1) if flip else torch.zeros_like(side, dtype=torch.bool)


def resized_boxes(seed: int, epoch: int, samples: Tensor, side: tuple[int, int], tries: int = 10) -> Tensor:
    """(top, left, height, width) [N, 4] in pixels, as torchvision's RandomResizedCrop draws them.

    An area of 0.08 to 1 of the image and an aspect of 3/4 to 4/3, log-uniform; of `tries` boxes the first that fits, or
    else the whole image. Computed on the CPU, whatever device `samples` is on: exponentials differ between devices.
    """
    samples, (height, width) = samples.cpu(), side
    chosen = torch.tensor([0, 0, height, width], dtype=torch.float32).expand(len(samples), 4).clone()
    left = torch.ones(len(samples), dtype=torch.bool)  # samples without a box
    for attempt in range(tries):
        area, aspect, row, column = (fractions(word).double() for word in words(seed, epoch, samples, BOXES + attempt))
        area, ratio = (0.08 + 0.92 * area) * height * width, ((2 * aspect - 1) * torch.log(torch.tensor(4 / 3))).exp()
        tall, wide = (area / ratio).sqrt().round(), (area * ratio).sqrt().round()
        fits = left & (tall >= 1) & (tall <= height) & (wide >= 1) & (wide <= width)
        box = torch.stack([(row * (height - tall + 1)).floor(), (column * (width - wide + 1)).floor(), tall, wide], 1)
        chosen[fits], left = box[fits].float(), left & ~fits
    return chosen
