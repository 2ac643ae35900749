"""Random numbers that depend on nothing but (seed, epoch, sample): the same in every loader, batch and process.

Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") is a counter-based generator. Its key
is the seed, its counter the sample, the epoch and a stream. All is integer arithmetic on int64 tensors, so that the CPU
and the GPU give the same bits. augment.py makes crops, flips and mixtures of these numbers.
"""

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)  # what the key grows by in each round
ROUNDS = 10


def philox(counter: list[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Four words from 0 to 2^32 - 1, int64, from a counter of four such words and a key of two; shapes broadcast."""
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        low, high = x0 * MULTIPLIERS[0], x2 * MULTIPLIERS[1]  # the low 64 bits of the products
        x0, x1, x2, x3 = _upper(high) ^ x1 ^ k0, high & WORD, _upper(low) ^ x3 ^ k1, low & WORD
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return [x0, x1, x2, x3]


def _upper(product: Tensor) -> Tensor:
    return (product >> 32) & WORD


def words(seed: int, epoch: int, samples: Tensor, stream: int | Tensor) -> list[Tensor]:
    """Four random words from 0 to 2^32 - 1 of each sample, int64. samples: their numbers, int64 [N].

    One stream gives [N] each. Streams int64 [K, 1] give [K, N], in one pass.
    """
    rest = torch.full_like(samples, epoch & WORD), torch.as_tensor(stream, device=samples.device)
    return philox([samples & WORD, _upper(samples), *rest], (seed & WORD, seed >> 32 & WORD))


def integers(word: Tensor, limit: int | Tensor) -> Tensor:
    """Integers from 0 to limit - 1, each as likely as the others but for limit / 2^32."""
    return _upper(word * limit)


def fractions(word: Tensor) -> Tensor:
    """Float32 numbers in [0, 1): the upper 24 bits, so that every device has the same."""
    return (word >> 8).float() * 2.0**-24
