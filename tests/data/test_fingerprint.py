"""A set of images is told from another one by its content, wherever it lies."""

import shutil

import pytest
import torch

from fastkd.data.fingerprint import of_split, of_tensors
from fastkd.data.scan import Split

NAMES = ["a/1.jpg", "a/2.jpg", "b/1.jpg"]


def split_of(folder, names=NAMES, labels=(0, 0, 1)) -> Split:
    return Split(("a", "b"), [f"{folder}/{name}" for name in names], list(labels))


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate(NAMES):
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / name).write_bytes(b"x" * (10 + number))
    return tmp_path / "train"


def test_a_folder_may_move(folder, tmp_path, monkeypatch):
    before = of_split(split_of(folder))
    shutil.move(folder, tmp_path / "elsewhere")
    assert of_split(split_of(tmp_path / "elsewhere")) == before
    monkeypatch.chdir(tmp_path)
    assert of_split(split_of("./elsewhere")) == before


def test_other_names_labels_orders_and_sizes_show(folder):
    found = {of_split(split_of(folder))}
    found.add(of_split(split_of(folder, labels=(0, 1, 1))))
    found.add(of_split(split_of(folder, [NAMES[1], NAMES[0], NAMES[2]])))
    found.add(of_split(split_of(folder, NAMES[:2], (0, 0))))
    (folder / NAMES[2]).write_bytes(b"y" * 99)
    found.add(of_split(split_of(folder)))
    (folder / NAMES[2]).rename(folder / "b/3.jpg")
    found.add(of_split(split_of(folder, [*NAMES[:2], "b/3.jpg"])))
    assert len(found) == 6


def test_images_in_memory_count_with_every_byte():
    images, target = torch.zeros(4, 8, 8, 3, dtype=torch.uint8), torch.arange(4)
    other = images.clone()
    other[3, 7, 7, 2] = 1
    assert of_tensors(images, target) == of_tensors(images.clone(), target)
    assert len({of_tensors(images, target), of_tensors(other, target), of_tensors(images, target.flip(0))}) == 3
    assert of_tensors(images.view(8, 4, 8, 3), target) != of_tensors(images, target)
