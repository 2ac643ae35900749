"""The synthetic loader."""

import pytest
import torch

from fastkd.data import DataOptions, create_loaders

OPTIONS = DataOptions(data="synthetic", batch_size=8, image_size=16, synthetic_classes=5, synthetic_samples=59)


def loaders(device="cpu", **more):
    return create_loaders(OPTIONS, torch.device(device), **more)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_batches_have_the_promised_form(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    train, val = loaders(device, dtype=torch.bfloat16)
    sizes = []
    for images, target in train:
        assert images.shape == (len(target), 3, 16, 16) and images.dtype == torch.bfloat16
        assert images.device.type == target.device.type == device
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert (images != 0).float().mean() > 0.99 and 0 <= target.min() and target.max() < 5
        sizes.append(len(target))
    assert sizes == [8] * 7 + [3] and len(train) == 8 and len(train.classes) == 5
    assert val.samples == 6 and sum(len(target) for _, target in val) == 6


def test_a_few_batches_are_handed_out_in_turn_uncopied():
    train, _ = loaders()
    batches = list(train)
    assert batches[0][0].data_ptr() == batches[4][0].data_ptr() != batches[1][0].data_ptr()


def test_processes_share_the_epoch_with_images_of_their_own():
    pair = [loaders(rank=rank, world_size=2)[0] for rank in range(2)]
    assert sum(len(target) for train in pair for _, target in train) == 59 and len(pair[0]) == len(pair[1])
    assert not torch.equal(next(iter(pair[0]))[0], next(iter(pair[1]))[0])


def test_the_same_seed_gives_the_same_images_and_the_epoch_is_the_state():
    train, again = loaders(seed=3)[0], loaders(seed=3)[0]
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(train, again, strict=True))
    again.load_state_dict(train.state_dict())
    assert again.state_dict() == {"loader": "synthetic", "epoch": 1, "step": 0}
