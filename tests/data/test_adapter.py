"""Loaders of the user: a DataLoader trains as it is, a resume gives the same bits, and odd batches are named."""

import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from stopped_run import kill_after
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, Subset, WeightedRandomSampler

from fastkd import Trainer, TrainOptions
from fastkd.data.adapter import AdaptedLoader, adapt
from fastkd.errors import UserError
from fastkd.methods import CE, KD

CPU, LAST = torch.device("cpu"), torch.channels_last


class Images(Dataset):
    """22 images of 4 classes; with `noise` each reading draws from three generators, as augmentation does."""

    classes = ["ant", "bee", "cow", "dog"]

    def __init__(self, noise: bool = True):
        generator = torch.Generator().manual_seed(0)
        self.images, self.noise = torch.randn(22, 3, 8, 8, generator=generator), noise
        self.target = [number % 4 for number in range(22)]

    def __len__(self):
        return 22

    def __getitem__(self, number):
        image = self.images[number]
        if self.noise:
            image = image * (1 + torch.rand(()).item() + random.random() + np.random.rand())
        return image, self.target[number]


def weighted(workers, generator=None):
    sampler = WeightedRandomSampler([1.0 + number for number in range(22)], 22, generator=generator)
    return DataLoader(Images(), batch_size=8, sampler=sampler, num_workers=workers)


LOADERS = {
    "shuffled": lambda: DataLoader(Images(), batch_size=8, shuffle=True),
    "workers": lambda: DataLoader(Images(), batch_size=8, shuffle=True, num_workers=2),
    "own generator": lambda: DataLoader(
        Images(), batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(4)
    ),
    "weighted": lambda: weighted(0, torch.Generator().manual_seed(5)),
    "subset": lambda: DataLoader(Subset(Images(), list(range(2, 22))), batch_size=8, shuffle=True),
}


def fit(tiny_net, loader, out, net_seed=0, **options):
    settings = TrainOptions(epochs=3, lr=0.05, out=str(out), device="cpu", **options)
    val = DataLoader(Images(noise=False), batch_size=5)
    return Trainer(KD(tiny_net(net_seed), tiny_net(9)), loader, val, settings).fit()


@pytest.mark.parametrize(
    "name, saves", [("workers", 1), *((name, saves) for name in LOADERS if name != "workers" for saves in (1, 2, 5))]
)
def test_a_resumed_run_of_a_dataloader_has_the_same_bits(tiny_net, tmp_path, monkeypatch, name, saves):
    """After step 2 of an epoch, before an evaluation, and in the second epoch."""
    whole = fit(tiny_net, LOADERS[name](), tmp_path / "whole")
    written = kill_after(monkeypatch, saves)
    with pytest.raises(KeyboardInterrupt):
        fit(tiny_net, LOADERS[name](), tmp_path / "cut", checkpoint_every="2")
    monkeypatch.undo()
    assert written[-1]["step"] == {1: 2, 2: 3, 5: 3}[saves]
    resumed = fit(tiny_net, LOADERS[name](), tmp_path / "cut", 5, resume=True, checkpoint_every="2")
    wanted, got = load_file(whole.student), load_file(resumed.student)
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)
    assert [row["kd"] for row in resumed.history] == [row["kd"] for row in whole.history]


def test_each_epoch_and_each_image_is_drawn_anew():
    """So that the test above compares runs that draw something."""
    loader = adapted(LOADERS["shuffled"]())
    one, two = (torch.cat([images for images, _ in loader]) for _ in range(2))
    assert not torch.equal(one, two) and loader.epoch == 2


def adapted(loader, classes=None, log=lambda line: None) -> AdaptedLoader:
    return adapt(loader, [], classes, CPU, LAST, log)[0]


@pytest.mark.parametrize("which", [0, 1])
def test_what_can_be_read_once_is_refused(which):
    loaders = [DataLoader(Images(), 4) for _ in range(2)]
    loaders[which] = iter(loaders[which])
    with pytest.raises(UserError, match=r"is an iterator \(_SingleProcessDataLoaderIter\).* give what iter\(\)"):
        adapt(*loaders, None, CPU, LAST, print)


def test_names_of_classes_are_found_or_given():
    data = Images()
    assert adapted(DataLoader(Subset(Subset(data, range(8)), range(4)))).classes == ("ant", "bee", "cow", "dog")
    assert adapted(DataLoader(data), classes=["a", "b", "c", 4]).classes == ("a", "b", "c", "4")
    plain = DataLoader(list(zip(data.images, data.target, strict=True)))
    with pytest.raises(UserError, match=r"train_loader \(DataLoader\) has no class names .*classes=\[...\]"):
        adapted(plain)
    assert adapted(plain, classes=list("abcd")).samples == 22
    for wrong in ("abcd", 4):
        with pytest.raises(UserError, match="classes must be a list of names"):
            adapted(plain, classes=wrong)


