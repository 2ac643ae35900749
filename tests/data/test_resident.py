"""Images on the device: crops, flips and normalisation."""

import pytest
import torch

from fastkd.data.order import Shard
from fastkd.data.resident import Augmentation, ResidentLoader, ResidentSet

CPU = torch.device("cpu")
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def images(count=23, channels=3) -> ResidentSet:
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, 12, 12, channels), dtype=torch.uint8, generator=random)
    return ResidentSet(("a", "b"), pixels, torch.arange(count))


def loader(augmentation, batch_size=5, shard=None, train=True, channels=3):
    options = {"train": train, "mean": MEAN, "std": STD, "image_size": 12}
    return ResidentLoader(images(channels=channels), augmentation, batch_size, CPU, shard or Shard(seed=3), **options)


@pytest.mark.parametrize("channels", [1, 3])
def test_evaluation_is_the_plain_formula(channels):
    val = loader(Augmentation("pad-crop", 4, "reflect", True), train=False, channels=channels)
    got = torch.cat([batch for batch, _ in val])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    want = (images(channels=channels).images.permute(0, 3, 1, 2) / 255 - mean) / std
    assert torch.equal(got, want) and got.is_contiguous(memory_format=torch.channels_last)
    assert torch.cat([target for _, target in val]).tolist() == list(range(23))


@pytest.mark.parametrize("kind", ["pad-crop", "rrc", "none"])
def test_an_image_depends_on_seed_epoch_and_number_alone(kind):
    augmentation = Augmentation(kind, 4 if kind == "pad-crop" else 0, "reflect", kind != "none")
    by_number = []
    for batch_size, world_size in ((5, 1), (23, 1), (4, 2)):
        found = {}
        for rank in range(world_size):
            train = loader(augmentation, batch_size, Shard(3, rank, world_size))
            train.epoch = 2
            for batch, target in train:
                assert batch.shape == (len(target), 3, 12, 12)
                found |= dict(zip(target.tolist(), batch, strict=True))
        assert sorted(found) == list(range(23))  # each image once
        by_number.append(found)
    assert all(torch.equal(one[i], by_number[0][i]) for one in by_number for i in range(23))
    train = loader(augmentation, 23)
    first, second = (dict(zip(target.tolist(), batch, strict=True)) for _ in range(2) for batch, target in train)
    assert all(torch.equal(first[i], second[i]) for i in range(23)) == (kind == "none")


def test_offsets_and_flips_are_all_drawn_equally_often():
    pixels = torch.arange(12 * 12, dtype=torch.uint8).view(1, 12, 12, 1).expand(4000, -1, -1, -1)
    many = ResidentSet(("a", "b"), pixels, torch.zeros(4000, dtype=torch.int64))
    options = {"train": True, "mean": (0.0,) * 3, "std": (1 / 255,) * 3, "image_size": 12}
    train = ResidentLoader(many, Augmentation("pad-crop", 1, "reflect", True), 4000, CPU, Shard(), **options)
    drawn = next(iter(train))[0].round().long()
    centre, beside = drawn[:, 0, 5, 5], drawn[:, 0, 5, 6]
    counts = torch.stack([centre, beside - centre], 1).unique(dim=0, return_counts=True)[1]
    assert len(counts) == 18 and ((counts - 4000 / 18) ** 2 / (4000 / 18)).sum() < 41  # chi-square, p = 0.001


def test_a_run_goes_on_with_the_same_batches():
    augmentation = Augmentation("pad-crop", 2, "zeros", True)
    one, other = loader(augmentation), loader(augmentation)
    list(one)
    other.load_state_dict(one.state_dict())
    for (mine, target), (theirs, same) in zip(one, other, strict=True):
        assert torch.equal(mine, theirs) and torch.equal(target, same)


def test_planar_images_are_stored_by_pixels_once():
    """The kernel needs contiguous images. It would copy the whole set for every batch."""
    planar = images()._replace(images=images().images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1))
    options = {"train": True, "mean": MEAN, "std": STD, "image_size": 12}
    train = ResidentLoader(planar, Augmentation("pad-crop", 2, "zeros", True), 5, CPU, Shard(seed=3), **options)
    assert train.images.is_contiguous()
    for (mine, _), (theirs, _) in zip(train, loader(Augmentation("pad-crop", 2, "zeros", True)), strict=True):
        assert torch.equal(mine, theirs)
