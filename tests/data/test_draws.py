"""The generator against its published answers."""

import pytest
import torch

from fastkd.data.draws import fractions, integers, philox, words

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


def test_streams_in_one_pass():
    streams = torch.tensor([[16], [17], [40]])
    together = words(7, 3, torch.arange(10), streams)
    for row, stream in enumerate((16, 17, 40)):
        alone = words(7, 3, torch.arange(10), stream)
        assert all(torch.equal(one[row], other) for one, other in zip(together, alone, strict=True))


def test_large_seeds_and_epochs():
    for seed, epoch in ((2**32 - 1, 0), (0, 2**31), (2**40 + 1, 5)):
        word = words(seed, epoch, torch.arange(4), 0)[0]
        assert (word >= 0).all() and (word < 2**32).all()


def test_integers_and_fractions_keep_their_limits():
    edges = torch.tensor([0, 1, 2**31, 2**32 - 1])
    assert integers(edges, 9).tolist() == [0, 0, 4, 8]
    assert fractions(edges).min() == 0 and fractions(edges).max() < 1


@pytest.mark.gpu
def test_the_gpu_draws_the_same_bits():
    samples = torch.arange(1000)
    for one, other in zip(words(3, 4, samples, 5), words(3, 4, samples.cuda(), 5), strict=True):
        assert torch.equal(one, other.cpu())
