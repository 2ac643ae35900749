"""Tar shards of WebDataset as --data: the images, labels and order of the folder that they were made from."""

import json
import os
import tarfile
import tracemalloc

import pytest
import torch
from shard_files import add, tar_folder, write_tars

from fastkd.data import DataOptions, create_eval_loader, create_loaders, shards
from fastkd.data.layout import training_splits
from fastkd.data.scan import scan
from fastkd.data.shard_names import by_part, expand, shards_of
from fastkd.data.shards import refuse_unknown, stored_splits
from fastkd.data.tar_index import index_of, scan_shard
from fastkd.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tars(tmp_path, pictures):
    return tar_folder(tmp_path / "tars", pictures)


def epoch(data, log=lambda line: None, **more):
    options = DataOptions(data=str(data), workers=0, batch_size=8, image_size=32, loader="folder", **more)
    loaders = create_loaders(options, CPU, seed=5, log=log)
    return [torch.cat([part.clone() for part in column]) for loader in loaders for column in zip(*loader, strict=True)]


@pytest.mark.parametrize("label", ["cls", "json"])
def test_tars_give_the_batches_of_the_folder(tmp_path, pictures, label):
    lines = []
    tars = tar_folder(tmp_path / "tars", pictures, label)
    for ours, theirs in zip(epoch(tars, lines.append), epoch(pictures), strict=True):
        assert torch.equal(ours, theirs)
    assert any("27 images in 2 files for train, 36 images in 1 file for val; 3 classes" in line for line in lines)
    assert any("not read in the tar files: 27 .pyd" in line for line in lines)


def test_workers_read_tars(tars, pictures):
    options = DataOptions(data=str(tars), workers=2, batch_size=8, image_size=32, loader="folder")
    train, val = create_loaders(options, CPU, seed=5, log=lambda line: None)
    alone = epoch(pictures)
    assert torch.equal(torch.cat([images.clone() for images, _ in train]), alone[0])
    assert train.classes == ("ant", "bee", "cow")


def test_names_with_braces_stars_and_folders(tars, tmp_path):
    whole = epoch(tars)
    for pattern in ("{train-000,train-001,val-000}.tar", "*.tar", "*-00*.tar"):
        assert torch.equal(epoch(tars / pattern)[1], whole[1])
    (tars / "train").mkdir(), (tars / "val").mkdir()
    for file in tars.glob("*.tar"):
        file.rename(tars / file.name.split("-")[0] / file.name.split("-")[1])
    assert torch.equal(epoch(tars)[1], whole[1])  # train/000.tar, with classes.txt one folder above


def test_the_indices_of_many_shards_are_not_all_in_memory(monkeypatch):
    """1.28 million images take 0.3 GB: their names, labels and places. Their indices would take 0.6 GB."""

    def index(shard):
        rows = [[f"n{shard[-7:-4]}_{i:08}.jpg", 1 << 30 | i, 110_000 + i, "jpeg", 400 + i % 500] for i in range(1000)]
        return {"images": rows, "skipped": {"txt": 2}}, True

    monkeypatch.setattr(shards, "index_of", index)
    lines, count = [], 64
    tracemalloc.start()
    try:
        names, labels, places, formats = shards._tar_part([f"/x/train-{i:03}.tar" for i in range(count)], lines.append)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(names) == len(labels) == count * 1000 and formats == {"jpeg": (count * 1000, names[0])}
    assert lines == ["data: indexed 64 of 64 tar files", "data: not read in the tar files: 128 .txt"]
    assert names[2001] == "/x/train-002.tar/n002_00000001.jpg" and labels[2001] == 401
    assert [int(each[2001]) for each in (places.shard, places.offset, places.length)] == [2, 1 << 30 | 1, 110_001]
    assert peak < 320 * count * 1000


