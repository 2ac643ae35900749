"""The torchvision loader."""

import gc
import os

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from fastkd.data import DataOptions, create_loaders, stored
from fastkd.data.base import IMAGENET_MEAN, IMAGENET_STD
from fastkd.data.scan import scan
from fastkd.errors import UserError

CPU = torch.device("cpu")


def loaders(root, workers=0, batch_size=8, image_size=64, device=CPU, **more):
    options = DataOptions(
        data=str(root), loader="folder", workers=workers, batch_size=batch_size, image_size=image_size
    )
    return create_loaders(options, device, **more)


def epoch(loader):
    images, targets = zip(*[(i.clone(), t.clone()) for i, t in loader], strict=True)
    return torch.cat(images), torch.cat(targets)


def test_batches_have_the_promised_form(pictures):
    train, val = loaders(pictures)
    assert train.classes == ("ant", "bee", "cow") and (train.samples, val.samples) == (27, 36)
    for loader, sizes in ((train, [8, 8, 8, 3]), (val, [8, 8, 8, 8, 4])):
        batches = list(loader)
        assert [len(target) for _, target in batches] == sizes and len(loader) == len(sizes)
        for images, target in batches:
            assert images.shape == (len(target), 3, 64, 64) and images.dtype == torch.float32
            assert images.is_contiguous(memory_format=torch.channels_last) and target.dtype == torch.int64
            assert -2.2 < images.min() and images.max() < 2.7
    assert sorted(epoch(train)[1].tolist()) == [0] * 9 + [1] * 9 + [2] * 9


def test_evaluation_is_what_pil_and_torchvision_give(pictures):
    split = scan(str(pictures / "val"))
    images, target = epoch(loaders(pictures, image_size=224)[1])
    transform = v2.Compose([v2.Resize(256), v2.CenterCrop(224)])
    std, mean = torch.tensor(IMAGENET_STD).view(3, 1, 1), torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
    assert target.tolist() == split.labels
    for image, file in zip(images, split.files, strict=True):
        want = np.asarray(transform(Image.open(file).convert("RGB")))
        got = (image * std + mean).permute(1, 2, 0).mul(255).numpy()
        assert np.abs(got - want).mean() < 0.6, file  # in steps of 1/255


def test_workers_and_processes_do_not_change_an_image(pictures):
    alone, target = epoch(loaders(pictures)[0])
    workers, _ = epoch(loaders(pictures, workers=2)[0])
    assert torch.equal(alone, workers)
    parts = [epoch(loaders(pictures, rank=rank, world_size=2)[0]) for rank in range(2)]
    assert torch.equal(torch.cat([images for images, _ in parts]), alone)
    assert torch.equal(torch.cat([targets for _, targets in parts]), target)


def test_evaluation_of_more_processes_than_images(small):
    shares = [list(loaders(small, rank=rank, world_size=3)[1]) for rank in range(3)]
    assert sum(len(target) for share in shares for _, target in share) == 2 and [] in shares


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_exact_and_epochs_differ(pictures, workers):
    train, _ = loaders(pictures, workers, seed=4)
    first, _ = epoch(train)
    state = train.state_dict()
    second, target = epoch(train)
    again, _ = loaders(pictures, workers, seed=4)
    again.load_state_dict(state)
    images, targets = epoch(again)
    assert torch.equal(images, second) and torch.equal(targets, target) and not torch.equal(first, second)


def test_an_epoch_left_in_its_middle_is_given_again(pictures):
    train, _ = loaders(pictures, workers=1)
    start = next(iter(train))[0].clone()
    assert train.state_dict()["epoch"] == 0 and torch.equal(next(iter(train))[0], start)


def test_the_training_process_keeps_its_random_numbers(pictures):
    train, _ = loaders(pictures)
    torch.manual_seed(1)
    want = torch.rand(3)
    torch.manual_seed(1)
    list(train)
    assert torch.equal(torch.rand(3), want)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_truncated_jpeg_is_named(truncated, workers):
    train, _ = loaders(truncated.parents[2], workers)
    with pytest.raises(UserError) as caught:
        list(train)
    assert str(truncated) in str(caught.value) and "cannot be decoded" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_the_rounded_float(pictures, dtype):
    half, _ = epoch(loaders(pictures, dtype=dtype)[1])
    assert half.dtype == dtype and torch.equal(half, epoch(loaders(pictures)[1])[0].to(dtype))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_the_gpu_the_batches_are_the_same(pictures):
    cuda, target = epoch(loaders(pictures, workers=2, device=torch.device("cuda"))[0])
    want, want_target = epoch(loaders(pictures)[0])
    assert cuda.is_cuda and torch.allclose(cuda.cpu(), want, atol=1e-5) and torch.equal(target.cpu(), want_target)


def test_a_loader_that_is_dropped_ends_its_workers(small):
    """A cycle of references would leave it to the garbage collector, where torch waits 5 s for each worker."""
    train = loaders(small, workers=1)[0]
    list(train)
    (worker,) = train.decoded._iterator._workers
    del train
    assert not worker.is_alive()


def test_a_worker_leaves_the_garbage_of_its_parent_alone(pictures, monkeypatch, tmp_path):
    """A pipeline of DALI that ends in a forked process kills it."""

    class Cycle:
        def __init__(self):
            self.me = self

        def __del__(self):
            (tmp_path / str(os.getpid())).touch()

    decode = stored.decode
    monkeypatch.setattr(stored, "decode", lambda *how: (gc.collect(), decode(*how))[1])
    train, _ = loaders(pictures, workers=1)
    gc.disable()
    try:
        Cycle()
        assert len(epoch(train)[1]) == 27 and os.listdir(tmp_path) == []
    finally:
        gc.enable()
