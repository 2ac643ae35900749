"""Philox against Random123's known answers; what is drawn depends on the image alone, and is spread evenly."""

import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from fastkd.data.draws import below, crop_corners, flips, philox, random_words, resized_boxes, uniform

QUANTILES = torch.arange(1, 10) / 10
# Random123's kat_vectors, philox4x32 with 10 rounds: counter, key, answer
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]
IDS = torch.arange(20_000)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("counter, key, answer", KNOWN)
def test_known_answers(counter, key, answer, device):
    assert philox(torch.tensor(counter, device=device), tuple(key)).tolist() == answer


def test_words_are_the_hash_of_image_epoch_stream_and_block():
    words = random_words(7 << 32 | 5, 3, 9, torch.tensor([1 << 32 | 4]), 6)
    for block in (0, 1):
        want = philox(torch.tensor([4, 1, 3, 9 | block << 16]), (5, 7)).tolist()
        assert words[0, 4 * block : 4 * block + 4].tolist() == want[: 6 - 4 * block]


@pytest.mark.parametrize("draw", [crop_corners, flips, resized_boxes])
def test_a_draw_depends_on_its_image_alone(draw):
    sizes = {crop_corners: (4,), flips: (), resized_boxes: (32, 32)}[draw]
    whole, some = draw(3, 2, IDS, *sizes), torch.tensor([17, 3, 19_999])
    assert torch.equal(draw(3, 2, some, *sizes), whole[some])
    assert torch.equal(draw(3, 2, some[1:2], *sizes), whole[3:4])
    for seed, epoch in ((4, 2), (3, 3), (3 + 2**32, 2)):
        assert not torch.equal(draw(seed, epoch, IDS, *sizes), whole)


def chi_square(values, bins):
    counts = torch.bincount(values, minlength=bins).double()
    expected = len(values) / bins
    assert len(counts) == bins
    return ((counts - expected) ** 2 / expected).sum()


def test_offsets_are_spread_evenly_and_both_axes_are_independent():
    corners = crop_corners(0, 0, IDS, 4) + 4
    assert chi_square(corners[:, 0] * 9 + corners[:, 1], 81) < 124.8  # 80 degrees of freedom, p = 0.001


def test_flips_are_independent_of_offsets_and_of_the_epoch_before():
    before, now = (flips(0, epoch, IDS).long() for epoch in (0, 1))
    corners = crop_corners(0, 1, IDS, 1) + 1
    assert chi_square(before * 2 + now, 4) < 16.3  # 3 degrees of freedom, p = 0.001
    assert chi_square(now * 3 + corners[:, 0], 6) < 20.5  # 5 degrees of freedom
    neighbours = now[::2] * 2 + now[1::2]
    assert chi_square(neighbours, 4) < 16.3


@pytest.mark.parametrize("bit", [0, 13, 31])
def test_every_bit_is_set_half_of_the_time(bit):
    words = random_words(0, 0, 1, IDS, 5)
    assert all(chi_square((column >> bit) & 1, 2) < 10.8 for column in words.unbind(1))


def test_ends_of_the_ranges():
    ends = torch.tensor([0, 2**32 - 1])
    assert below(ends, 9).tolist() == [0, 8] and below(ends, 2**31).tolist() == [0, 2**31 - 1]
    assert 0 < uniform(ends)[0] and uniform(ends)[1] < 1


@pytest.mark.parametrize("stream, count", [(-1, 1), (2**16, 1), (0, 0), (0, 2**18 + 1)])
def test_streams_that_would_overlap_are_refused(stream, count):
    with pytest.raises(ValueError, match=f"got {stream} and {count}"):
        random_words(0, 0, stream, IDS, count)


def test_boxes_fit_and_have_the_areas_of_torchvision():
    boxes = resized_boxes(0, 0, IDS[:4000], 32, 32)
    top, left, height, width = boxes.unbind(1)
    assert (top >= 0).all() and (left >= 0).all() and (boxes[:, 2:] >= 1).all()
    assert (top + height <= 32).all() and (left + width <= 32).all()
    assert (top == 0).any() and (top + height == 32).any()
    torch.manual_seed(0)
    theirs = [RandomResizedCrop.get_params(torch.empty(3, 32, 32), (0.08, 1), (3 / 4, 4 / 3)) for _ in range(4000)]
    theirs = torch.tensor(theirs, dtype=torch.float)
    for ours, want in (
        ((height * width).float(), theirs[:, 2] * theirs[:, 3]),
        (width / height, theirs[:, 3] / theirs[:, 2]),
    ):
        assert (ours.quantile(QUANTILES) - want.quantile(QUANTILES)).abs().max() < 0.05 * want.quantile(0.9)


@pytest.mark.gpu
@pytest.mark.parametrize("draw", [crop_corners, flips, resized_boxes])
def test_a_gpu_draws_the_same(draw):
    sizes = {crop_corners: (4,), flips: (), resized_boxes: (32, 32)}[draw]
    assert torch.equal(draw(3, 2, IDS.cuda(), *sizes).cpu(), draw(3, 2, IDS, *sizes))
