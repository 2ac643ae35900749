"""The accuracy benchmark: its pictures, its arithmetic, and that it goes on where it was."""

import datetime
import gzip
import hashlib
import json
import math
import os

import numpy as np
import pytest
import torch

from fastkd.bench import fashion
from fastkd.bench.scripts import accuracy, accuracy_runs, accuracy_table
from fastkd.data import idx
from fastkd.data.order import Shard
from fastkd.data.resident import ResidentSet
from fastkd.errors import UserError
from fastkd.methods import METHODS


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Files like Fashion-MNIST's: 60 and 40 images, the classes in turn; pixel [0, 0] is the image's number."""
    folder = tmp_path_factory.mktemp("idx")
    random, md5 = np.random.default_rng(0), {}
    for part, count in (("train", 60), ("t10k", 40)):
        images = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        images[:, 0, 0] = np.arange(count)
        content = {
            f"{part}-images-idx3-ubyte": b"\0\0\x08\x03" + np.array(images.shape, ">i4").tobytes() + images.tobytes(),
            f"{part}-labels-idx1-ubyte": b"\0\0\x08\x01"
            + np.array([count], ">i4").tobytes()
            + bytes(i % 10 for i in range(count)),
        }
        for name, raw in content.items():
            (folder / f"{name}.gz").write_bytes(gzip.compress(raw))
            md5[name] = hashlib.md5(raw).hexdigest()
    return folder, md5


@pytest.fixture
def folder(files, monkeypatch):
    """Their folder; their content counts as the published one."""
    monkeypatch.setitem(idx.CONTENT_MD5, "fashion-mnist", files[1])
    return files[0]


def test_the_subset_is_the_first_of_each_class(folder):
    train, val = fashion.create_fashion(16, torch.device("cpu"), Shard(0), (20, 0), folder)
    assert (train.samples, val.samples, train.image_size) == (20, 40, 28)
    images = fashion.read_part(True, 20, folder)
    assert images.images[:, 0, 0, 0].tolist() == list(range(20)) and images.target.bincount().tolist() == [2] * 10
    target = torch.tensor([1, 1, 0, 1, 0, 0])
    mixed = ResidentSet(("a", "b"), torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1), target)
    chosen = fashion.first_of_each_class(mixed, 4)
    assert chosen.images.flatten().tolist() == [0, 1, 2, 4] and chosen.target.tolist() == [1, 1, 0, 0]
    assert fashion.first_of_each_class(mixed, 0) is mixed


@pytest.mark.parametrize("count", [70, 15, -10])
def test_a_subset_that_cannot_be_is_refused(folder, count):
    with pytest.raises(UserError, match=f"{count} images: give a multiple of 10 up to 60, or 0"):
        fashion.read_part(True, count, folder)


def test_evaluation_is_not_augmented_and_training_is(folder):
    train, val = fashion.create_fashion(64, torch.device("cpu"), Shard(0), (0, 0), folder)
    (images, target), raw = next(iter(val)), fashion.read_part(False, 0, folder)
    expected = (raw.images[..., 0].float() / 255 - 0.2860) / 0.3530
    assert torch.equal(target, raw.target) and torch.allclose(images[:, 0], expected, atol=1e-6)
    first, second = (next(iter(train))[0] for _ in range(2))
    assert first.shape == (60, 3, 28, 28) and not torch.equal(first, second)


def made_record() -> dict:
    def runs(*top1s, **more):
        return {
            str(seed): {"top1": top1, "seconds": 10.0, "cpu_seconds": 20.0, **more} for seed, top1 in enumerate(top1s)
        }

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
    assert accuracy_table.mean_and_deviation([92.0, 94.0, 99.0]) == (95.0, math.sqrt((9 + 1 + 16) / 2))
    assert accuracy_table.mean_and_deviation([91.0]) == (91.0, None)
    assert accuracy_table.gains(made_record(), "kd") == [2.0, 1.0, 6.0]


def test_the_table_by_hand():
    lines = accuracy_table.table(made_record()).splitlines()
    assert lines[2] == "| teacher | 3 | 98.00 ± 1.00 |  |  |  | 10 | 20 |"
    assert lines[3] == "| student alone | 3 | 92.00 ± 1.73 |  |  |  | 10 | 20 |"
    assert lines[4] == "| kd | 3 | 95.00 ± 3.61 | +3.00 ± 2.65 | +2.00 +1.00 +6.00 |  | 10 | 20 |"
    assert lines[5] == "| dml | 1 | 91.00 | +1.00 | +1.00 | peer1 88.50 | 10 | 20 |"
    assert lines[-1] == "dml, seed 1 failed: training diverged"
    assert "one is 0.28 %" in accuracy_table.heading(made_record())


@pytest.mark.parametrize(
    "values, marked",
    [
        ((87.0, 88.0, 88.0), True),  # 4.33 below; variances 1/3 and 3, so that two deviations are 2.58
        ((89.5, 90.5, 90.5), False),  # 1.83 below
        ((82.0, 88.0, 93.0), False),  # 4.33 below, and variances 30.3 and 3: two deviations are 8.16
        ((96.0, 97.0, 97.0), False),
        ((80.0,), False),
    ],
)
def test_the_mark_of_what_ends_below_the_student_alone(values, marked):
    record = made_record()
    record["pairs"]["at"] = {str(seed): {"top1": top1} for seed, top1 in enumerate(values)}
    assert accuracy_table.is_below_alone(record, "at") == marked
    text = accuracy_table.table(record)
    assert ("▼" in next(line for line in text.splitlines() if line.startswith("| at"))) == marked
    assert ("▼ more than two standard deviations" in text) == marked


def test_the_picture(tmp_path):
    accuracy_table.draw(made_record(), tmp_path / "deep/a.png")
    assert (tmp_path / "deep/a.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def small(folder, monkeypatch):
    """The benchmark on the small files."""
    monkeypatch.setattr(accuracy_runs, "TEACHER", "resnet8")
    return folder


def words(tmp_path, folder, *more) -> list[str]:
    base = ["--folder", f"{folder}", "--images", "0", "0", "--epochs", "1", "--seeds", "1", "--device", "cpu"]
    return [*base, "--file", f"{tmp_path}/a.json", "--work", f"{tmp_path}/work", *more]


def test_it_keeps_each_run_and_goes_on(small, tmp_path, capsys, monkeypatch):
    accuracy.main(words(tmp_path, small, "--methods", "kd"))
    first = json.loads((tmp_path / "a.json").read_text())
    assert set(first["pairs"]) == {"teacher", "kd"} and first["settings"]["images"] == [60, 40]
    run = first["pairs"]["kd"]["0"]
    assert 0 <= run["top1"] <= 100 and run["options"]["temperature"] == 4.0
    assert run["seconds"] > 0 and run["cpu_seconds"] > 0
    assert "2/2  seed 0  kd" in capsys.readouterr().out

    accuracy.main(words(tmp_path, small, "--methods", "ce,kd,dml"))
    out, second = capsys.readouterr().out, json.loads((tmp_path / "a.json").read_text())
    assert "2 runs are there already" in out and "seed 0  kd" not in out and "seed 0  teacher" not in out
    assert second["pairs"]["kd"] == first["pairs"]["kd"] and second["pairs"]["teacher"] == first["pairs"]["teacher"]
    assert "peer1_top1" in second["pairs"]["dml"]["0"]

    monkeypatch.setattr(accuracy_runs, "train_one", None)  # nothing is trained any more
    accuracy.main(words(tmp_path, small, "--table"))
    table = capsys.readouterr().out
    assert "| student alone | 1 |" in table and (tmp_path / "a.md").read_text() == table
    assert (tmp_path / "a.png").is_file()


def test_runs_repeat_to_the_bit_and_again_replaces(small, tmp_path):
    accuracy.main(words(tmp_path, small, "--methods", "kd"))
    record = json.loads((tmp_path / "a.json").read_text())
    first = record["pairs"]["kd"]["0"]
    first["seconds"] = -1
    (tmp_path / "a.json").write_text(json.dumps(record))
    accuracy.main(words(tmp_path, small, "--methods", "kd", "--again"))
    second = json.loads((tmp_path / "a.json").read_text())["pairs"]["kd"]["0"]
    assert (first["top1"], first["val_loss"]) == (second["top1"], second["val_loss"]) and second["seconds"] >= 0


def test_other_settings_are_refused_and_failures_kept(small, tmp_path, monkeypatch):
    def diverges(*_):
        raise UserError("training diverged")

    accuracy.main(words(tmp_path, small, "--methods", "ce"))
    with pytest.raises(UserError, match="epochs.*--file"):
        accuracy.main(words(tmp_path, small, "--methods", "ce", "--epochs", "2"))
    monkeypatch.setattr(accuracy_runs, "train_one", diverges)
    accuracy.main(words(tmp_path, small, "--methods", "kd"))
    assert json.loads((tmp_path / "a.json").read_text())["pairs"]["kd"]["0"]["error"] == "training diverged"


def test_the_minutes_end_before_a_run(small, tmp_path, capsys):
    accuracy.main(words(tmp_path, small, "--methods", "ce", "--minutes", "1e-9"))
    out = capsys.readouterr().out
    assert "the same command goes on" in out and "1/2" not in out


def test_the_newest_file_of_the_same_settings_goes_on(tmp_path):
    for day, epochs in (("2026-01-01", 16), ("2026-01-02", 16), ("2026-01-03", 8)):
        (tmp_path / f"{day}-accuracy-fashion.json").write_text(json.dumps({"settings": {"epochs": epochs}}))
    (tmp_path / "2026-01-04-accuracy-fashion-iakd.json").write_text(json.dumps({"settings": {"epochs": 16}}))

    def found(settings) -> str:
        return accuracy.find_file(tmp_path, "accuracy-fashion", settings).name[:10]

    assert found({"epochs": 16}) == "2026-01-02" and found(None) == "2026-01-03"
    assert found({"epochs": 4}) == str(datetime.date.today())


def test_a_study_compares_options_of_one_method(small, tmp_path, monkeypatch):
    monkeypatch.setitem(accuracy.STUDIES, "iakd", [{"schedule": "uniform", "p": (0.25, 0.5, 0.75)}])
    accuracy.main(words(tmp_path, small, "--study", "iakd"))
    pairs = json.loads((tmp_path / "a.json").read_text())["pairs"]
    assert list(pairs) == ["teacher", "ce", "kd", "schedule=uniform p=0.25,0.5,0.75"]
    options = pairs["schedule=uniform p=0.25,0.5,0.75"]["0"]["options"]
    assert (options["schedule"], options["p"]) == ("uniform", [0.25, 0.5, 0.75])


@pytest.mark.parametrize("each", accuracy.STUDIES["iakd"], ids=str)
def test_the_settings_of_the_study_fit_the_schedule(each):
    this = accuracy_runs.Study("fashion", 0, torch.device("cpu"), fashion.FOLDER)
    options = METHODS["iakd"].Options(**each)
    assert options.finish_epochs < this.train.epochs and this.train.drops


def process_of(unit: accuracy_runs.Unit) -> dict:
    """What a process of the pool does in the test below."""
    return {"process": os.getpid(), "threads": torch.get_num_threads()}


def test_processes_side_by_side_run_what_is_ready():
    units = [accuracy_runs.Unit(name, seed, "ce", {}) for name in ("teacher", "kd") for seed in (0, 1)]
    trained, found = set(), {}

    def is_ready(unit) -> bool:
        return unit.name == "teacher" or unit.seed in trained

    for unit, record in accuracy.results(units, 2, process_of, is_ready, lambda: len(found) == 3):
        assert unit.name == "teacher" or unit.seed in trained
        trained.add(unit.seed)
        found[unit[:2]] = record
    assert 3 <= len(found) <= 4  # one that was running when the time was over ends
    assert os.getpid() not in {record["process"] for record in found.values()}
    assert {record["threads"] for record in found.values()} == {max(1, len(os.sched_getaffinity(0)) // 2)}


@pytest.mark.parametrize(
    "more, word",
    [
        (["--methods", "kdd"], "did you mean 'kd'"),
        (["--table"], "run without --table first"),
        (["--jobs", "0"], "--jobs must be 1 or more, got 0"),
        (["--images", "15", "0"], "15 images: give a multiple of 10 up to 60"),
    ],
)
def test_bad_options(small, tmp_path, more, word):
    with pytest.raises(UserError, match=word):
        accuracy.main(words(tmp_path, small, *more))
