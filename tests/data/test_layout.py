"""Which images of a folder are for training and which for evaluation."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastkd.data import DataOptions, create_eval_loader, create_loaders
from fastkd.data.base import describe
from fastkd.data.layout import evaluation_split, training_splits
from fastkd.errors import UserError
from fastkd.kernels.logit_loss import UNLABELLED


def write(root: Path, counts: dict[str, int]) -> Path:
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (20, 20), (i, i, i)).save(root / name / f"{i:03}.png")
    return root


def quiet(line: str) -> None:
    pass


def splits(root, log=quiet, **options):
    return training_splits(DataOptions(data=str(root), **options), log)


def names(split, root):
    return [os.path.relpath(file, root) for file in split.files]


def refused(root, *words, **options):
    with pytest.raises(UserError) as caught:
        splits(root, **options)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_a_part_of_each_class_is_held_out(tmp_path):
    root, said = write(tmp_path / "tree", {"ant": 20, "bee": 5, "cow": 2}), []
    found = splits(root, said.append, val_fraction=0.2)
    train, val = found["train"], found["val"]
    assert train.classes == val.classes == ("ant", "bee", "cow")
    assert [val.labels.count(i) for i in range(3)] == [4, 1, 1]
    assert [train.labels.count(i) for i in range(3)] == [16, 4, 1]
    assert sorted(train.files + val.files) == sorted(str(file) for file in root.rglob("*.png"))
    assert len(said) == 1 and "6 of the 27 images" in said[0] and "--val-fraction 0.2 --split-seed 0" in said[0]
    assert all(file.split("/")[-2] == val.classes[label] for file, label in zip(val.files, val.labels, strict=True))


def test_the_split_depends_on_the_seed_and_the_names_alone(tmp_path, monkeypatch):
    root = write(tmp_path / "tree", {"ant": 20, "bee": 20})
    first = names(splits(root, val_fraction=0.3)["val"], root)
    shutil.copytree(root, tmp_path / "copy" / "train")
    moved = names(splits(tmp_path / "copy", val_fraction=0.3)["val"], tmp_path / "copy" / "train")
    monkeypatch.chdir(tmp_path)
    assert first == moved == names(splits("tree", val_fraction=0.3)["val"], "tree")
    assert first != names(splits(root, val_fraction=0.3, split_seed=1)["val"], root)
    chosen = DataOptions(data="tree/", val_fraction=0.3)
    assert names(evaluation_split(chosen, quiet), "tree") == first


def test_a_class_with_one_image_cannot_be_split(tmp_path):
    refused(write(tmp_path, {"ant": 4, "bee": 1}), "1 of the 2 classes", "(bee)", val_fraction=0.5)


def test_a_second_val_is_refused(small):
    refused(small, "--val-fraction", "has a val/ already", val_fraction=0.5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"val_fraction": 1.0}, "--val-fraction 1.0: give a fraction from 0"),
        ({"val_fraction": float("nan")}, "--val-fraction nan"),
        ({"split_seed": 3}, "--split-seed 3 needs --val-fraction"),
        ({"val_fraction": 0.1, "data": "digits"}, "--val-fraction 0.1 is for a folder"),
        ({"unlabelled": "x", "data": "synthetic"}, "--unlabelled x is for a folder"),
    ],
)
def test_options_that_have_no_meaning(options, message):
    with pytest.raises(UserError, match=message):
        DataOptions(**{"data": "folder"} | options)


def test_the_advice_fits_the_folder(tmp_path):
    tree = write(tmp_path / "tree", {"ant": 2, "bee": 2})
    refused(tree, "has no train/ and no val/", "if these are the classes, add --val-fraction 0.1")
    write(tmp_path / "b", {"train/ant": 2, "train/bee": 2})
    refused(tmp_path / "b", "has no val/", "add --val-fraction 0.1 to hold out a part of train/")
    write(tmp_path / "b", {"validation/ant": 2})
    refused(tmp_path / "b", "rename validation/ to val/")
    write(tmp_path / "c", {"set/train/ant": 1, "set/val/ant": 1})
    refused(tmp_path / "c", f"give --data {tmp_path / 'c' / 'set'}")


def test_train_may_be_the_name_of_a_class(tmp_path):
    root = write(tmp_path, {"bus": 4, "car": 4, "train": 4})
    assert splits(root, val_fraction=0.5)["train"].classes == ("bus", "car", "train")
    assert evaluation_split(DataOptions(data=str(root)), quiet).classes == ("bus", "car", "train")


def test_one_class_is_refused_with_what_it_looks_like(tmp_path):
    write(tmp_path / "a", {"train/images": 3, "val/images": 3})
    refused(tmp_path / "a", "holds one class alone, 'images'", "all images lie in it")
    write(tmp_path / "b", {"train/train/ant": 3, "train/train/bee": 3, "val/ant": 3})
    refused(tmp_path / "b", "holds the folders ant, bee", "a level too many")
    refused(write(tmp_path / "c", {"images": 4}), "one class alone, 'images'", val_fraction=0.5)


def test_val_may_have_a_part_of_the_classes(tmp_path):
    write(tmp_path, {"train/ant": 2, "train/bee": 2, "train/cow": 2, "val/cow": 2, "val/ant": 1})
    said = []
    found = splits(tmp_path, said.append)
    assert found["val"].classes == ("ant", "bee", "cow") and found["val"].labels == [0, 2, 2]
    assert said == ["data: val/ has 2 of the 3 classes of train/ (it lacks bee)"]
    write(tmp_path, {"val/dog": 1})
    refused(tmp_path, "only in train: bee", "only in val: dog")


def test_evaluation_needs_no_train(tmp_path):
    options = DataOptions(data=str(tmp_path), workers=0, loader="folder", batch_size=2, image_size=16)
    write(tmp_path, {"val/ant": 2, "val/bee": 1})
    loader = create_eval_loader(options, torch.device("cpu"), log=quiet)
    assert loader.classes == ("ant", "bee") and torch.cat([target for _, target in loader]).tolist() == [0, 0, 1]
    (tmp_path / "val").rename(tmp_path / "train")
    with pytest.raises(UserError, match=r"has no val/ inside: give --data .*/train to evaluate the training images"):
        evaluation_split(options, quiet)
    said = []
    tree = DataOptions(data=str(tmp_path / "train"))
    assert len(evaluation_split(tree, said.append).files) == 3
    assert said == [f"data: {tmp_path / 'train'} has no val/: its folders are taken as the classes"]


@pytest.mark.parametrize("loader", ["folder", "dali"])
def test_images_without_labels_are_trained_on_beside_the_others(tmp_path, loader):
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    write(tmp_path, {"train/ant": 3, "train/bee": 3, "val/ant": 1, "val/bee": 1, "more/deep/er": 4})
    shutil.copy(tmp_path / "more" / "deep" / "er" / "000.png", tmp_path / "more")
    kind = {"data": str(tmp_path), "unlabelled": str(tmp_path / "more"), "loader": loader, "workers": 1}
    said = []
    options = DataOptions(**kind, batch_size=4, image_size=16)
    train, val = create_loaders(options, torch.device("cpu"), log=said.append)
    assert "5 images of" in said[0] and "beside 6 with labels" in said[0]
    orders = [torch.cat([target for _, target in train]) for _ in range(2)]
    for order in orders:
        assert order.dtype == torch.int64 and [order.eq(i).sum() for i in (0, 1, UNLABELLED)] == [3, 3, 5]
    assert train.samples == 11 and describe(train)["unlabelled"] == 5 and "unlabelled" not in describe(val)
    assert sorted(torch.cat([target for _, target in val]).tolist()) == [0, 1]


def test_images_without_labels_may_be_alone(tmp_path):
    write(tmp_path, {"val/ant": 1, "val/bee": 1, "more": 4})
    said = []
    found = splits(tmp_path, said.append, unlabelled=str(tmp_path / "more"))
    assert found["train"].classes == ("ant", "bee") and found["train"].labels == [UNLABELLED] * 4
    assert "has no train/: all training images are unlabelled" in said[0]


def test_the_label_is_the_one_that_torchs_losses_ignore():
    assert torch.nn.CrossEntropyLoss().ignore_index == UNLABELLED


def test_images_on_both_sides_are_said(tmp_path):
    write(tmp_path, {"train/ant": 2, "train/bee": 2, "apart/ant": 2, "more": 2})
    (tmp_path / "val").symlink_to("train")
    said = []
    splits(tmp_path, said.append)
    assert len(said) == 1 and "WARNING" in said[0] and "val/ant" in said[0] and "val/bee" in said[0]
    (tmp_path / "val").unlink()
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "ant").symlink_to(tmp_path / "apart" / "ant")
    splits(tmp_path, said.append, unlabelled=str(tmp_path / "more"))
    assert not any("WARNING" in line for line in said[1:])
    splits(tmp_path, said.append, unlabelled=str(tmp_path / "apart"))
    assert "WARNING" in said[-1] and "val/ant" in said[-1]
