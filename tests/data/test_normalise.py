"""Normalisation against its formula, and that memory serves again only when nobody holds it."""

import pytest
import torch

from fastkd.data.base import IMAGENET_MEAN, IMAGENET_STD
from fastkd.data.normalise import KEPT, Normalise

CPU = torch.device("cpu")


def images(count=3, seed=0):
    return torch.randint(256, (count, 8, 10, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 1e-2)])
def test_formula_and_layout(dtype, tolerance):
    got = Normalise(IMAGENET_MEAN, IMAGENET_STD, CPU, dtype)(images())
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    want = (images().permute(0, 3, 1, 2).double() / 255 - mean) / std
    assert got.dtype == dtype and got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


def test_batches_that_are_held_stay_as_they_were():
    normalise = Normalise((0, 0, 0), (1, 1, 1), CPU, torch.float32)
    held = [normalise(images(seed=seed)) for seed in range(2 * KEPT)]
    part = normalise(images(seed=99))[1:2, :, ::2]  # a view keeps the whole batch alive
    for _ in range(2 * KEPT):
        normalise(images(seed=7))
    for seed, batch in enumerate(held):
        torch.testing.assert_close(batch, images(seed=seed).permute(0, 3, 1, 2) / 255)
    torch.testing.assert_close(part, images(seed=99).permute(0, 3, 1, 2)[1:2, :, ::2] / 255)


def test_memory_that_is_free_serves_again_also_for_a_smaller_batch():
    normalise = Normalise((0, 0, 0), (1, 1, 1), CPU, torch.float32)
    places = set()
    for step in range(10):
        batch = normalise(images(count=4 - step % 2))
        places.add(batch.data_ptr())
        del batch
    assert len(places) == 1
