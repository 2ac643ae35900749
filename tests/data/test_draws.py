"""The generator against its published answers, and what it draws against the distributions."""

import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from fastkd.data.draws import crops_and_flips, fractions, integers, philox, resized_boxes, words

ONES, PI = (0xFFFFFFFF,) * 4, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [  # kat_vectors of Random123, philox4x32 10
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (ONES, ONES[:2], (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (PI, (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ],
)
def test_published_answers(counter, key, answer):
    assert tuple(word.item() for word in philox([torch.tensor([word]) for word in counter], key)) == answer


def test_a_draw_depends_on_its_own_sample_alone():
    whole = words(7, 3, torch.arange(100), 1)
    part = words(7, 3, torch.tensor([41, 5, 99]), 1)
    assert all(torch.equal(one[[41, 5, 99]], other) for one, other in zip(whole, part, strict=True))
    others = [words(8, 3, torch.arange(100), 1), words(7, 4, torch.arange(100), 1), words(7, 3, torch.arange(100), 2)]
    assert all((other[0] != whole[0]).all() for other in others)
    far = words(7, 3, torch.arange(100) + 2**32, 1)  # a data set may have more than 2^32 samples
    assert (far[0] != whole[0]).all()


def test_large_seeds_and_epochs():
    for seed, epoch in ((2**32 - 1, 0), (0, 2**31), (2**40 + 1, 5)):
        word = words(seed, epoch, torch.arange(4), 0)[0]
        assert (word >= 0).all() and (word < 2**32).all()


def chi_square(counts: torch.Tensor) -> float:
    wanted = counts.sum() / len(counts)
    return ((counts - wanted) ** 2 / wanted).sum().item()


def test_offsets_and_flips_are_uniform_and_independent():
    corners, flips = crops_and_flips(1, 2, torch.arange(81 * 2 * 100), pad=4, flip=True)
    kinds = corners[:, 0] * 18 + corners[:, 1] * 2 + flips
    assert chi_square(kinds.bincount(minlength=162).double()) < 223  # 161 degrees of freedom, p = 0.001
    assert not crops_and_flips(1, 2, torch.arange(50), pad=4, flip=False)[1].any()
    assert (crops_and_flips(1, 2, torch.arange(50), pad=0, flip=False)[0] == 0).all()


def test_integers_and_fractions_keep_their_limits():
    edges = torch.tensor([0, 1, 2**31, 2**32 - 1])
    assert integers(edges, 9).tolist() == [0, 0, 4, 8]
    assert fractions(edges).min() == 0 and fractions(edges).max() < 1


def test_boxes_are_those_of_torchvision():
    boxes = resized_boxes(0, 0, torch.arange(4000), (32, 32))
    top, left, height, width = boxes.unbind(1)
    assert (boxes == boxes.round()).all() and (top >= 0).all() and (left >= 0).all()
    assert (top + height <= 32).all() and (left + width <= 32).all()
    torch.manual_seed(0)
    drawn = [RandomResizedCrop.get_params(torch.empty(3, 32, 32), (0.08, 1), (3 / 4, 4 / 3)) for _ in range(4000)]
    theirs = torch.tensor(drawn, dtype=torch.float)
    quantiles = torch.arange(1, 10) / 10
    for ours, want in (
        (height * width, theirs[:, 2] * theirs[:, 3]),
        (width / height, theirs[:, 3] / theirs[:, 2]),
        (top, theirs[:, 0]),
        (left, theirs[:, 1]),
    ):
        assert (ours.quantile(quantiles) - want.quantile(quantiles)).abs().max() <= 0.05 * want.quantile(0.9) + 1


def test_a_box_that_never_fits_is_the_whole_image():
    assert resized_boxes(0, 0, torch.arange(3), (4, 400), tries=0).tolist() == [[0, 0, 4, 400]] * 3


@pytest.mark.gpu
def test_the_gpu_draws_the_same_bits():
    samples = torch.arange(1000)
    for one, other in zip(words(3, 4, samples, 5), words(3, 4, samples.cuda(), 5), strict=True):
        assert torch.equal(one, other.cpu())
