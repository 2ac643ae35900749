"""The kept sizes of a folder's images."""

import os
import pickle
import signal
import time

import damage
import numpy as np
import pytest
import torch
from forked import fork
from PIL import Image

import fastkd.data.image_index as image_index
from fastkd.data.decode import decode, header
from fastkd.data.image_index import read_index
from fastkd.data.index_file import NO_ROWS, ROW, load
from fastkd.data.scan import scan
from fastkd.errors import UserError


@pytest.fixture
def kept(monkeypatch, tmp_path):
    """Every index is kept, and the cache folder is a temporary one. Gives the list of the files that are read."""
    seen = []
    monkeypatch.setattr(image_index, "SLOW", -1)
    monkeypatch.setattr(image_index, "header", lambda file, *how: seen.append(file) or header(file, *how))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return seen


@pytest.fixture
def folder(tmp_path):
    return make(tmp_path / "data")


def make(root, count: int = 12):
    for part in ("train", "val"):
        for i in range(count):
            (root / part / str(i % 2)).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (10 + i, 30 - i)).save(root / part / str(i % 2) / f"{i}.png")
    return root


def files_of(root, part="train"):
    return scan(str(root / part)).files


def index_of(root, part="train", log=print, **more):
    return read_index(files_of(root, part), [str(root)], log=log, **more)


@pytest.mark.parametrize("exif", [False, True])
def test_sizes_are_those_of_the_decoded_images(pictures, tmp_path, exif):
    files = files_of(pictures) + files_of(pictures, "val")
    for name, data in damage.good_files().items():
        (tmp_path / name).write_bytes(data)
        files.append(str(tmp_path / name))
    for kind in ("JPEG", "PNG", "WEBP", "TIFF"):
        for orientation in (0, 1, 2, 5, 6, 7, 8, 9, 300):
            about = Image.Exif()
            about[0x0112] = orientation
            files.append(str(tmp_path / f"{kind}{orientation}"))
            with open(files[-1], "wb") as stream:
                stream.write(damage.saved(damage.noisy(40, 31), kind, exif=about))
    sizes = read_index(files, exif=exif).sizes
    assert sizes.dtype == torch.int64
    assert sizes.tolist() == [list(decode(file, exif).shape[1:]) for file in files]


def test_only_what_changed_is_read_again(folder, kept):
    said = []
    first = index_of(folder, log=said.append)
    assert sorted(kept) == sorted(files_of(folder)) and "size of 12 images" in said[0]
    assert str(folder / ".fastkd-index.npz") in said[0]
    kept.clear()
    assert np.array_equal(index_of(folder, log=said.append).rows, first.rows) and kept == [] and len(said) == 1
    changed, touched, new = (folder / "train" / "0" / f"{name}.png" for name in (0, 2, "new"))
    Image.new("RGB", (77, 33)).save(changed)
    os.utime(touched, ns=(1, 1))
    Image.new("RGB", (78, 34)).save(new)
    (folder / "train" / "1" / "1.png").unlink()
    index = index_of(folder)
    assert sorted(kept) == sorted(map(str, (changed, touched, new)))
    where = [files_of(folder).index(str(file)) for file in (changed, new)]
    assert index.sizes[where].tolist() == [[33, 77], [34, 78]] and len(index.rows) == 12


def test_the_splits_of_a_folder_share_an_index(folder, kept):
    index_of(folder), index_of(folder, "val")
    kept.clear()
    both = read_index(files_of(folder, "val") + files_of(folder), [str(folder)])
    assert kept == [] and both.sizes[0].tolist() == [30, 10] and len(both.sizes) == 24


def test_a_moved_folder_keeps_its_index(folder, kept):
    want = index_of(folder).sizes
    kept.clear()
    os.rename(folder, folder.parent / "moved")
    assert torch.equal(index_of(folder.parent / "moved").sizes, want) and kept == []


def test_files_that_went_away_do_not_pile_up(folder, kept):
    for name in range(30):
        files = [str(folder / "train" / "0" / "0.png")]
        os.rename(files[0], files[0] + f"{name}.png")
        read_index([files[0] + f"{name}.png"], [str(folder)])
        os.rename(files[0] + f"{name}.png", files[0])
    assert len(load(str(folder / ".fastkd-index.npz"), print)) <= 2


def test_the_orientation_is_read_when_it_is_needed(folder, kept):
    exif = Image.Exif()
    exif[0x0112] = 6
    damage.noisy(40, 30).save(folder / "train" / "0" / "turned.jpg", exif=exif)
    at = files_of(folder).index(str(folder / "train" / "0" / "turned.jpg"))
    found = []
    for turn in (False, True, False, True):
        found.append((index_of(folder, exif=turn).sizes[at].tolist(), len(kept)))
    assert found == [([30, 40], 13), ([40, 30], 26), ([30, 40], 26), ([40, 30], 26)]


def test_an_index_that_is_read_at_once_is_not_kept(folder, monkeypatch):
    monkeypatch.setattr(image_index, "SLOW", 60.0)
    index_of(folder)
    assert os.listdir(folder) == ["train", "val"] or os.listdir(folder) == ["val", "train"]