def test_a_loader_whose_resume_is_not_exact_is_said():
    said: list[str] = []
    for persistent in (False, True):
        loader = DataLoader(Images(), batch_size=8, num_workers=1, persistent_workers=persistent)
        adapt(loader, LOADERS["shuffled"](), None, CPU, LAST, said.append)
    assert len(said) == 1 and "persistent_workers=False keeps a resume exact" in said[0]


def test_batches_are_on_the_device_in_the_memory_format_and_nothing_is_cast():
    loader = adapted(DataLoader(Images(), batch_size=8))
    images, target = next(iter(loader))
    assert images.is_contiguous(memory_format=LAST) and images.dtype == torch.float32
    assert target.tolist() == [0, 1, 2, 3, 0, 1, 2, 3] and len(loader) == 3


def test_any_iterable_with_a_length_trains(tiny_net, tmp_path):
    data = Images(noise=False)
    batches = [(data.images[:11], torch.tensor(data.target[:11])), (data.images[11:], torch.tensor(data.target[11:]))]
    options = TrainOptions(epochs=2, out=str(tmp_path / "run"), device="cpu")
    trainer = Trainer(CE(tiny_net()), batches, batches[:1], options, classes=data.classes)
    trainer.fit()
    assert trainer.data["classes"] == data.classes and [row["epoch"] for row in trainer.history] == [1, 2]


def test_a_distributed_sampler_gets_the_epoch():
    sampler = DistributedSampler(Images(), num_replicas=2, rank=1)
    loader = adapted(DataLoader(Images(), batch_size=11, sampler=sampler))
    for epoch in range(2):
        assert [len(target) for _, target in loader] == [11] and sampler.epoch == epoch
    loader.load_state_dict({"epoch": 7, "generators": []})
    next(iter(loader))
    assert sampler.epoch == 7 == loader.epoch - 1


class Stream(IterableDataset):
    classes = ("a", "b")

    def __iter__(self):
        return iter([])


IMAGES, TARGET = torch.zeros(4, 3, 8, 8), torch.arange(4)
ODD = {
    "dict": ({"pixel_values": IMAGES, "labels": TARGET}, "gives a dict of pixel_values, labels; a batch is the pair"),
    "three": ((IMAGES, TARGET, TARGET), "gives a tuple of Tensor, Tensor, Tensor; a batch is the pair"),
    "tensor": (IMAGES, "gives a Tensor; a batch is the pair"),
    "bytes": ((IMAGES.byte(), TARGET), "gives images .4, 3, 8, 8. of torch.uint8"),
    "grey": ((IMAGES[:, :1], TARGET), "gives images .4, 1, 8, 8. of"),
    "labels": ((IMAGES, TARGET[:3]), "gives labels .3. for 4 images"),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_batch_is_one_clear_error_before_anything_is_written(tiny_net, tmp_path, name):
    batch, words = ODD[name]
    good, options = [(IMAGES, TARGET)], TrainOptions(epochs=1, out=str(tmp_path / "run"), device="cpu")
    with pytest.raises(UserError, match=f"train_loader {words}"):
        Trainer(CE(tiny_net()), [batch], good, options, classes=list("abcd"))
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=f"val_loader {words}"):
        Trainer(CE(tiny_net()), good, [batch], options, classes=list("abcd")).fit()


def test_other_wrong_loaders(tiny_net, tmp_path):
    options = TrainOptions(epochs=1, out=str(tmp_path / "run"), device="cpu")
    trainer = lambda train, **more: Trainer(CE(tiny_net()), train, [(IMAGES, TARGET)], options, **more)  # noqa: E731
    with pytest.raises(UserError, match=r"train_loader is an iterator \(generator\)"):
        trainer(iter_of := (pair for pair in [(IMAGES, TARGET)]), classes=list("abcd"))
    assert next(iter_of, None)
    with pytest.raises(UserError, match=r"train_loader \(DataLoader\) has no length"):
        trainer(DataLoader(Stream()))
    with pytest.raises(UserError, match="labels .4. of torch.int32 .*int64"):
        trainer([(IMAGES, TARGET.int())], classes=list("abcd"))
    with pytest.raises(UserError, match="classes=.'a', 'b'. are not those of train_loader"):
        adapted(adapted([(IMAGES, TARGET)], classes=list("abcd")), classes=["a", "b"])
    with pytest.raises(UserError, match="0 generators of its own and the checkpoint 1"):
        adapted([(IMAGES, TARGET)], classes=list("abcd")).load_state_dict({"epoch": 1, "generators": [torch.zeros(1)]})
    assert not (tmp_path / "run").exists()
