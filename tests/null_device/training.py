"""Job: `fastkd train` from the first line to the last, on digits and on a folder of JPEGs."""

import pytest
import torch
from null_device.checks import no_host_sync
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from fastkd import Trainer, TrainOptions, create_model
from fastkd.data.adapter import AdaptedLoader
from fastkd.methods import CE

DIGITS = ("--recipe", "digits", "--epochs", "2", "--batch-size", "64", "--student", "resnet8", "--teacher", "resnet8")


@pytest.fixture
def jpegs(tmp_path):
    for split in ("train", "val"):
        for kind in ("ant", "bee", "cow"):
            folder = tmp_path / "images" / split / kind
            folder.mkdir(parents=True)
            for number in range(8):
                Image.new("RGB", (40 + number, 48), (30 * number, 90, 60)).save(folder / f"{number}.jpg")
    return tmp_path / "images"


def check(result, *words: str) -> None:
    status, out, err = result
    assert status == 0, err + out[-3000:]
    for word in words:
        assert word in out, out[-3000:]


@pytest.mark.parametrize("options", [("--method", "kd"), ("--method", "iakd", "--amp-dtype", "float16")], ids=str)
def test_digits_with_graphs(fastkd, few_digits, options):
    check(fastkd("train", *DIGITS, *options, "--graph", "on", "--no-baseline"), "CUDA graph")


def test_a_folder_of_jpegs_with_graphs(fastkd, few_digits, jpegs):
    data = ("--data", jpegs, "--loader", "folder", "--workers", "0", "--batch-size", "6", "--image-size", "32")
    nets = ("--student", "resnet8", "--teacher", "resnet8", "--method", "kd", "--epochs", "2", "--warmup-epochs", "1")
    more = ("--teacher-epochs", "1", "--mixup", "0.2", "--ema-decay", "0.9")
    check(fastkd("train", *data, *nets, *more, "--graph", "on", "--no-baseline"), "CUDA graph")


def test_packed_images_with_graphs(fastkd, few_digits, jpegs, tmp_path):
    check(fastkd("pack", jpegs, tmp_path / "packed", "--size", "80", "--workers", "0"), "24 images for train")
    data = ("--data", tmp_path / "packed", "--workers", "2", "--batch-size", "6", "--image-size", "32")
    nets = ("--student", "resnet8", "--teacher", "resnet8", "--method", "kd", "--epochs", "2", "--warmup-epochs", "1")
    more = ("--teacher-epochs", "1", "--mixup", "0.2", "--graph", "on", "--no-baseline")
    check(fastkd("train", *data, *nets, *more), "CUDA graph", "packed images of 80 pixels")


def test_a_dataloader_and_a_callback(tmp_path):
    """Its batches are sent without a wait, in the trainer's layout; steps are graphs, and a callback follows them."""
    data = TensorDataset(torch.randn(20, 3, 32, 32), torch.arange(20) % 4)
    loader, seen = DataLoader(data, batch_size=8), []
    with no_host_sync():
        batches = list(AdaptedLoader(loader, "abcd", torch.device("cuda"), torch.channels_last))
    assert [target.cpu().tolist() for _, target in batches] == [target.tolist() for _, target in loader]
    assert all(images.is_cuda and images.is_contiguous(memory_format=torch.channels_last) for images, _ in batches)

    class Follow:
        def on_step(self, step):
            seen.append((step.step, step.images))

    options = TrainOptions(epochs=2, out=str(tmp_path / "run"), device="cuda", graph="on")
    names = ["a", "b", "c", "d"]
    Trainer(CE(create_model("resnet8", 4)), loader, loader, options, callbacks=[Follow()], classes=names).fit()
    assert seen == [(1, 8), (2, 8), (3, 4), (4, 8), (5, 8), (6, 4)]


@pytest.mark.every
def test_digits_compiled(fastkd, few_digits):
    """Not in every run: it compiles for a minute."""
    check(fastkd("train", *DIGITS, "--method", "kd", "--graph", "on", "--compile", "on", "--no-baseline"), "CUDA graph")
    torch._dynamo.reset()
