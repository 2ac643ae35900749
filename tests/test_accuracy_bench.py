"""The accuracy benchmark: its pictures, its arithmetic, and that it goes on where it was."""

import gzip
import json
import math

import numpy as np
import pytest
import torch

from fastkd.bench import fashion
from fastkd.bench.scripts import accuracy
from fastkd.data.base import Shard, derived_seed, epoch_order
from fastkd.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files like Fashion-MNIST's: 60 and 40 images, the classes in turn; pixel [0, 0] is the image's number."""
    folder = tmp_path_factory.mktemp("idx")
    random = np.random.default_rng(0)
    for part, count in (("train", 60), ("t10k", 40)):
        images = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        images[:, 0, 0] = np.arange(count)
        header = b"\0\0\x08\x03" + np.array([count, 28, 28], ">i4").tobytes()
        packed = gzip.compress(header + images.tobytes())
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(packed)
        labels = b"\0\0\x08\x01" + np.array([count], ">i4").tobytes() + bytes(i % 10 for i in range(count))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(labels)
    return folder


def loaders(folder, seed=0, images=(0, 0)):
    return fashion.create_fashion(16, torch.device("cpu"), Shard(seed), images, folder)


def test_idx_files_are_read_gzipped_or_not(folder):
    images, target = fashion.read_part("train", 0, folder)
    assert images.shape == (60, 32, 32) and target.tolist() == [i % 10 for i in range(60)]
    assert (images[:, 2, 2] * 255).round().int().tolist() == list(range(60))  # framed by 2 pixels of background
    assert not images[:, :2].any() and not images[:, :, 30:].any()


def test_the_subset_is_the_first_of_each_class(folder, tmp_path):
    images, target = fashion.read_part("train", 20, folder)
    assert (images[:, 2, 2] * 255).round().int().tolist() == list(range(20))
    assert target.bincount().tolist() == [2] * 10
    header = b"\0\0\x08\x03" + np.array([6, 28, 28], ">i4").tobytes()
    pixels = np.arange(6, dtype=np.uint8).repeat(28 * 28).tobytes()  # each image is filled with its number
    (tmp_path / "train-images-idx3-ubyte").write_bytes(header + pixels)
    labels = b"\0\0\x08\x01" + np.array([6], ">i4").tobytes() + bytes([1, 1, 0, 1, 0, 0])
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(labels)
    images, target = fashion.read_part("train", 20, tmp_path)
    assert (images[:, 2, 2] * 255).round().int().tolist() == [0, 1, 2, 4] and target.tolist() == [1, 1, 0, 0]


def test_a_wrong_folder_says_what_to_install(tmp_path):
    with pytest.raises(UserError, match="dataset-fashion-mnist"):
        fashion.read_part("train", 0, tmp_path)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"GIF89a")
    with pytest.raises(UserError, match="no IDX file"):
        fashion.read_part("train", 0, tmp_path)


def test_each_epoch_shows_every_image_once_moved_or_mirrored(folder):
    train, val = loaders(folder)
    originals = train.images[:, 4:36, 4:36]
    images, target = (torch.cat(parts) for parts in zip(*train, strict=True))
    assert images.shape == (60, 3, 32, 32) and images[0].is_contiguous() is False  # channels-last
    random = torch.Generator().manual_seed(derived_seed(0, 0, 4))
    corners, mirrored = torch.randint(9, (60, 2), generator=random), torch.rand(60, generator=random) < 0.5
    order = epoch_order(60, 0, 0)
    assert sorted(order.tolist()) == list(range(60)) and 10 < mirrored.sum() < 50
    assert torch.equal(target, train.target[order])
    for image, i in zip(images, order, strict=True):
        y, x = corners[i]
        crop = train.images[i, y : y + 32, x : x + 32]
        assert torch.equal(image, (crop.flip(1) if mirrored[i] else crop).expand(3, -1, -1))
    plain, _ = next(iter(val))
    assert torch.equal(plain[:, 0], val.images[:16, 4:36, 4:36])
    assert abs(originals.mean()) < 1e-5 and abs(originals.std() - 1) < 1e-2


def test_a_loader_goes_on_where_another_was(folder):
    first, second = loaders(folder)[0], loaders(folder)[0]
    epochs = [torch.cat([images for images, _ in first]) for _ in range(2)]
    list(second)
    third = loaders(folder)[0]
    third.load_state_dict(second.state_dict())
    assert torch.equal(torch.cat([images for images, _ in third]), epochs[1])
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[0], torch.cat([images for images, _ in loaders(folder, seed=1)[0]]))


def made_record() -> dict:
    def runs(*top1s, **more):
        return {str(seed): {"top1": top1, "seconds": 10.0, **more} for seed, top1 in enumerate(top1s)}

    pairs = {
        "kd": runs(92.0, 94.0, 99.0),
        "dml": runs(91.0, peer1_top1=88.5) | {"1": {"error": "training diverged"}},
        "ce": runs(90.0, 93.0, 93.0),
        "teacher": runs(97.0, 98.0, 99.0),
    }
    settings = {"data": "digits", "images": [1442, 355], "epochs": 12, "teacher": "resnet20", "student": "resnet8"}
    where = {"gpu": None, "cpu": "a CPU", "torch": "2"}
    return {"settings": settings, "environment": where, "commit": "abc", "pairs": pairs}


def test_means_and_sample_deviations():
    assert accuracy.mean_and_deviation([92.0, 94.0, 99.0]) == (95.0, math.sqrt((9 + 1 + 16) / 2))
    assert accuracy.mean_and_deviation([91.0]) == (91.0, None)
    assert accuracy.gains(made_record(), "kd") == [2.0, 1.0, 6.0]


def test_the_table_by_hand():
    lines = accuracy.table(made_record()).splitlines()
    assert lines[2] == "| teacher | 3 | 98.00 ± 1.00 |  |  | 10 |"
    assert lines[3] == "| student alone | 3 | 92.00 ± 1.73 |  |  | 10 |"
    assert lines[4] == "| kd | 3 | 95.00 ± 3.61 | +3.00 ± 2.65 |  | 10 |"
    assert lines[5] == "| dml | 1 | 91.00 | +1.00 | peer1 88.50 | 10 |"
    assert lines[-1] == "dml, seed 1 failed: training diverged"
    assert "one is 0.28 %" in accuracy.heading(made_record())


def test_the_picture(tmp_path):
    accuracy.draw(made_record(), tmp_path / "deep/a.png")
    assert (tmp_path / "deep/a.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def small(folder, monkeypatch):
    """The benchmark on the small files."""
    made = accuracy.Study
    monkeypatch.setattr(accuracy, "Study", lambda *a: made(*a[:3], folder, (0, 0)))
    monkeypatch.setattr(accuracy, "TEACHER", "resnet8")


def words(tmp_path, *more) -> list[str]:
    base = ["--data", "fashion", "--epochs", "1", "--seeds", "1", "--device", "cpu"]
    return [*base, "--file", f"{tmp_path}/a.json", "--work", f"{tmp_path}/work", *more]


def test_it_keeps_each_run_and_goes_on(small, tmp_path, capsys, monkeypatch):
    accuracy.main(words(tmp_path, "--methods", "kd"))
    first = json.loads((tmp_path / "a.json").read_text())
    assert set(first["pairs"]) == {"teacher", "kd"} and first["settings"]["images"] == [60, 40]
    run = first["pairs"]["kd"]["0"]
    assert 0 <= run["top1"] <= 100 and run["seconds"] > 0 and run["options"]["temperature"] == 4.0
    assert "2/2  seed 0  kd" in capsys.readouterr().out

    accuracy.main(words(tmp_path, "--methods", "ce,kd,dml"))
    out, second = capsys.readouterr().out, json.loads((tmp_path / "a.json").read_text())
    assert "2 runs are there already" in out and "seed 0  kd" not in out and "seed 0  teacher" not in out
    assert second["pairs"]["kd"] == first["pairs"]["kd"] and second["pairs"]["teacher"] == first["pairs"]["teacher"]
    assert "peer1_top1" in second["pairs"]["dml"]["0"]

    monkeypatch.setattr(accuracy, "train_one", None)  # nothing is trained any more
    accuracy.main(words(tmp_path, "--table"))
    table = capsys.readouterr().out
    assert "| student alone | 1 |" in table and (tmp_path / "a.md").read_text() == table
    assert (tmp_path / "a.png").is_file()


def test_runs_repeat_to_the_bit_and_again_replaces(small, tmp_path):
    accuracy.main(words(tmp_path, "--methods", "kd"))
    record = json.loads((tmp_path / "a.json").read_text())
    first = record["pairs"]["kd"]["0"]
    first["seconds"] = -1
    (tmp_path / "a.json").write_text(json.dumps(record))
    accuracy.main(words(tmp_path, "--methods", "kd", "--again"))
    second = json.loads((tmp_path / "a.json").read_text())["pairs"]["kd"]["0"]
    assert (first["top1"], first["val_loss"]) == (second["top1"], second["val_loss"]) and second["seconds"] >= 0


def test_other_settings_are_refused_and_failures_kept(small, tmp_path, monkeypatch):
    def diverges(*_):
        raise UserError("training diverged")

    accuracy.main(words(tmp_path, "--methods", "ce"))
    with pytest.raises(UserError, match="epochs.*--file"):
        accuracy.main(words(tmp_path, "--methods", "ce", "--epochs", "2"))
    monkeypatch.setattr(accuracy, "train_one", diverges)
    accuracy.main(words(tmp_path, "--methods", "kd"))
    assert json.loads((tmp_path / "a.json").read_text())["pairs"]["kd"]["0"]["error"] == "training diverged"


def test_the_minutes_end_before_a_run(small, tmp_path, capsys):
    accuracy.main(words(tmp_path, "--methods", "ce", "--minutes", "1e-9"))
    out = capsys.readouterr().out
    assert "the same command goes on" in out and "1/2" not in out


@pytest.mark.parametrize(
    "more, word",
    [(["--methods", "kdd"], "did you mean 'kd'"), (["--table"], "run without --table first")],
)
def test_bad_options(tmp_path, more, word):
    with pytest.raises(UserError, match=word):
        accuracy.main(words(tmp_path, *more))
