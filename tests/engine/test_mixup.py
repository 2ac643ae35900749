"""mixup, CutMix and label smoothing."""

import pytest
import torch
import torch.nn.functional as F

from fastkd.data.augment import mixtures
from fastkd.engine.mixup import Mixup

IMAGES = torch.randn(6, 3, 8, 8).contiguous(memory_format=torch.channels_last)
TARGET = torch.tensor([0, 1, 2, 3, 0, 1])
NUMBERS = torch.arange(6)


def test_off_passes_the_batch_through():
    images, target = Mixup(0, 0, 0, 4)(IMAGES, TARGET, 0, NUMBERS)
    assert images is IMAGES and target is TARGET


def test_smoothing_is_torchs():
    _, target = Mixup(0, 0, 0.1, 4)(IMAGES, TARGET, 0, NUMBERS)
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
        images, target = mixup(marked, torch.tensor([0, 1]), step, torch.arange(2))
        assert images.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(images.mean((1, 2, 3)), target[:, 0], atol=1e-5, rtol=0)
        torch.testing.assert_close(target.sum(1), torch.ones(2))
        shares.add(round(target[0, 0].item(), 4))
    assert len(shares) > 10 and marked[0].mean() == 1  # the loader's own batch is untouched


@pytest.mark.parametrize("count", [6, 5])
def test_each_image_is_mixed_with_its_partner(count):
    """One image at a time, as the formulas say."""
    mixup, numbers = Mixup(0.4, 1.0, 0.1, 4, seed=1), torch.arange(70, 70 + count)
    images, target = mixup(IMAGES[:count], TARGET[:count], 3, numbers)
    drawn = mixtures(1, 3, numbers, (8, 8), 0.4, 1.0)
    soft = F.one_hot(TARGET, 4) * 0.9 + 0.1 / 4
    for i, (weight, share, *box) in enumerate(drawn.tolist()):
        partner = i ^ 1 if i ^ 1 < count else i
        want = weight * IMAGES[i] + (1 - weight) * IMAGES[partner]
        top, left, bottom, right = map(int, box)
        want[:, top:bottom, left:right] = IMAGES[partner, :, top:bottom, left:right]
        torch.testing.assert_close(images[i], want)
        torch.testing.assert_close(target[i], share * soft[i] + (1 - share) * soft[partner])
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_numbers_depend_on_seed_view_and_sample_alone():
    first = Mixup(0.4, 1.0, 0, 4, seed=1)(IMAGES, TARGET, 5, NUMBERS)[0]
    parts = [
        Mixup(0.4, 1.0, 0, 4, seed=1)(IMAGES[i : i + 2], TARGET[i : i + 2], 5, NUMBERS[i : i + 2])[0] for i in (0, 2, 4)
    ]
    assert torch.equal(first, torch.cat(parts))
    for seed, view, numbers in ((2, 5, NUMBERS), (1, 6, NUMBERS), (1, 5, NUMBERS + 1)):
        assert not torch.equal(first, Mixup(0.4, 1.0, 0, 4, seed=seed)(IMAGES, TARGET, view, numbers)[0])
