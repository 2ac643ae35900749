"""`fastkd train` and `fastkd eval` on small images: files with names, and folders."""

import gzip
import hashlib
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from refused import check_refused

from fastkd.data import DataOptions, create_eval_loader, create_loaders, digits, idx
from fastkd.engine import TrainOptions
from fastkd.methods.ce import CE
from fastkd.models import create_model
from fastkd.train import Trainer
from fastkd.weights_file import about_input, read_about

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
TRAIN = ["train", "--method", "ce", "--student", "resnet8", "-b", "32", "--lr", "0.05", "--epochs", "1"]
IMAGES = 200  # of each part


@pytest.fixture
def fashion(tmp_path, monkeypatch):
    """The first images of the real Fashion-MNIST, as IDX files."""
    if not DEBIAN.is_dir():
        pytest.skip("no package dataset-fashion-mnist")
    known = {}
    for file in DEBIAN.glob("*.gz"):
        with gzip.open(file) as stream:
            data = stream.read(16 if "images" in file.name else 8) + stream.read(
                IMAGES * (784 if "images" in file.name else 1)
            )
        data = data[:4] + IMAGES.to_bytes(4, "big") + data[8:]
        known[file.name.removesuffix(".gz")] = hashlib.md5(data).hexdigest()
        (tmp_path / "files").mkdir(exist_ok=True)
        (tmp_path / "files" / file.name.removesuffix(".gz")).write_bytes(data)
    monkeypatch.setitem(idx.CONTENT_MD5, "fashion-mnist", known)
    return tmp_path / "files"


def images_of(out: str) -> int:
    return int(re.search(r"resnet8\s+│\s+([\d,]+)", out)[1])


def test_fashion_mnist_is_trained_on_resumed_and_evaluated(fastkd, fashion):
    given = ["--data", "fashion-mnist", "--data-dir", fashion, "--no-flip", "--pad", "2"]
    status, out, err = fastkd(*TRAIN, *given, "--out", "run")
    assert status == 0, err
    assert "MD5 of the content as published" in out and "padding by 2 (zeros), not mirrored" in out
    noted = yaml.safe_load(Path("run/config.yaml").read_text())
    assert (noted["image_size"], noted["mean"], noted["flip"], noted["loader"]) == (28, [0.286] * 3, "off", "resident")
    about = read_about(Path("run/student.safetensors"))
    assert about["input"]["data"] == "fashion-mnist" and about["data"]["classes"][9] == "Ankle boot"
    assert str(fashion) not in str(about)  # a weights file may be given away
    assert fastkd("train", "--out", "run", "--resume", "--epochs", "1")[0] == 0
    shutil.copytree(fashion, "moved")
    assert fastkd("train", "--out", "run", "--resume", "--data-dir", "moved")[0] == 0
    check_refused(fastkd("train", "--out", "run", "--resume", "--pad", "3"), "pad was 2, now 3")

    status, out, err = fastkd("eval", "--weights", "run/student.safetensors")
    assert status == 0 and images_of(out) == IMAGES and "--data fashion-mnist" in out, err
    for weights in ("run/last.pt", "run/student.safetensors"):
        status, again, err = fastkd("eval", "--weights", weights, "--data", "fashion-mnist", "--data-dir", "moved")
        assert status == 0 and again.split("│")[-5] == out.split("│")[-5], err  # the loss
    shutil.copy("run/student.safetensors", "alone.safetensors")
    check_refused(
        fastkd("eval", "--weights", "run/student.safetensors", "--data", "mnist"), "--data mnist needs --data-dir"
    )
    check_refused(fastkd("eval", "--weights", "alone.safetensors"), "--data fashion-mnist needs --data-dir")
    assert fastkd("eval", "--weights", "alone.safetensors", "--data-dir", "moved")[0] == 0


def test_the_normalisation_of_another_set_is_said(fashion):
    """As a recipe for CIFAR-100 gives it: Fashion-MNIST with it is trained on, but not silently."""
    options = DataOptions(data="fashion-mnist", data_dir=str(fashion), mean=(0.5071, 0.4867, 0.4408), std=(0.353,) * 3)
    for given, count in (
        (options, 1),
        (replace(options, mean=(0.2861, 0.2859, 0.286)), 0),
        (replace(options, mean=()), 0),
    ):
        lines: list[str] = []
        create_loaders(given, torch.device("cpu"), log=lines.append)
        said = [line for line in lines if "normalised with" in line]
        assert len(said) == count, lines
        assert all("--mean 0.5071 0.4867 0.4408 (its own is 0.286 0.286 0.286)" in line for line in said)
        assert "--std" not in "".join(said)
    lines = []
    create_eval_loader(options, torch.device("cpu"), log=lines.append)
    assert "normalised" not in "".join(lines)  # it is as in training, which has said it