def test_expanding_braces():
    assert expand("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand("{a,b}/{0..1}") == ["a/0", "a/1", "b/0", "b/1"]
    assert expand("{a-{0..1},b}.{tar,x}") == ["a-0.tar", "a-0.x", "a-1.tar", "a-1.x", "b.tar", "b.x"]
    assert expand("{a{x,y{0..1}},b}") == ["ax", "ay0", "ay1", "b"] and expand("a.tar") == ["a.tar"]
    for wrong in (
        "{3..1}.tar",
        "{a,b.tar",
        "a}.tar",
        "{a,{0..1}.tar",
        "{{0..1}}.tar",
        "{x}.tar",
        "{0..99999999}.tar",
        "{0..9999}{0..9999}.tar",
    ):
        with pytest.raises(UserError, match="--data "):
            expand(wrong)


def test_a_file_whose_name_has_a_brace(tars):
    file = (tars / "train-000.tar").rename(tars / "train{0.tar")
    assert shards_of(str(file)) == {"train": [str(file)]}


def test_classes_that_only_the_shards_for_val_have(tmp_path):
    """Texts without a list of names: the network would get a class that it never sees. With a list, a line says it."""
    labels = {"train-0": ("ant", "bee"), "val-0": ("ant", "bea")}
    (tmp_path / "x").mkdir()
    for name, pair in labels.items():
        members = [
            (f"{i}.{end}", data) for i, word in enumerate(pair) for end, data in (("jpg", JPEG), ("cls", word.encode()))
        ]
        write(tmp_path / "x" / f"{name}.tar", *members)
    with pytest.raises(UserError, match="only in val: bea; only in train: bee"):
        stored_splits(str(tmp_path / "x"), print)
    (tmp_path / "x" / "classes.txt").write_text("ant\nbea\nbee\n")
    lines: list[str] = []
    stored_splits(str(tmp_path / "x"), lines.append)
    assert "data: no training image has the label of 1 of the 2 classes that are evaluated (bea)" in lines
    assert "data: the shards for val have 2 of the 3 classes (they lack bee)" in lines


def test_the_part_is_a_word_of_the_name():
    files = ["/x/training.tar", "train_0.tar", "d/validation-0.tar", "test-0.tar", "imagenet.tar"]
    assert by_part(files) == {"train": ["train_0.tar"], "val": ["d/validation-0.tar"]}
    assert by_part(["train.tar", "test.tar"]) == {"train": ["train.tar"], "val": ["test.tar"]}
    for names in (
        ("imagenet-train-0.tar", "imagenet-val-0.tar"),
        ("imagenet1k-train-9.tar", "imagenet1k-validation-9.tar"),
    ):
        assert by_part([*names]) == {"train": [names[0]], "val": [names[1]]}
    assert by_part(["/train/0.tar", "/val/latest-trained-0.tar"]) == {
        "train": ["/train/0.tar"],
        "val": ["/val/latest-trained-0.tar"],
    }
    assert by_part(["/x/shard-0.tar", "/x/shard-1.tar"]) == {"": ["/x/shard-0.tar", "/x/shard-1.tar"]}


def test_a_folder_of_images_with_an_archive_beside_it_stays_a_folder(small):
    (small / "ILSVRC2012_img_train.tar").write_bytes(b"")
    assert shards_of(str(small)) is None


def test_hold_out_does_not_depend_on_the_place(tmp_path, pictures):
    held = []
    for place in ("a", "deeper/b"):
        write_tars(tmp_path / place, "shard", scan(str(pictures / "train")), 2)
        options = DataOptions(data=str(tmp_path / place), val_fraction=0.3, workers=0)
        splits = training_splits(options, lambda line: None)
        held.append([file.removeprefix(str(tmp_path / place)) for file in splits["val"].files])
        assert len(splits["val"].files) == 9 and len(splits["train"].files) == 18
        assert [splits["val"].places.read(i)[:2] for i in range(2)]
    assert held[0] == held[1]


def test_unlabelled_images_of_a_folder_beside_tars(tars, small):
    options = DataOptions(
        data=str(tars), unlabelled=str(small), workers=0, batch_size=8, image_size=32, loader="folder"
    )
    train, _ = create_loaders(options, CPU, log=lambda line: None)
    targets = torch.cat([target for _, target in train])
    assert train.unlabelled == 8 and int((targets == -100).sum()) == 8 and len(targets) == 35


def test_the_eval_loader_reads_val_alone(tars):
    loader = create_eval_loader(DataOptions(data=str(tars), workers=0, image_size=32), CPU, log=lambda line: None)
    assert loader.samples == 36


def test_the_index_is_made_once_and_anew_if_the_shard_changes(tars, cache):
    shard = str(tars / "train-000.tar")
    index, made = index_of(shard)
    again, made_again = index_of(shard)
    assert made and not made_again and again == index and len(list(cache.rglob("*.json"))) == 1
    os.utime(shard, ns=(1, 1))
    assert index_of(shard)[1]
    next(cache.rglob("*.json")).write_text('{"version": 1, "siz')
    assert index_of(shard) == (index | {"mtime": 1}, True)


def test_a_cache_that_cannot_be_written_is_done_without(tars, cache):
    cache.write_text("a file")
    assert index_of(str(tars / "train-000.tar"))[1] and index_of(str(tars / "train-000.tar"))[1]


def write(path, *members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            add(tar, name, data)
    return str(path)


JPEG = b"\xff\xd8\xff\xe0" + bytes(40)


@pytest.mark.parametrize("content", [b"<html>", b""])
def test_what_does_not_begin_like_a_picture_is_named_before_a_run(tmp_path, content):
    write(tmp_path / "train-0.tar", ("a.jpg", content), ("a.cls", b"0"), ("b.jpg", JPEG), ("b.cls", b"1"))
    splits = stored_splits(str(tmp_path / "train-0.tar"), print)  # for check-data
    with pytest.raises(UserError, match="a.jpg is no picture, by its first bytes: leave it out; `fastkd check-data`"):
        refuse_unknown(splits)
    with pytest.raises(UserError, match="a.jpg is no picture"):
        training_splits(DataOptions(str(tmp_path / "train-0.tar"), val_fraction=0.5), print)


@pytest.mark.parametrize(
    "members, message",
    [
        ([("a.jpg", JPEG), ("a.cls", b"0"), ("b.cls", b"1")], "1 labels have no image (b)"),
        ([("a.jpg", JPEG), ("a.jpg", JPEG), ("a.cls", b"0")], "two members named 'a.jpg'"),
        ([("a.jpg", JPEG), ("a.cls", b"0"), ("a.cls", b"1")], "two members named 'a.cls'"),
        ([("a.jpg", JPEG), ("a.png", b"\x89PNG\r\n\x1a\n"), ("a.cls", b"0")], "2 images of the key 'a' (jpg, png)"),
        ([("a.jpg", JPEG), ("a.cls", b"\xff\xfe")], "a.cls cannot be read as a label"),
        ([("a.jpg", JPEG), ("a.json", b"[1")], "a.json cannot be read as a label"),
        ([("a.jpg", JPEG), ("a.json", b"[" * 100_000)], "a.json cannot be read as a label"),
        ([("a.jpg", JPEG), ("a.json", b'{"label": 1.5}')], "a.json has the label 1.5"),
        ([("a.jpg", JPEG), ("a.cls", b"")], "a.cls has the label ''"),
    ],
)
def test_samples_that_are_wrong_are_named(tmp_path, members, message):
    with pytest.raises(UserError) as error:
        scan_shard(write(tmp_path / "x.tar", *members))
    assert message in str(error.value) and "x.tar" in str(error.value)


def test_images_without_labels_are_named(tmp_path, pictures):
    write_tars(tmp_path / "t", "train", scan(str(pictures / "train")), 1, label="")
    with pytest.raises(UserError, match="27 images in tar files without a label, such as .*0000_RGB.jpg"):
        epoch(tmp_path / "t", val_fraction=0.1)


@pytest.mark.parametrize(
    "labels, message", [(("0", "-1"), "some labels are"), (("0", "3000000"), "from 0 to 3,000,000")]
)
def test_labels_that_fit_no_class(tmp_path, labels, message):
    members = [
        (f"{i}.{end}", data) for i, label in enumerate(labels) for end, data in (("jpg", JPEG), ("cls", label.encode()))
    ]
    write(tmp_path / "t.tar", *members)
    with pytest.raises(UserError, match=message):
        epoch(tmp_path / "t.tar", val_fraction=0.5)


@pytest.mark.parametrize("length", [0, 1, 511, 512, 1000, 5000, -10240, -12000])
def test_a_shard_that_was_cut_off_is_named(tars, length):
    shard = tars / "train-001.tar"
    os.truncate(shard, length if length >= 0 else shard.stat().st_size + length)
    with pytest.raises(UserError, match="train-001.tar.*(cut off|is no tar file)"):
        scan_shard(str(shard))


def test_damage_in_the_middle_and_other_formats_are_named(tars, tmp_path):
    shard = tars / "train-000.tar"
    data = bytearray(shard.read_bytes())
    second = index_of(str(shard))[0]["images"][1][1] - 512
    data[second : second + 100] = bytes(range(100))
    shard.write_bytes(data)
    with pytest.raises(UserError, match="damaged at byte"):
        scan_shard(str(shard))
    (tmp_path / "x.tar").write_bytes(b"\x1f\x8b" + bytes(600))
    with pytest.raises(UserError, match="compressed \\(gzip\\)"):
        scan_shard(str(tmp_path / "x.tar"))


def test_a_damaged_image_is_named_with_its_shard(tars):
    shard = tars / "val-000.tar"
    name, offset, length, *_ = index_of(str(shard))[0]["images"][3]
    data = bytearray(shard.read_bytes())
    data[offset + 100 : offset + length] = bytes(length - 100)
    shard.write_bytes(data)
    with pytest.raises(UserError, match=f"val-000.tar/{name}' cannot be decoded"):
        epoch(tars)


def test_links_and_names_that_leave_the_folder_are_nothing_but_names(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        link = tarfile.TarInfo("a.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        add(tar, "../../etc/b.jpg", JPEG)
        add(tar, "../../etc/b.cls", b"1")
    assert [row[0] for row in scan_shard(str(tmp_path / "x.tar"))["images"]] == ["../../etc/b.jpg"]


def test_missing_parts_and_files_are_named(tars):
    with pytest.raises(UserError, match="1 of its 3 shards are missing"):
        epoch(tars / "train-{000..002}.tar")
    with pytest.raises(UserError, match="no shards for val.*--val-fraction"):
        epoch(tars / "train-{000..001}.tar")
    with pytest.raises(UserError, match="has a val/ already"):
        epoch(tars, val_fraction=0.1)
    (tars / "classes.txt").write_text("ant\nbee\n")
    with pytest.raises(UserError, match="labels go from 0 to 2, and there are names for 2"):
        epoch(tars)


def test_a_shard_that_shrinks_during_training_is_named(tars):
    options = DataOptions(data=str(tars), workers=0, batch_size=8, image_size=32, loader="folder")
    train, _ = create_loaders(options, CPU, log=lambda line: None)
    for name in ("train-000.tar", "train-001.tar"):
        os.truncate(tars / name, 600)
    with pytest.raises(UserError, match="train-00.*bytes are missing: the shard was cut off"):
        list(train)


def test_classes_json_wins_and_is_checked(tars):
    (tars / "classes.json").write_text(json.dumps(["x", "y", "z", "w"]))
    train, _ = create_loaders(DataOptions(data=str(tars), workers=0, image_size=32), CPU, log=lambda line: None)
    assert train.classes == ("x", "y", "z", "w")
    for wrong in ('{"a": 1}', "[1, 2]", '["a", "a", "b"]', "["):
        (tars / "classes.json").write_text(wrong)
        with pytest.raises(UserError, match="classes.json"):
            epoch(tars)