def test_the_index_is_no_entry_of_the_data(folder, kept):
    index_of(folder)
    read_index(files_of(folder), [str(folder / "train")])
    (folder / "train" / ".fastkd-index.host.tmp").write_bytes(b"of a run that was killed")
    assert scan(str(folder / "train")).notes == ()


def test_a_folder_that_cannot_be_written(folder, kept, monkeypatch, tmp_path):
    write = image_index.write

    def refuse(path, rows):
        if path.startswith(str(folder)):
            raise OSError("read-only file system")
        write(path, rows)

    monkeypatch.setattr(image_index, "write", refuse)
    said = []
    first = index_of(folder, log=said.append)
    kept.clear()
    assert np.array_equal(index_of(folder).rows, first.rows) and kept == []
    assert str(tmp_path / "cache" / "fastkd") in said[0]
    monkeypatch.setattr(image_index, "write", lambda path, rows: os.listdir("/nowhere"))
    Image.new("RGB", (9, 9)).save(folder / "train" / "0" / "0.png")
    index_of(folder, log=said.append)
    assert "cannot be kept" in said[1]


def spoil(good: bytes):
    yield "empty", b""
    for length in (1, 10, len(good) // 2, len(good) - 1):
        yield f"{length} bytes", good[:length]
    yield "other bytes", good[: len(good) // 2] + b"\x55" * 8 + good[len(good) // 2 + 8 :]
    yield "pickle", pickle.dumps({"rows": 1})


def test_a_damaged_index_is_made_anew(folder, kept):
    want, path = index_of(folder).rows, folder / ".fastkd-index.npz"
    good = path.read_bytes()
    for what, data in spoil(good):
        path.write_bytes(data)
        said = []
        kept.clear()
        assert np.array_equal(index_of(folder, log=said.append).rows, want) and len(kept) == 12, what
        assert "cannot be used" in said[0] and str(path) in said[0] and "\n" not in said[0]
        assert path.read_bytes() == good


@pytest.mark.parametrize("rows", [np.zeros(3), np.zeros(3, ROW), np.zeros((2, 2), ROW), NO_ROWS])
def test_an_index_of_another_form_is_made_anew(folder, kept, rows):
    np.savez(folder / ".fastkd-index.npz", rows=rows)
    assert len(index_of(folder).sizes) == 12 and len(kept) == 12


def test_a_run_that_was_killed_goes_on_and_ends_with_the_same_bytes(folder, kept, monkeypatch):
    monkeypatch.setattr(image_index, "CHUNK", 1)
    monkeypatch.setattr(image_index, "SAVE_EVERY", -1)
    path, want = folder / ".fastkd-index.npz", index_of(folder).rows
    good, random = path.read_bytes(), np.random.default_rng(0)
    path.unlink()
    known = [0]
    while len(known) < 20 or (known[-1] == 0 and len(known) < 400):
        child = fork()
        if not child:
            monkeypatch.setattr(image_index, "header", lambda *how: time.sleep(0.005) or header(*how))
            index_of(folder, log=lambda line: None)
            os._exit(0)
        time.sleep(random.uniform(0.005, 0.04) * (1 + len(known) / 20))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        known.append(len(load(str(path), pytest.fail)))  # a damaged one would be logged
    kept.clear()
    assert np.array_equal(index_of(folder).rows, want) and len(kept) == 12 - known[-1]
    assert path.read_bytes() == good and known == sorted(known) and known[-1] > 0


def test_damaged_headers_are_counted_and_the_first_are_named(folder, kept):
    for i in range(9):
        (folder / "train" / "1" / f"bad{i}.jpg").write_bytes(damage.good_files()["jpeg"][: 20 + i])
    for _ in range(2):
        with pytest.raises(UserError) as caught:
            index_of(folder)
        message = str(caught.value)
        assert message.startswith("9 damaged images: ") and "; and 4 more: repair or remove these files" in message
        assert message.count("cannot be decoded (") == 5 and "bad0.jpg" in message and "\n" not in message
    assert len(kept) == 12 + 9 + 9  # the good ones are kept


def test_a_file_that_went_away_is_named(folder):
    files = [*files_of(folder), str(folder / "gone.jpg")]
    with pytest.raises(UserError, match="gone.jpg' cannot be decoded .No such file"):
        read_index(files, [str(folder)])


def test_files_may_be_listed_twice_and_lie_in_several_folders(folder, kept, tmp_path):
    other = make(tmp_path / os.fsdecode(b"caf\xe9 \n"), 4)
    files = files_of(folder) + files_of(other) + files_of(folder)[:3]
    roots = [f"{folder}/", str(other), ""]
    sizes = read_index(files, roots).sizes
    assert sizes.tolist() == [list(decode(file).shape[1:]) for file in files]
    assert len(kept) == 16 and all(os.path.exists(os.path.join(root, ".fastkd-index.npz")) for root in roots[:2])


def test_processes_read_the_same(folder, kept, monkeypatch):
    want = index_of(folder).rows
    (folder / ".fastkd-index.npz").unlink()
    monkeypatch.setattr(image_index, "FEW", 0)
    monkeypatch.setattr(image_index, "CHUNK", 3)
    assert np.array_equal(index_of(folder, workers=2).rows, want)
