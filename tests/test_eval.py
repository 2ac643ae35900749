"""`fastkd eval` of folders of all arrangements, with the class names and the split that the weights note."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from refused import check_refused

from fastkd import create_model

TRAIN = ["train", "--method", "ce", "--image-size", "16", "-b", "8", "--student", "resnet8", "--loader", "folder"]
TRAIN += ["--workers", "0", "--lr", "0.05"]
COLOURS = {"ant": (220, 30, 30), "bee": (30, 220, 30), "cat": (30, 30, 220), "dog": (200, 200, 30)}


def write(root: Path, classes, count: int = 8) -> Path:
    """Noisy pictures in the colour of their class, gray for other classes."""
    random = np.random.default_rng(0)
    for name in classes:
        (root / name).mkdir(parents=True)
        colour = COLOURS.get(name, (128, 128, 128))
        for i in range(count):
            pixels = np.clip(colour + random.normal(0, 15, (18, 18, 3)), 0, 255).astype("uint8")
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with tree/ (four classes), the run r/ of a network that tells their colours apart, and more folders."""
    from fastkd.cli import main

    root = tmp_path_factory.mktemp("eval")
    write(root / "tree", COLOURS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        split = ["--data", "tree", "--val-fraction", "0.25", "--split-seed", "3"]
        patch.setattr("sys.argv", ["fastkd", *TRAIN, *split, "--epochs", "12", "--out", "r"])
        main()
    return root


def score(fastkd, trained, *options, weights="student.safetensors"):
    """(top-1 in %, number of images, the output)"""
    weights = trained / "r" / weights
    status, out, err = fastkd("eval", "--weights", weights, "--loader", "folder", "--workers", "0", *options)
    assert status == 0, err
    row = re.search(r"resnet8\s+│\s+([\d,]+)\s+│\s+([\d.]+)", out)
    return float(row[2]), int(row[1]), out


@pytest.mark.parametrize("weights", ["student.safetensors", "best.pt", "last.pt"])
def test_the_held_out_images_are_evaluated(fastkd, trained, weights):
    top1, images, out = score(fastkd, trained, "--data", trained / "tree", weights=weights)
    assert top1 > 80 and images == 8
    assert "--val-fraction 0.25 --split-seed 3; --val-fraction 0 evaluates all" in out and "8 of the 32 images" in out
    assert score(fastkd, trained, "--data", trained / "tree", "--val-fraction", "0")[1] == 32


@pytest.mark.parametrize(
    ("weights", "elsewhere"), [("student.safetensors", "give --data"), ("best.pt", "give --model NAME")]
)
def test_the_folder_of_the_run_is_evaluated_without_data(fastkd, trained, tmp_path, monkeypatch, weights, elsewhere):
    monkeypatch.chdir(trained)
    top1, images, out = score(fastkd, trained, weights=weights)
    assert top1 > 80 and images == 8 and "--data tree" in out and "--val-fraction 0.25" in out
    assert score(fastkd, trained, "--val-fraction", "0", weights=weights)[1] == 32
    shutil.copy(trained / "r" / weights, tmp_path / weights)  # no config.yaml beside it
    check_refused(fastkd("eval", "--weights", tmp_path / weights), elsewhere)


def test_a_run_folder_stands_for_its_student(fastkd, trained, monkeypatch):
    monkeypatch.chdir(trained)
    top1, images, out = score(fastkd, trained, weights="")
    assert top1 > 80 and images == 8 and "--data tree" in out and "--val-fraction 0.25" in out


def test_what_a_file_without_a_note_gets_is_said(fastkd, trained, tmp_path):
    for classes in (4, 3):
        torch.save(create_model("resnet8", classes).state_dict(), tmp_path / f"{classes}.pth")
    data = ["--data", trained / "tree", "--loader", "folder", "--workers", "0", "--model", "resnet8"]
    status, out, err = fastkd("eval", "--weights", "4.pth", *data)
    assert "4.pth does not say its image size, mean, std; it gets 224 x 224 pixels, mean 0.485 0.456" in out, err
    sized = [*data, "--image-size", "16"]
    status, out, err = fastkd("eval", "--weights", "4.pth", *sized)
    assert "does not say its mean, std; it gets 16 x 16" in out and "(else give --mean, --std)" in out, err
    status, out, err = fastkd("eval", "--weights", "4.pth", *sized, "--mean", *"000", "--std", *"111")
    assert status == 0 and "does not say" not in out, err
    result = fastkd("eval", "--weights", "3.pth", *sized)
    check_refused(result, "--weights 3.pth is for 3 classes, and resnet8 for 4", "give --data of its 3 classes")
    assert "does not say" not in result[1]
    Path("p.jpg").write_bytes(b"no weights")
    for more in (sized, sized[:-4]):
        result = fastkd("eval", "--weights", "p.jpg", *more)
        check_refused(result, "p.jpg is not a torch file")
        assert "does not say" not in result[1]


def test_the_same_names_in_another_order_go_together(fastkd, trained, monkeypatch):
    """Folders are always sorted, so that only the note can have another order."""
    from fastkd import weights_file

    read = weights_file.read_about

    def turned(path):
        about = read(path)
        about["data"]["classes"] = ["dog", "cat", "bee", "ant"]
        return about

    monkeypatch.setattr(weights_file, "read_about", turned)
    top1, _, out = score(fastkd, trained, "--data", trained / "tree")
    assert top1 < 20 and "in another order" in out


def test_some_of_the_classes_are_enough(fastkd, trained, tmp_path):
    write(tmp_path / "set" / "val", ["cat", "dog"], 3)
    top1, images, out = score(fastkd, trained, "--data", tmp_path / "set")
    assert top1 > 80 and images == 6 and "the data has 2 of the 4" in out and "it lacks ant, bee" in out


def test_other_names_are_refused_or_go_by_position(fastkd, trained, tmp_path):
    write(tmp_path / "set" / "val", ["bee", "cat", "dog", "elk"], 3)
    command = ["eval", "--weights", trained / "r" / "student.safetensors", "--data", tmp_path / "set"]
    words = ["only in the data: elk", "only in the weights: ant", "--ignore-class-names"]
    check_refused(fastkd(*command), *words)
    top1, _, out = score(fastkd, trained, "--data", tmp_path / "set", "--ignore-class-names")
    assert top1 < 50 and "go by position" in out
    check_refused(
        fastkd("eval", "--weights", command[2]),
        "does not say on which images to evaluate it: give --data",
    )
    write(tmp_path / "five" / "val", [*COLOURS, "elk"], 1)
    check_refused(fastkd(*command[:4], tmp_path / "five", "--ignore-class-names"), "4 classes and the data 5")


def test_a_folder_with_a_val_has_its_own_split(fastkd, trained, tmp_path):
    shutil.copytree(trained / "tree", tmp_path / "set" / "val")
    top1, images, out = score(fastkd, trained, "--data", tmp_path / "set")
    assert images == 32 and "--val-fraction" not in out
    command = ["eval", "--weights", trained / "r" / "student.safetensors", "--data", tmp_path / "set"]
    check_refused(fastkd(*command, "--val-fraction", "0.5"), "has a val/ already")
    check_refused(fastkd(*command, "--unlabelled", tmp_path), "is for training")


def test_a_split_run_resumes(fastkd, trained):
    status, out, _ = fastkd("train", "--out", trained / "r", "--resume", "--data", trained / "tree")
    assert status == 0 and "after epoch 12 of 12" in out
    status = fastkd("train", "--out", trained / "r", "--resume", "--data", trained / "tree", "--split-seed", "4")
    check_refused(status, "split_seed was 3, now 4")


def test_images_without_labels(fastkd, trained, tmp_path):
    write(tmp_path / "more", ["x"], 5)
    write(tmp_path / "set" / "val", COLOURS, 2)
    weights = trained / "r" / "student.safetensors"
    data = ["--data", tmp_path / "set", "--unlabelled", tmp_path / "more", "--epochs", "1"]
    check_refused(fastkd(*TRAIN, *data, "--out", "run"), "method ce learns from labels alone")
    command = [*TRAIN, *data, "--method", "kd", "--teacher", "resnet8", "--teacher-weights", weights]
    for option, word in (
        (["--mixup", "0.2"], "--mixup 0.2"),
        (["--smoothing", "0.1"], "--smoothing 0.1"),
        (["--baseline"], "--baseline: this trains by the labels alone"),
        (["--method", "dkd"], "needs the label of every image"),
    ):
        check_refused(fastkd(*command, *option, "--out", "run"), word)
    assert not Path("run").exists()
    status, out, err = fastkd(*command, "--out", "run")
    assert status == 0 and "5 images of" in out and "all training images are unlabelled" in out, err
    from fastkd.weights_file import read_about

    assert read_about(Path("run/student.safetensors"))["data"] == {
        "images": 5,
        "classes": [*COLOURS],
        "unlabelled": 5,
    }


def test_one_class_is_refused_before_anything_is_trained(fastkd, tmp_path):
    write(tmp_path / "set" / "train", ["images"], 4)
    write(tmp_path / "set" / "val", ["images"], 2)
    options = ["--data", tmp_path / "set", "--teacher", "resnet8", "--teacher-epochs", "1", "--student", "resnet8"]
    check_refused(fastkd("train", *options, "--out", "r"), "one class alone, 'images'", "all images lie in it")
    assert not Path("r").exists()


def test_any_bytes_may_be_the_name_of_a_class(fastkd, tmp_path):
    write(tmp_path / "set", ["a", "b"], 4)
    (tmp_path / "set" / "a").rename(tmp_path / "set" / "caf\udce9 [bold]")
    data = ["--data", tmp_path / "set", "--val-fraction", "0.25"]
    status, out, err = fastkd(*TRAIN, *data, "--epochs", "1", "--out", "r")
    assert status == 0, err
    weights = ["--weights", "r/student.safetensors", "--loader", "folder", "--workers", "0"]
    assert fastkd("eval", *weights, "--data", tmp_path / "set")[0] == 0
    (tmp_path / "set" / "b").rename(tmp_path / "set" / "c\udce9")
    check_refused(fastkd("eval", *weights, "--data", tmp_path / "set"), r"only in the data: 'c\udce9'")


def test_pretrained_weights_get_the_images_that_their_library_says(fastkd, tmp_path, monkeypatch):
    from fastkd.models import zoo

    monkeypatch.setattr(zoo, "_download", lambda model, build: zoo.torchvision_model("resnet18", 1000, None))
    write(tmp_path / "pictures", ["ant", "bee"], 2)
    given = ["eval", "--model", "torchvision/resnet18", "--weights", "IMAGENET1K_V1", "--data", "pictures"]
    status, out, err = fastkd(*given, "--loader", "folder", "--workers", "0", "--image-size", "32")
    assert "as in training: --mean 0.485 0.456 0.406 --std 0.229 0.224 0.225" in out, (out, err)
