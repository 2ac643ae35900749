"""`fastkd check-data`, and what training does with its list and with --skip-bad."""

import csv
import io
import os
import struct
import tarfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from fastkd.commands import check_data
from fastkd.data import DataOptions, create_loaders
from fastkd.data.layout import training_splits
from fastkd.errors import UserError


def picture(seed, mode="RGB", size=(40, 31), **options):
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    if mode == "I;16":
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    elif mode != "RGB":
        image = image.convert(mode)
    image.save(buffer, options.pop("kind", "JPEG"), **options)
    return buffer.getvalue()


def huge_png():
    """A small file whose header says 65,535 x 65,535 pixels."""
    data = picture(3, kind="PNG")
    header = b"IHDR" + struct.pack(">II", 65535, 65535) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


def turned_exif():
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


GOOD = picture(1)
ODD = {  # name: content, what is found
    "html.jpg": (b"<html>404 not found</html>", "no picture"),
    "empty.jpg": (b"", "empty"),
    "cut.jpg": (GOOD[: len(GOOD) // 2], "damaged"),
    "cut.png": (picture(2, kind="PNG")[:-30], "damaged"),
    "thin.png": (huge_png(), "too large"),
    "really.png": (picture(4), "wrong name"),
    "ink.jpg": (picture(5, "CMYK"), "CMYK"),
    "deep.png": (picture(6, "I;16", kind="PNG"), "16 bits"),
    "film.gif": (
        picture(7, "P", kind="GIF", save_all=True, append_images=[Image.new("P", (40, 31), i) for i in (1, 2)]),
        "animated",
    ),
    "turned.jpg": (picture(8, exif=turned_exif()), "turned"),
    "twice.jpg": (GOOD, "duplicate"),
}


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "data"
    for part in ("train", "val"):
        for label, name in enumerate(("ant", "bee")):
            (root / part / name).mkdir(parents=True)
            for i in range(4):
                seed = 100 * (part == "val") + 10 * label + i
                (root / part / name / f"{i}.jpg").write_bytes(picture(1000 + seed))
    (root / "train/ant/a-first.jpg").write_bytes(GOOD)
    for name, (content, _) in ODD.items():
        (root / "train/ant" / name).write_bytes(content)
    (root / "train/bee/other.jpg").write_bytes(GOOD)
    (root / "val/ant/again.jpg").write_bytes(GOOD)
    os.symlink("/nowhere", root / "train/bee/dangling.jpg")
    os.mkfifo(root / "train/bee/pipe.jpg")
    return root


BAD = {"html.jpg", "empty.jpg", "cut.jpg", "cut.png", "thin.png"}


def run(*arguments):
    """The exit status."""
    try:
        check_data.run([str(each) for each in arguments])
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.mark.parametrize("workers", [0, 2])
def test_each_kind_is_found(folder, tmp_path, capsys, workers, monkeypatch):
    monkeypatch.setattr("fastkd.data.check.FEW", 1)
    assert run(folder, "--csv", tmp_path / "found.csv", "--workers", workers) == 1
    with open(tmp_path / "found.csv") as file:
        rows = list(csv.DictReader(file))
    found = {(os.path.basename(row["image"]), row["kind"]) for row in rows}
    assert {(name, kind) for name, (_, kind) in ODD.items()} <= found
    assert {("other.jpg", "other label"), ("again.jpg", "train and val"), ("dangling.jpg", "unreadable")} <= found
    assert not any(name[0].isdigit() for name, _ in found)  # the good ones
    bad = {os.path.basename(row["image"]) for row in rows if row["bad"] == "1"}
    assert bad == BAD | {"dangling.jpg"}
    shown = capsys.readouterr().out
    assert "6 of them bad" in shown and "html.jpg: no picture" in shown and "pipe.jpg" in shown


def test_training_takes_the_list_or_skips(folder, tmp_path):
    """The same images by --file-list, by --skip-bad, and after the bad ones are removed."""
    listed = tmp_path / "good.txt"
    run(folder, "--file-list", listed)
    (folder / "train/bee/dangling.jpg").unlink()  # walk.py would refuse it where there is no list
    lines = listed.read_text().splitlines()
    assert lines == sorted(lines) and not BAD & {os.path.basename(line) for line in lines}

    def images(**options):
        notes = []
        data = DataOptions(str(folder), loader="folder", workers=0, batch_size=4, image_size=16, **options)
        train, val = create_loaders(data, torch.device("cpu"), log=notes.append)
        return torch.cat([x for x, _ in train]), torch.cat([x for x, _ in val]), notes

    with pytest.raises(UserError, match=r"`fastkd check-data` finds all such files"):
        images()
    by_list, by_check = images(file_list=str(listed)), images(skip_bad=True)
    assert any("--skip-bad leaves out 5 of the 21 images" in note for note in by_check[2])
    for name in BAD:
        (folder / "train/ant" / name).unlink()
    removed = images()
    for i in (0, 1):
        assert torch.equal(by_list[i], removed[i]) and torch.equal(by_check[i], removed[i])


def test_dropped_duplicates_are_not_in_the_list(folder, tmp_path):
    run(folder, "--file-list", tmp_path / "all.txt")
    run(folder, "--file-list", tmp_path / "once.txt", "--drop-duplicates")
    every, once = ({*(tmp_path / f"{name}.txt").read_text().splitlines()} for name in ("all", "once"))
    assert every - once == {"train/ant/twice.jpg", "train/bee/other.jpg", "val/ant/again.jpg"}


def test_a_list_that_does_not_fit_is_refused(folder, tmp_path):
    for content, message in (
        (b"", "names no images"),
        (b"train/ant/gone.jpg\ntrain/ant/0.jpg\ntrain/bee/0.jpg\n", "not there"),
    ):
        (tmp_path / "list.txt").write_bytes(content)
        data = DataOptions(str(folder), loader="folder", workers=0, file_list=str(tmp_path / "list.txt"))
        with pytest.raises(UserError, match=message):
            create_loaders(data, torch.device("cpu"))
    with pytest.raises(UserError, match="cannot be read"):
        data = DataOptions(str(folder), loader="folder", workers=0, file_list=str(tmp_path / "none.txt"))
        create_loaders(data, torch.device("cpu"))


def test_a_class_without_a_good_image_is_named(folder):
    for file in (folder / "train/bee").iterdir():
        file.unlink()
    (folder / "train/bee/x.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"no image of bee can be read"):
        create_loaders(DataOptions(str(folder), loader="folder", workers=0, skip_bad=True), torch.device("cpu"))


def test_shards(tmp_path):
    for part in ("train", "val"):
        with tarfile.open(tmp_path / f"{part}-000.tar", "w") as shard:
            for i in range(6):
                content = b"" if (part, i) == ("train", 2) else picture(i + 50 * (part == "val"))
                for ending, data in (("jpg", content), ("cls", str(i % 2).encode())):
                    info = tarfile.TarInfo(f"{i:03}.{ending}")
                    info.size = len(data)
                    shard.addfile(info, io.BytesIO(data))
    listed = tmp_path / "list.txt"
    pattern = str(tmp_path / "{train,val}-000.tar")
    assert run(pattern, "--file-list", listed) == 1
    assert len(listed.read_text().splitlines()) == 11
    for options in ({"file_list": str(listed)}, {"skip_bad": True}):
        data = DataOptions(pattern, loader="folder", workers=0, batch_size=2, image_size=16, **options)
        train, val = create_loaders(data, torch.device("cpu"), log=lambda line: None)
        assert (train.samples, val.samples) == (5, 6) and len(torch.cat([x for x, _ in train])) == 5


def test_wrong_use(folder, tmp_path):
    (tmp_path / "there").write_text("x")
    for arguments, message in (
        ([], "needs a folder first"),
        ([tmp_path / "nowhere"], "no such folder"),
        ([__file__], "it is a file, not a folder"),
        ([folder, "--csv", tmp_path / "there"], "there already"),
        ([folder, "--drop-duplicates"], "give --file-list"),
        (["digits"], "files of its own kind"),
        ([folder, "--workers", "-1"], "at least 0"),
    ):
        with pytest.raises(UserError, match=message):
            run(*arguments)


def test_skip_bad_leaves_out_what_evaluation_would_enlarge_too_much(tmp_path):
    """1 x 20,000 pixels become 256 x 5,120,000; the size of the images is that of a folder, as it is not given."""
    for part in ("train", "val"):
        for label, name in enumerate(("ant", "bee")):
            (tmp_path / part / name).mkdir(parents=True)
            (tmp_path / part / name / "0.jpg").write_bytes(picture(label))
    (tmp_path / "val/ant/thin.png").write_bytes(picture(9, kind="PNG", size=(1, 20000)))
    splits = training_splits(DataOptions(str(tmp_path), workers=0, skip_bad=True), print)
    assert [len(splits[part].files) for part in ("train", "val")] == [2, 2]
