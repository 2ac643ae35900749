"""Job: `fastkd train` from the first line to the last, on digits and on a folder of JPEGs."""

import pytest
import torch
from PIL import Image

DIGITS = ("--recipe", "digits", "--epochs", "2", "--batch-size", "64", "--student", "resnet8", "--teacher", "resnet14")


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


@pytest.mark.parametrize("method", ["kd", "sokd", "dcm", "iakd"])
def test_digits_with_graphs(fastkd, few_digits, method):
    check(fastkd("train", *DIGITS, "--method", method, "--graph", "on", "--no-baseline"), "CUDA graphs")


def test_digits_resumed(fastkd, few_digits):
    assert fastkd("train", *DIGITS, "--epochs", "1", "--no-baseline", "--out", "run")[0] == 0
    check(fastkd("train", "--out", "run", "--resume"))


@pytest.mark.parametrize("options", [("--mixup", "0.2", "--ema-decay", "0.9"), ("--amp-dtype", "float16")], ids=str)
def test_a_folder_of_jpegs_with_graphs(fastkd, few_digits, jpegs, options):
    data = ("--data", jpegs, "--loader", "folder", "--workers", "0", "--batch-size", "6", "--image-size", "32")
    nets = ("--student", "resnet8", "--teacher", "resnet14", "--method", "kd", "--epochs", "4", "--warmup-epochs", "1")
    check(fastkd("train", *data, *nets, *options, "--graph", "on", "--no-baseline"), "CUDA graphs")


def test_digits_compiled(fastkd, few_digits):
    check(fastkd("train", *DIGITS, "--method", "kd", "--graph", "on", "--compile", "--no-baseline"), "CUDA graphs")
    torch._dynamo.reset()
