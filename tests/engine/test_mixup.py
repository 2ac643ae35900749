"""mixup, CutMix and label smoothing."""

import pytest
import torch
import torch.nn.functional as F

from fastkd.engine.mixup import Mixup

IMAGES = torch.randn(6, 3, 8, 8).contiguous(memory_format=torch.channels_last)
TARGET = torch.tensor([0, 1, 2, 3, 0, 1])


def test_off_passes_the_batch_through():
    images, target = Mixup(0, 0, 0, 4)(IMAGES, TARGET, 0)
    assert images is IMAGES and target is TARGET


def test_smoothing_is_torchs():
    _, target = Mixup(0, 0, 0.1, 4)(IMAGES, TARGET, 0)
    logits = torch.randn(6, 4)
    torch.testing.assert_close(F.cross_entropy(logits, target), F.cross_entropy(logits, TARGET, label_smoothing=0.1))


@pytest.mark.parametrize("alphas", [(0.8, 0), (0, 1.0), (0.8, 1.0)])
def test_labels_are_mixed_by_the_share_of_the_pixels(alphas):
    """An image of constant value 1 (or 0) shows by its mean how much of it is left."""
    marked = torch.zeros(2, 3, 40, 50).contiguous(memory_format=torch.channels_last)
    marked[0] = 1
    mixup = Mixup(*alphas, 0, 2)
    shares = set()
    for step in range(30):
        images, target = mixup(marked, torch.tensor([0, 1]), step)
        assert images.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(images.mean((1, 2, 3)), target[:, 0], atol=1e-5, rtol=0)
        torch.testing.assert_close(target.sum(1), torch.ones(2))
        shares.add(round(target[0, 0].item(), 4))
    assert len(shares) > 10 and marked[0].mean() == 1  # the loader's own batch is untouched


def test_numbers_depend_on_seed_rank_and_step_alone():
    first = Mixup(0.4, 1.0, 0, 4, seed=1)(IMAGES, TARGET, 5)[0]
    assert torch.equal(first, Mixup(0.4, 1.0, 0, 4, seed=1)(IMAGES, TARGET, 5)[0])
    others = [Mixup(0.4, 1.0, 0, 4, seed=2), Mixup(0.4, 1.0, 0, 4, seed=1, rank=1)]
    assert all(not torch.equal(first, other(IMAGES, TARGET, 5)[0]) for other in others)
    assert not torch.equal(first, Mixup(0.4, 1.0, 0, 4, seed=1)(IMAGES, TARGET, 6)[0])
