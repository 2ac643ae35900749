"""The embedded digits."""

import numpy as np
import pytest
import torch

from fastkd.data import DataOptions, create_loaders
from fastkd.data.digits import is_for_evaluation, read_digits

CPU = torch.device("cpu")


def loaders(batch_size=128, device=CPU, **more):
    return create_loaders(DataOptions(batch_size=batch_size), device, log=lambda line: None, **more)


def epoch(loader):
    images, targets = zip(*[(i.clone(), t.clone()) for i, t in loader], strict=True)
    return torch.cat(images), torch.cat(targets)


def test_file_is_what_sklearn_gives():
    sklearn = pytest.importorskip("sklearn.datasets").load_digits()
    import fastkd.data.digits as module

    with np.load(module.Path(module.__file__).with_name("digits.npz")) as file:
        assert file["images"].dtype == np.uint8 and (file["images"] == sklearn.images).all()
        assert file["target"].dtype == np.uint8 and (file["target"] == sklearn.target).all()


def test_split_is_stratified_and_complete():
    _, target = read_digits()
    held_out = is_for_evaluation(target)
    share = [(held_out & (target == label)).sum() / (target == label).sum() for label in range(10)]
    assert all(0.19 < value <= 0.2 for value in share)
    train, val = loaders()
    assert (train.samples, val.samples) == (1442, 355) and train.classes == tuple("0123456789")


def test_batches_have_the_promised_form():
    train, val = loaders()
    for loader in (train, val):
        batches = list(loader)
        assert len(batches) == len(loader) and sum(len(target) for _, target in batches) == loader.samples
        for images, target in batches:
            assert images.shape == (len(target), 3, 32, 32) and images.dtype == torch.float32
            assert images.is_contiguous(memory_format=torch.channels_last) and target.dtype == torch.int64
            assert torch.equal(images[:, 0], images[:, 2])
    images, _ = epoch(val)
    assert abs(images.mean()) < 0.05 and abs(images.std() - 1) < 0.05


def test_evaluation_images_are_the_enlarged_digits():
    images, target = read_digits()
    chosen = is_for_evaluation(target)
    val = loaders()[1]
    got, got_target = epoch(val)
    rounded = images[chosen].mul(255).round() / 255
    assert torch.allclose(got[:, 0], (rounded - val.mean[0]) / val.std[0], atol=1e-6)
    assert torch.equal(got_target, target[chosen])


def test_training_images_are_shifts_of_the_training_digits():
    images, target = read_digits()
    chosen = ~is_for_evaluation(target)
    train = loaders()[0]
    rounded = images[chosen].mul(255).round() / 255
    padded = torch.nn.functional.pad(rounded, (4,) * 4).sub(train.mean[0]).div(train.std[0])
    got, got_target = epoch(train)
    for image, label in zip(got[:6], got_target[:6], strict=True):
        every = padded[target[chosen] == label].unfold(1, 32, 1).unfold(2, 32, 1)  # [n, 9, 9, 32, 32]
        assert (every - image[0]).abs().amax((-1, -2)).min() < 1e-6


def test_two_processes_share_an_epoch():
    whole, _ = epoch(loaders(100)[0])
    parts = [epoch(loaders(100, rank=rank, world_size=2)[0])[0] for rank in range(2)]
    assert torch.equal(torch.cat(parts), whole)
    assert len(loaders(100, rank=0, world_size=2)[0]) == len(loaders(100, rank=1, world_size=2)[0]) == 8


def test_resume_is_exact_and_epochs_differ():
    train, _ = loaders(seed=5)
    first, _ = epoch(train)
    state = train.state_dict()
    second, target = epoch(train)
    again, _ = loaders(seed=5)
    again.load_state_dict(state)
    images, targets = epoch(again)
    assert torch.equal(images, second) and torch.equal(targets, target) and not torch.equal(first, second)
    assert not torch.equal(epoch(loaders(seed=6)[0])[0], first)


def test_an_epoch_left_in_its_middle_is_given_again():
    train, _ = loaders()
    start = next(iter(train))[0].clone()
    assert train.state_dict()["epoch"] == 0 and torch.equal(next(iter(train))[0], start)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_the_gpu_the_batches_are_the_same():
    cuda, _ = epoch(loaders(device=torch.device("cuda"), dtype=torch.float16)[0])
    assert cuda.is_cuda and torch.equal(cuda.cpu(), epoch(loaders(dtype=torch.float16)[0])[0])
