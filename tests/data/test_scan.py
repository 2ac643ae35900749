"""What a folder holds, and each way in which it can be wrong: one line that names the thing."""

import os
import shutil

import pytest
import torch

import fastkd.data.scan as scan_module
from fastkd.data import DataOptions, create_loaders
from fastkd.data.scan import image_kind, scan
from fastkd.errors import UserError
from fastkd.foreign import open_file


def refused(root, *parts):
    with pytest.raises(UserError) as caught:
        create_loaders(DataOptions(data=str(root)), torch.device("cpu"), log=lambda line: None)
    message = str(caught.value)
    assert "\n" not in message and all(part in message for part in parts), message


def test_order_and_labels_are_those_of_image_folder(pictures):
    folder = pytest.importorskip("torchvision.datasets").ImageFolder(str(pictures / "train"))
    split = scan(str(pictures / "train"))
    assert list(split.classes) == folder.classes and list(zip(split.files, split.labels, strict=True)) == folder.samples


def test_files_in_folders_of_a_class_are_found_as_image_folder_finds_them(small):
    (small / "train" / "ant" / "more").mkdir()
    shutil.copy(next((small / "train" / "bee").glob("*.jpg")), small / "train" / "ant" / "more" / "x.JPEG")
    folder = pytest.importorskip("torchvision.datasets").ImageFolder(str(small / "train"))
    assert scan(str(small / "train")).files == [file for file, _ in folder.samples]


def test_hidden_folders_and_other_files_are_passed_over(small):
    (small / "train" / ".cache").mkdir()
    (small / "train" / "ant" / "notes.txt").write_text("no image")
    train = scan(str(small / "train"))
    assert train.classes == ("ant", "bee") and len(train.files) == 6


def test_a_png_named_jpeg_is_an_image(small):
    from PIL import Image

    Image.new("RGB", (70, 70)).save(small / "train" / "ant" / "n.JPEG", format="PNG")
    assert len(scan(str(small / "train")).files) == 7


@pytest.mark.parametrize(
    "head, kind",
    [
        (b"\xff\xd8\xff\xe0", "jpeg"),
        (b"\x89PNG\r\n\x1a\n", "png"),
        (b"BM6", "bmp"),
        (b"RIFF\x10\0\0\0WEBPVP8 ", "webp"),
        (b"RIFF\x10\0\0\0WAVEfmt ", None),
        (b"GIF89a", "gif"),
        (b"II*\0", "tiff"),
        (b"MM\0*", "tiff"),
        (b"P5\n40 48\n", "ppm"),
        (b"\0\0\0 ftypavif", "avif"),
        (b"\0\0\0 ftypheic", None),
        (b"", None),
    ],
)
def test_kinds_of_image(head, kind):
    assert image_kind(head) == kind


def test_missing_folder(tmp_path):
    refused(tmp_path / "nowhere", "nowhere", "no such folder", "train/<class>/*")
    refused("digit", "--data 'digit'", "did you mean 'digits'?")
    (tmp_path / "ant.jpg").write_bytes(b"")
    refused(tmp_path / "ant.jpg", "ant.jpg': it is a file, not a folder", "train/<class>/*")


def test_no_train_or_val_inside(small):
    shutil.rmtree(small / "val")
    refused(small, "has no val/ inside (it holds train)", "train/<class>/*")
    shutil.rmtree(small / "train")
    refused(small, "has no train/ and no val/ inside (it holds nothing)")


def test_empty_split(small):
    shutil.rmtree(small / "val")
    (small / "val").mkdir()
    refused(small, "val' holds no class folders")
    for number, images in enumerate(("1 image (0.jpg)", "2 images (such as ")):
        (small / "val" / f"{number}.jpg").write_bytes(b"")
        refused(small, f"val' holds no class folders, but {images}")


def test_class_without_images(small):
    (small / "train" / "cow").mkdir()
    refused(small, "no images in 1 of the 3 classes", "(cow)", ".jpg")
    (small / "train" / "cow" / "list.csv").write_text("moo")
    refused(small, "(cow, but 1 ending in .csv (cow/list.csv))")


def test_different_classes(small):
    (small / "train" / "bee").rename(small / "train" / "bees")
    refused(small, "only in train: bees", "only in val: bee")


def test_files_that_are_no_images_are_named(small):
    (small / "train" / "ant" / "zz.jpg").write_text("<html>404</html>")
    (small / "train" / "bee" / "zz.png").write_bytes(b"")
    refused(small, "ant/zz.jpg' begins with b'<html>40'", "and 1 more", "bee/zz.png", "repair or remove")
    os.remove(small / "train" / "ant" / "zz.jpg")
    refused(small, "bee/zz.png' is empty (0 bytes)")


def test_link_to_nothing(small):
    (small / "train" / "ant" / "zz.jpg").symlink_to(small / "gone.jpg")
    refused(small, "ant/zz.jpg' cannot be opened (No such file or directory)")


def test_unreadable_file(small, monkeypatch):
    def locked(file):
        if os.path.basename(file).startswith("0001"):
            raise PermissionError(13, "Permission denied", file)
        return open_file(file)

    monkeypatch.setattr(scan_module, "open_file", locked)
    refused(small, "0001_RGB.jpg' cannot be opened (Permission denied)")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_class_folder(small):
    (small / "train" / "ant").chmod(0)
    refused(small, "ant' cannot be read (Permission denied)")
    (small / "train" / "ant").chmod(0o755)
