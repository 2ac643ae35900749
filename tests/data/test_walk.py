"""What a folder holds beside images: each entry is skipped with its reason, or is an error."""

import os
import shutil
import socket

import pytest

from fastkd.data.scan import scan, scan_images
from fastkd.data.walk import EXTENSIONS, shown
from fastkd.errors import UserError


def test_all_endings_of_image_folder_are_images():
    folder = pytest.importorskip("torchvision.datasets.folder")
    assert {*folder.IMG_EXTENSIONS} <= {*EXTENSIONS}


@pytest.mark.parametrize("ending", ["tif", "tiff", "ppm", "pgm", "gif", "jfif", "avif", "jpe", "dib", "TIF", "JPG"])
def test_a_picture_is_found_by_its_ending(small, ending):
    from PIL import Image

    kinds = {"jfif": "JPEG", "jpe": "JPEG", "jpg": "JPEG", "tif": "TIFF", "pgm": "PPM", "dib": "BMP"}
    file = small / "train" / "ant" / f"x.{ending}"
    Image.new("L" if ending == "pgm" else "RGB", (20, 20)).save(file, format=kinds.get(ending.lower(), ending.upper()))
    assert str(file) in scan(str(small / "train")).files


HIDDEN = (".ipynb_checkpoints/0-checkpoint.jpg", ".DS_Store", "._0001.jpg", ".x.png")
SYSTEM = ("__MACOSX/ant/0.jpg", "Thumbs.db", "desktop.ini", "@eaDir/0.jpg")


@pytest.mark.parametrize("name, reason", [*((n, "hidden") for n in HIDDEN), *((n, "operating system") for n in SYSTEM)])
def test_what_machines_leave_in_folders_is_skipped_and_said(small, name, reason):
    picture = next((small / "train" / "ant").glob("*.jpg"))
    for place in (small / "train" / "ant", small / "train"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, place / name)
    split = scan(str(small / "train"))
    assert split.classes == ("ant", "bee") and len(split.files) == 6
    (note,) = split.notes
    assert f"2 {reason}" in note or f"2 made by the {reason}" in note
    assert name.split("/")[0] in note


def test_other_files_are_counted_by_their_endings(small):
    for name in ("a.txt", "b.TXT", "c.csv", "noending"):
        (small / "train" / "ant" / name).write_text("x")
    (note,) = scan(str(small / "train")).notes
    assert "2 ending in .txt (such as ant/" in note and "1 ending in .csv (ant/c.csv)" in note
    assert "1 without an ending (ant/noending)" in note


def test_images_beside_the_class_folders_are_named(small):
    shutil.copy(next((small / "train" / "ant").glob("*.jpg")), small / "train" / "stray.jpg")
    split = scan(str(small / "train"))
    assert len(split.files) == 6 and "1 beside the class folders (stray.jpg)" in split.notes[0]


def test_a_link_that_leads_back_is_skipped(small):
    (small / "train" / "ant" / "loop").symlink_to(small / "train" / "ant")
    (small / "train" / "bee" / "up").symlink_to(small / "train")
    (small / "train" / "round").symlink_to(small / "train")
    with pytest.raises(UserError, match=r"no images in 1 of the 3 classes .*\(round, but 1 link to a folder above it"):
        scan(str(small / "train"))
    (small / "train" / "round").unlink()
    split = scan(str(small / "train"))
    assert len(split.files) == 6 and "2 link to a folder above it" in split.notes[0]


def test_a_link_to_itself_is_an_error(small):
    (small / "train" / "ant" / "self.jpg").symlink_to("self.jpg")
    with pytest.raises(UserError, match=r"self.jpg' cannot be opened \(Too many levels of symbolic links\)"):
        scan(str(small / "train"))


def test_links_to_files_and_folders_are_followed(small):
    (small / "elsewhere").mkdir()
    for file in (small / "train" / "bee").glob("*"):
        file.rename(small / "elsewhere" / file.name)
    (small / "train" / "bee").rmdir()
    (small / "train" / "bee").symlink_to(small / "elsewhere")
    (small / "train" / "ant" / "more.jpg").symlink_to(next((small / "elsewhere").glob("*.jpg")))
    split = scan(str(small / "train"))
    assert len(split.files) == 7 and split.notes == ()


def test_a_folder_that_is_read_twice_is_said(small):
    (small / "train" / "cow").symlink_to(small / "train" / "ant")
    split = scan(str(small / "train"))
    assert len(split.files) == 9 and "WARNING" in split.notes[0] and "cow" in split.notes[0]


def test_what_is_neither_file_nor_folder_is_skipped(small, monkeypatch):
    os.mkfifo(small / "train" / "ant" / "pipe.jpg")
    monkeypatch.chdir(small / "train" / "bee")  # the path of a socket is short
    with socket.socket(socket.AF_UNIX) as one:
        one.bind("socket.jpg")
        split = scan(str(small / "train"))
    assert len(split.files) == 6 and "2 neither file nor folder" in split.notes[0]


def test_a_folder_named_like_an_image_is_a_folder(small):
    (small / "train" / "ant").rename(small / "train" / "x.jpg")
    (small / "train" / "bee" / "y.png").mkdir()
    split = scan(str(small / "train"))
    assert split.classes == ("bee", "x.jpg") and len(split.files) == 6


@pytest.mark.parametrize("name", [b"caf\xe9", b"a\nb", b" a", b"a'b", b"[bold]", b"a\tb "])
def test_any_bytes_may_be_a_name(small, name):
    root = os.fsencode(small / "train")
    os.rename(root + b"/ant", root + b"/" + name)
    picture = next((small / "train" / "bee").glob("*.jpg"))
    os.link(picture, root + b"/bee/" + name + b".jpg")
    with open(root + b"/bee/" + name + b".txt", "w"):
        pass
    split = scan(str(small / "train"))
    assert {os.fsencode(label) for label in split.classes} == {name, b"bee"} and len(split.files) == 7
    lines = "|".join(split.notes)
    assert lines.isprintable()
    lines.encode()


def test_names_are_shown_whole():
    assert [shown(name) for name in ("cat", "cat ", "a\n", "\udce9")] == ["cat", "'cat '", "'a\\n'", "'\\udce9'"]


def test_images_of_any_tree(small):
    assert len(scan_images(str(small)).files) == 8
    (small / "empty").mkdir()
    (small / "empty" / "x.txt").write_text("")
    with pytest.raises(UserError, match=r"holds no images, but 1 ending in .txt \(x.txt\)"):
        scan_images(str(small / "empty"))
    with pytest.raises(UserError, match="--unlabelled 'nowhere': no such folder"):
        scan_images("nowhere")
    with pytest.raises(UserError, match="--unlabelled '.*': it is a file, not a folder"):
        scan_images(__file__)


def test_class_names_that_look_alike_are_said(small):
    for name in ("Ant", "bee "):
        shutil.copytree(small / "train" / name.strip().lower(), small / "train" / name)
    (note,) = scan(str(small / "train")).notes
    assert "WARNING" in note and "'Ant' and 'ant'" in note and "'bee' and 'bee '" in note
