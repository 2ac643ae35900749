"""Crops, flips and mixtures against their distributions."""

import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from fastkd.data.augment import crops_and_flips, mixtures, resized_boxes


def chi_square(counts: torch.Tensor) -> float:
    wanted = counts.sum() / len(counts)
    return ((counts - wanted) ** 2 / wanted).sum().item()


def test_offsets_and_flips_are_uniform_and_independent():
    corners, flips = crops_and_flips(1, 2, torch.arange(81 * 2 * 100), pad=4, flip=True)
    kinds = corners[:, 0] * 18 + corners[:, 1] * 2 + flips
    assert chi_square(kinds.bincount(minlength=162).double()) < 223  # 161 degrees of freedom, p = 0.001
    assert not crops_and_flips(1, 2, torch.arange(50), pad=4, flip=False)[1].any()
    assert (crops_and_flips(1, 2, torch.arange(50), pad=0, flip=False)[0] == 0).all()


def distance(ours, theirs):
    """Kolmogorov and Smirnov's: the largest difference of two empirical distribution functions."""
    places = torch.cat([ours, theirs]).sort().values.double()
    below = [torch.searchsorted(each.double().sort().values, places, right=True) / len(each) for each in (ours, theirs)]
    return (below[0] - below[1]).abs().max().item()


@pytest.mark.parametrize("size", [(32, 32), (375, 500), (40, 400), (500, 60)])
def test_boxes_are_those_of_torchvision(size):
    count = 6000
    boxes = resized_boxes(0, 0, torch.arange(count), size)
    top, left, height, width = boxes.unbind(1)
    assert (boxes == boxes.round()).all() and (top >= 0).all() and (left >= 0).all()
    assert (top + height <= size[0]).all() and (left + width <= size[1]).all()
    torch.manual_seed(0)
    drawn = [RandomResizedCrop.get_params(torch.empty(3, *size), (0.08, 1), (3 / 4, 4 / 3)) for _ in range(count)]
    theirs = torch.tensor(drawn, dtype=torch.float)
    limit = 1.95 * (2 / count) ** 0.5  # p = 0.001
    for ours, want in (
        (height * width, theirs[:, 2] * theirs[:, 3]),
        (width / height, theirs[:, 3] / theirs[:, 2]),
        (top, theirs[:, 0]),
        (left, theirs[:, 1]),
    ):
        assert distance(ours, want) < limit


def test_images_of_several_sizes_have_the_boxes_of_each():
    samples, sizes = torch.tensor([7, 3, 900]), torch.tensor([[30, 50], [200, 20], [64, 64]])
    together = resized_boxes(4, 9, samples, sizes)
    for number, size, box in zip(samples, sizes, together, strict=True):
        assert torch.equal(resized_boxes(4, 9, number[None], tuple(size.tolist()))[0], box)
    assert resized_boxes(0, 0, torch.arange(0), torch.zeros(0, 2)).shape == (0, 4)


@pytest.mark.parametrize(
    ("size", "want"), [((4, 400), [0, 197, 4, 5]), ((400, 4), [197, 0, 5, 4]), ((30, 32), [0, 0, 30, 32])]
)
def test_boxes_that_never_fit_are_centred(size, want):
    """torchvision's way, too: the whole image, or its largest part with an allowed aspect."""
    assert resized_boxes(0, 0, torch.arange(3), size, tries=0).tolist() == [want] * 3


SIZE = (40, 50)


@pytest.mark.parametrize("alpha", [0.1, 0.2, 1.0, 5.0, 100.0, 1000.0])
def test_mixup_has_the_beta_distribution(alpha):
    drawn = mixtures(1, 2, torch.arange(6000), SIZE, mixup=alpha)
    want = torch.distributions.Beta(torch.tensor(alpha).double(), torch.tensor(alpha).double()).sample((6000,))
    assert distance(drawn[:, 0], want.float()) < 1.95 * (2 / 6000) ** 0.5
    assert torch.equal(drawn[:, 0], drawn[:, 1]) and torch.equal(drawn[:, 2:4], drawn[:, 4:])  # an empty box


def test_cutmix_has_its_boxes():
    drawn = mixtures(1, 2, torch.arange(6000), SIZE, cutmix=1.0)
    weight, share, top, left, bottom, right = drawn.unbind(1)
    assert (weight == 1).all() and (top <= bottom).all() and (left <= right).all()
    assert (top >= 0).all() and (left >= 0).all() and (bottom <= SIZE[0]).all() and (right <= SIZE[1]).all()
    torch.testing.assert_close(share, 1 - (bottom - top) * (right - left) / (SIZE[0] * SIZE[1]))
    inner = (top > 0) & (left > 0) & (bottom < SIZE[0]) & (right < SIZE[1])
    torch.testing.assert_close(
        ((bottom - top) / SIZE[0])[inner], ((right - left) / SIZE[1])[inner], atol=0.046, rtol=0
    )  # the shape of the image, up to the rounding to pixels
    assert share.min() < 0.05 and share.max() > 0.99


def test_both_are_drawn_equally_often_and_each_as_alone():
    both, added, cut = (
        mixtures(1, 2, torch.arange(4000), SIZE, *alphas) for alphas in ((0.4, 1.0), (0.4, 0.0), (0.0, 1.0))
    )
    is_added, is_cut = (both == added).all(1), (both == cut).all(1)
    assert (is_added | is_cut).all() and (is_added & is_cut).sum() < 200  # a box without a pixel, a share of 1
    assert 1850 < is_cut.sum() < 2150


def test_a_draw_depends_on_seed_view_and_sample_alone():
    def drawn(seed, view, samples):
        return [
            *crops_and_flips(seed, view, samples, 4, True),
            resized_boxes(seed, view, samples, (99, 77)),
            mixtures(seed, view, samples, SIZE, 0.4, 1.0),
        ]

    some = torch.tensor([41, 5, 99])
    whole = drawn(7, 3, torch.arange(100))
    assert all(torch.equal(one[some], other) for one, other in zip(whole, drawn(7, 3, some), strict=True))
    for others in (drawn(8, 3, torch.arange(100)), drawn(7, 4, torch.arange(100))):
        assert not any(torch.equal(one, other) for one, other in zip(whole, others, strict=True))
