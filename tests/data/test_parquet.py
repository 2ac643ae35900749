"""Parquet files of images as --data: the images, labels and order of the folder that they were made from."""

import contextlib
import os
import sys

import pytest
import torch
from shard_files import write_parquet

from fastkd.data import DataOptions, create_loaders
from fastkd.data.layout import training_splits
from fastkd.data.pack import Packing, pack
from fastkd.data.pack_source import read_source
from fastkd.data.scan import scan
from fastkd.errors import UserError

CPU = torch.device("cpu")


def quiet(line):
    pass


def test_without_pyarrow_it_is_named(tmp_path, monkeypatch):
    (tmp_path / "train.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match="train.parquet.*needs pyarrow: pip install"):
        training_splits(DataOptions(data=str(tmp_path)), quiet)


@pytest.fixture
def rows(tmp_path, pictures):
    """data/train-00000-of-00002.parquet and so on, in row groups of 5."""
    pytest.importorskip("pyarrow")
    train, val = (scan(str(pictures / part)) for part in ("train", "val"))
    write_parquet(tmp_path / "data/train-00000-of-00002.parquet", train.take(list(range(14))))
    write_parquet(tmp_path / "data/train-00001-of-00002.parquet", train.take(list(range(14, 27))))
    write_parquet(tmp_path / "data/validation-00000-of-00001.parquet", val)
    return tmp_path


def epoch(data, workers=0, log=quiet, **more):
    options = DataOptions(data=str(data), workers=workers, batch_size=8, image_size=32, loader="folder", **more)
    loaders = create_loaders(options, CPU, seed=5, log=log)
    return [torch.cat([part.clone() for part in column]) for loader in loaders for column in zip(*loader, strict=True)]


@pytest.mark.parametrize("workers", [0, 2])
def test_parquet_gives_the_batches_of_the_folder(rows, pictures, workers):
    lines = []
    assert all(map(torch.equal, epoch(rows, workers, lines.append), epoch(pictures)))
    assert any("27 images in 2 files for train, 36 images in 1 file for val; 3 classes" in line for line in lines)
    assert sum("read with up to 4 others of its row group" in line for line in lines) == 1


def test_packing_does_not_advise_to_pack(rows):
    lines = []
    read_source(DataOptions(data=str(rows)), lines.append)
    assert len(lines) == 1 and "holds shards" in lines[0]


def test_names_and_hold_out(rows, pictures):
    options = DataOptions(data=str(rows / "data/train-*.parquet"), val_fraction=0.3)
    splits = training_splits(options, quiet)
    assert splits["train"].classes == ("ant", "bee", "cow") and len(splits["val"].files) == 9
    whole = scan(str(pictures / "train"))
    for split in splits.values():
        for i, (file, label) in enumerate(zip(split.files, split.labels, strict=True)):
            number = int(file.rpartition(" ")[2]) + (14 if "00001-of" in file else 0)
            assert split.places.read(i) == open(whole.files[number], "rb").read() and label == whole.labels[number]


@pytest.mark.parametrize("kind", ["pixels", "files"])
def test_packing_parquet_gives_the_pack_of_the_folder(rows, pictures, tmp_path, kind):
    found = []
    for source in (rows, pictures):
        folder = tmp_path / f"{source.name}-{kind}"
        packing = Packing(kind, 24 if kind == "pixels" else 0)
        pack(str(folder), packing, *read_source(DataOptions(data=str(source)), quiet), 0, lambda new, old: None)
        ending = "npy" if kind == "pixels" else "tar"
        found.append([(folder / f"{part}-00000.{ending}").read_bytes() for part in ("train", "val")])
    assert found[0] == found[1]


def test_labels_without_names_are_numbers(tmp_path, pictures):
    pytest.importorskip("pyarrow")
    for part in ("train", "val"):
        write_parquet(tmp_path / part / "0000.parquet", scan(str(pictures / part)), names=False)
    assert training_splits(DataOptions(data=str(tmp_path)), quiet)["train"].classes == ("0", "1", "2")


def table(tmp_path, **columns):
    import pyarrow
    import pyarrow.parquet

    for part in ("train", "val"):
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / f"{part}.parquet")
    return tmp_path


def jpegs(pictures, count):
    files = [file for file in scan(str(pictures / "train")).files if file.endswith(".jpg")]
    return [open(file, "rb").read() for file in files[:count]]


def test_text_labels_and_plain_bytes(tmp_path, pictures):
    pytest.importorskip("pyarrow")
    root = table(tmp_path, img=jpegs(pictures, 4), labels=["b", "a", "b", "c"], more=[1, 2, 3, 4])
    split = training_splits(DataOptions(data=str(root)), quiet)["train"]
    assert split.classes == ("a", "b", "c") and split.labels == [1, 0, 1, 2] and split.places.read(1)[:2] == b"\xff\xd8"


@pytest.mark.parametrize(
    "columns, message",
    [
        (
            {"photo": [b"x", b"y"], "label": [0, 1]},
            "no column of images that can be told: its columns are photo, label",
        ),
        ({"image": [b"x", b"y"], "kind": [0, 1]}, "no column of labels"),
        ({"image": [b"x", b"y"], "label": [0, None]}, "row 1 has the label None"),
        ({"image": [b"x", b"y"], "label": [0.5, 1.0]}, "row 0 has the label 0.5"),
        ({"image": [b"x", b"y"], "label": [True, False]}, "row 0 has the label True"),
        ({"image": [b"x", b"y"], "label": [0, -1]}, "labels go from -1 to 0"),
        ({"image": [{"bytes": None, "path": "/etc/passwd"}] * 2, "label": [0, 1]}, "/row .*holds no bytes of an image"),
        ({"image": [b"x", b"y"], "label": [0, 1]}, "/row .*cannot be decoded"),
    ],
)
def test_columns_and_rows_that_are_wrong_are_named(tmp_path, columns, message):
    pytest.importorskip("pyarrow")
    with pytest.raises(UserError, match=message):
        epoch(table(tmp_path, **columns))


@pytest.mark.parametrize("length", [0, 3, 100, -1, -200])
def test_a_file_that_was_cut_off_is_named(rows, length):
    file = rows / "data/train-00001-of-00002.parquet"
    os.truncate(file, length if length >= 0 else file.stat().st_size + length)
    with pytest.raises(UserError, match="train-00001-of-00002.parquet' is no parquet file, or is damaged"):
        epoch(rows)


def test_damaged_pages_are_named(rows):
    file = rows / "data/train-00001-of-00002.parquet"
    data = bytearray(file.read_bytes())
    data[4:5000] = bytes(4996)
    file.write_bytes(data)
    with pytest.raises(UserError, match="train-00001-of-00002.parquet/row .*(cannot be decoded|damaged)"):
        epoch(rows)


def test_damaged_labels_are_named(rows):
    """Wrong bytes are named, or give other labels: a page has no checksum."""
    file = rows / "data/train-00001-of-00002.parquet"
    data = file.read_bytes()
    place = (
        pytest.importorskip("pyarrow.parquet").ParquetFile(file).metadata.row_group(0).column(2).data_page_offset
    )  # after bytes and path
    for at in range(place, place + 30):
        file.write_bytes(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])
        with contextlib.suppress(UserError):
            training_splits(DataOptions(data=str(rows)), quiet)
    file.write_bytes(data[:place] + bytes(30) + data[place + 30 :])
    with pytest.raises(UserError, match="train-00001-of-00002.parquet' is damaged in its column 'label'"):
        training_splits(DataOptions(data=str(rows)), quiet)
