"""Random numbers that depend only on (seed, epoch, image, purpose): Philox 4x32-10, in vectorised integer operations.

A counter-based generator has no state: each number is a hash of its counter. So an image's draws are the same for any
batch size, order and number of processes. Only whole numbers are computed, so a CPU and a GPU give the same bits.
J. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. The key holds the seed; the counter holds the
number of the image (64 bits), the epoch (32), the purpose (16) and the block of four words (16).

Cost: about 110 elementwise operations for each block of four words. Draw for a whole epoch at once: 50,000 images take
about as long as 100, in kernel launches.
"""

import math
from enum import IntEnum

import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)  # golden ratio and sqrt(3) - 1, as fractions of 2**32
MASK = 0xFFFFFFFF
TRIES = 10  # boxes drawn for a random resized crop, of which the first that fits counts; as in torchvision


class Stream(IntEnum):
    """A purpose of draws. Purposes share no numbers. A number keeps its meaning, so that old runs can be repeated."""

    CROP = 0
    FLIP = 1
    BOX = 2


def philox(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Four random words for each counter: int64 [4, ...] with values of 32 bits, from int64 [4, ...] and two words."""
    c0, c1, c2, c3 = counter.unbind(0)
    k0, k1 = key
    for _ in range(ROUNDS):
        (high0, low0), (high1, low1) = _product(c0, MULTIPLIERS[0]), _product(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + KEY_STEPS[0]) & MASK, (k1 + KEY_STEPS[1]) & MASK
    return torch.stack([c0, c1, c2, c3])


def _product(words: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """The upper and the lower 32 bits of words * factor. int64 wraps around, which keeps all 64 bits."""
    product = words * factor
    return (product >> 32) & MASK, product & MASK


def random_words(seed: int, epoch: int, stream: int, ids: Tensor, count: int) -> Tensor:
    """Words of 32 bits, int64 [B, count], for the images `ids` int64 [B], on their device.

    seed: 64 bits count; epoch: 32 bits; stream: 0 to 65,535, see Stream; count: up to 262,144. The first words do not
    depend on `count`.
    """
    if not 0 <= stream < 2**16 or not 0 < count <= 2**18:
        raise ValueError(f"stream must be 0 to 65535 and count 1 to 262144, got {stream} and {count}")
    blocks = torch.arange(-(-count // 4), device=ids.device)[:, None]
    parts = (ids & MASK, (ids >> 32) & MASK, torch.full_like(ids, epoch & MASK), stream + (blocks << 16))
    counter = torch.stack(torch.broadcast_tensors(*parts))
    words = philox(counter, (seed & MASK, (seed >> 32) & MASK))  # [4, blocks, B]
    return words.permute(2, 1, 0).flatten(1)[:, :count]


def below(words: Tensor, limit: int | Tensor) -> Tensor:
    """Whole numbers from 0 to limit - 1, int64. `limit` up to 2**31; a number's chance is off by limit / 2**32."""
    return (words * limit) >> 32


def uniform(words: Tensor) -> Tensor:
    """Numbers in (0, 1), float64; exact, so the same on each device."""
    return (words.double() + 0.5) * 2.0**-32


def crop_corners(seed: int, epoch: int, ids: Tensor, pad: int) -> Tensor:
    """Top left corners of crops after padding by `pad` pixels: int64 [B, 2], -pad to pad, each equally likely."""
    return below(random_words(seed, epoch, Stream.CROP, ids, 2), 2 * pad + 1) - pad


def flips(seed: int, epoch: int, ids: Tensor) -> Tensor:
    """True for the images to mirror: bool [B], half of them."""
    return random_words(seed, epoch, Stream.FLIP, ids, 1)[:, 0] < 2**31


def resized_boxes(seed: int, epoch: int, ids: Tensor, height: int, width: int) -> Tensor:
    """(top, left, height, width) int64 [B, 4] in pixels, as torchvision's RandomResizedCrop draws them.

    An area of 0.08 to 1 of the image and an aspect of 3/4 to 4/3, uniform in its logarithm. The whole image if none
    of TRIES boxes fits. fp64: exp may differ by 1e-16 between devices, and rounding to pixels hides it.
    """
    words = random_words(seed, epoch, Stream.BOX, ids, 2 * TRIES + 2)
    drawn = uniform(words[:, : 2 * TRIES])
    area = (0.08 + 0.92 * drawn[:, :TRIES]) * (height * width)
    aspect = ((2 * drawn[:, TRIES:] - 1) * math.log(4 / 3)).exp()
    sizes = torch.stack([(area / aspect).sqrt().round(), (area * aspect).sqrt().round()], -1).long()
    limits = torch.stack([torch.full_like(ids, height), torch.full_like(ids, width)], -1)
    fits = ((sizes >= 1) & (sizes <= limits[:, None])).all(-1)
    first = sizes.gather(1, fits.int().argmax(1)[:, None, None].expand(-1, 1, 2)).squeeze(1)
    chosen = torch.where(fits.any(1)[:, None], first, limits)
    return torch.cat([below(words[:, 2 * TRIES :], limits - chosen + 1), chosen], 1)