def test_weights_of_other_classes_are_refused(fastkd, fashion):
    assert fastkd(*TRAIN, "--data", "fashion-mnist", "--data-dir", fashion, "--out", "run")[0] == 0
    weights = "run/student.safetensors"
    check_refused(fastkd("eval", "--weights", weights, "--data", "digits"), "only in the data: 0", "T-shirt/top")
    write_folder(Path("three"), 32, ("a", "b", "c"))
    refused = fastkd("eval", "--weights", weights, "--data", "three", "--ignore-class-names", "--loader", "resident")
    check_refused(refused, "--image-size 28 and the images have 32")
    write_folder(Path("small"), 28, ("a", "b", "c"))
    refused = fastkd("eval", "--weights", weights, "--data", "small", "--ignore-class-names", "--workers", "0")
    check_refused(refused, "10 classes and the data 3")


def write_folder(root: Path, side: int, classes=("ant", "bee")) -> None:
    random = np.random.default_rng(0)
    for part in ("train", "val"):
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for i in range(4):
                pixels = random.integers(0, 256, (side, side, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")


def test_weights_are_evaluated_on_small_images_as_they_were_trained(fastkd):
    write_folder(Path("set"), 16)
    data = ["--data", "set", "--workers", "0"]
    for loader, out in (("auto", "kept"), ("folder", "resized")):
        size = ["--image-size", "16"] if out == "resized" else []
        status, said, err = fastkd(*TRAIN, *data, *size, "--loader", loader, "--out", out)
        assert status == 0 and ("kept in memory" in said) == (out == "kept"), err
        loader = ["--loader", "folder"] if out == "resized" else []
        status, said, err = fastkd("eval", "--weights", f"{out}/student.safetensors", *data, *loader)
        assert status == 0 and ("kept in memory" in said) == (out == "kept"), err
    status, said, err = fastkd("eval", "--weights", "resized/last.pt", "--data", "set", "--workers", "1")
    assert status == 0 and "kept in memory" not in said, err
    assert fastkd("train", "--out", "kept", "--resume", "--data", "set")[0] == 0
    refused = fastkd("train", "--out", "kept", "--resume", "--data", "set", "--loader", "folder", "--epochs", "1")
    check_refused(refused, "by the 'resident' loader", "resume with --loader resident")


def test_weights_of_a_program_are_evaluated_on_small_images_as_they_were_trained(fastkd):
    write_folder(Path("set"), 16)
    torch.manual_seed(0)
    loaders = create_loaders(DataOptions(data="set", batch_size=4, workers=0), torch.device("cpu"))
    options = TrainOptions(epochs=1, lr=0.1, device="cpu", out="run")
    (row,) = Trainer(CE(create_model("resnet8", 2)), *loaders, options, {"student": "resnet8"}).fit().history
    status, out, err = fastkd("eval", "--weights", "run/student.safetensors", "--data", "set", "--workers", "1")
    out = out.partition("as in training")[2]  # what eval printed
    assert status == 0 and "kept in memory" in out and f"{row['val_loss']:.4f}" in out, err


def test_the_digits_are_evaluated_with_the_normalisation_of_the_training(fastkd, monkeypatch):
    images, target = digits.read_digits()
    monkeypatch.setattr(digits, "read_digits", lambda: (images[:200], target[:200]))
    given = ["--mean", "0", "0", "0", "--std", "0.1", "0.1", "0.1"]
    status, out, err = fastkd(*TRAIN, "--data", "digits", *given, "--out", "run")
    assert status == 0, err
    loss = re.search(r"val loss ([\d.]+)", out)[1]
    for weights in ("run/student.safetensors", "run/last.pt"):
        status, out, err = fastkd("eval", "--weights", weights)
        assert status == 0 and loss in out, err
    before = yaml.safe_load(Path("run/config.yaml").read_text()) | {"loader": "auto"}  # of an older version
    assert about_input(before) == {}


def test_the_switch_may_be_written_in_all_ways(fastkd):
    for given, value in (([], "auto"), (["--flip"], "on"), (["--no-flip"], "off"), (["--flip", "off"], "off")):
        status, out, err = fastkd("train", "--print-config", *given)
        assert status == 0 and yaml.safe_load(out)["flip"] == value, err
    Path("f.yaml").write_text("flip: false\n")
    assert yaml.safe_load(fastkd("train", "--config", "f.yaml", "--print-config")[1])["flip"] == "off"
    assert yaml.safe_load(fastkd("train", "--config", "f.yaml", "--flip", "--print-config")[1])["flip"] == "on"
    check_refused(fastkd("train", "--flip", "maybe", "--print-config"), "--flip must be one of auto, on, off")
    check_refused(fastkd("train", "--no-flip", "on", "--print-config"), "unknown option '--no-flip'")


@pytest.mark.parametrize(
    "given",
    [["--data", "synthetic"], ["--data", "pictures", "--loader", "folder"], ["--data-dir", "x", "--augment", "rrc"]],
)
def test_what_a_recipe_augments_can_be_given_up_as_the_error_says(fastkd, given):
    command = ["train", "--recipe", "cifar100-kd", *given, "--print-config"]
    status, _, err = fastkd(*command)
    words = re.search(r"\(over a recipe: (.*?)\)", " ".join(err.split()))[1].split()
    assert status == 2 and fastkd(*command[:-1], *words, "--print-config")[0] == 0
