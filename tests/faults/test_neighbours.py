"""Finished teachers in other run folders: damaged folders are passed over with a line, and none is waited for."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from refused import check_refused
from safetensors.torch import load_file, save_file

ARGUMENTS = (
    *("train", "--data", "digits", "--method", "kd", "--student", "resnet8", "--teacher", "resnet8", "-b", "64"),
    *("--epochs", "1", "--teacher-epochs", "1", "--device", "cpu", "--recipe", ""),
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run with a teacher. Do not change it."""
    import sys

    from fastkd.cli import main
    from fastkd.data import digits

    folder, argv, here = tmp_path_factory.mktemp("neighbour"), sys.argv, os.getcwd()
    everything = digits.read_digits()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "read_digits", lambda: tuple(part[:300] for part in everything))
        patch.setattr("fastkd.commands.train.speed", lambda *_: 1.0)
        patch.setattr("sys.argv", ["fastkd", *ARGUMENTS, "--out", "runs/first"])
        patch.chdir(folder)
        main()
    assert sys.argv == argv and os.getcwd() == here
    return folder / "runs" / "first"


@pytest.fixture
def first(trained, tmp_path) -> Path:
    """A copy of the run, in the folder where the command runs."""
    return Path(shutil.copytree(trained, tmp_path / "runs" / "first"))


def weights_with(path: Path, about: object = None, **tensors: torch.Tensor) -> None:
    """Write the weights again with other tensors or another note."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        note = file.metadata()["fastkd"] if about is None else json.dumps(about)
    save_file(load_file(path) | tensors, path, metadata={"fastkd": note})


def make_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def linked(path: Path, place: str) -> None:
    path.unlink()
    path.symlink_to(place)


CONFIG = {
    "not YAML": lambda path: path.write_text("a: [b"),
    "a list": lambda path: path.write_text("- a\n- b\n"),
    "bytes": lambda path: path.write_bytes(bytes(range(256))),
    "tag": lambda path: path.write_text("!!python/object/apply:os.system ['touch touched']"),
    "laughs": lambda path: path.write_text("a: &a [x, x]\nb: &b [*a, *a]\n"),
    "pipe": make_pipe,
    "device": lambda path: linked(path, "/dev/zero"),
    "folder": make_folder,
    "loop": lambda path: linked(path, "config.yaml"),
    "hole": lambda path: os.truncate(path, 1 << 40),
}
NAN = {"fc.bias": torch.full((10,), torch.nan)}
WEIGHTS = {
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "zeros": lambda path: path.write_bytes(bytes(1000)),
    "note is a list": lambda path: weights_with(path, []),
    "note of data is a list": lambda path: weights_with(path, {"data": [1]}),
    "note of a text as accuracy": lambda path: weights_with(path, {"top1": "x" * 1000}),
    "note of a large accuracy": lambda path: weights_with(path, {"top1": 1e9}),
    "NaN": lambda path: weights_with(path, **NAN),
    "infinite": lambda path: weights_with(path, **{"bn1.running_var": torch.full((16,), torch.inf)}),
    "other shape": lambda path: weights_with(path, **{"fc.bias": torch.zeros(7)}),
    "more": lambda path: weights_with(path, more=torch.zeros(7)),
    "pipe": make_pipe,
    "device": lambda path: linked(path, "/dev/zero"),
    "folder": make_folder,
    "loop": lambda path: linked(path, "student.safetensors"),
}


def found_in(first: Path, lines: list[str]):
    """What the search of a run with the same options finds."""
    from fastkd import create_model
    from fastkd.commands.job import weights_problem
    from fastkd.run.folder import find_finished
    from fastkd.weights_file import read_about

    good = first.parents[1] / "good"
    config, data = yaml.safe_load((good / "config.yaml").read_text()), read_about(good / "student.safetensors")["data"]
    net = create_model("resnet8", 10)
    return find_finished(
        [first / "teacher"], config, data, problem_of=lambda path: weights_problem(net, path), log=lines.append
    )


@pytest.mark.parametrize(
    "file, change",
    [("config.yaml", change) for change in CONFIG.values()] + [("student.safetensors", c) for c in WEIGHTS.values()],
    ids=[f"configuration: {name}" for name in CONFIG] + [f"weights: {name}" for name in WEIGHTS],
)
def test_damaged_neighbours_are_passed_over_with_a_line(first, file, change):
    shutil.copytree(first / "teacher", first.parents[1] / "good")
    lines: list[str] = []
    assert found_in(first, lines) == first / "teacher" / "student.safetensors" and lines == []
    change(first / "teacher" / file)
    assert found_in(first, lines) is None
    (line,) = lines
    assert line.startswith(f"{first / 'teacher'} is passed over: ") and "\n" not in line and len(line) < 700, line
    assert not Path("touched").exists()


@pytest.mark.parametrize("change", ["options", "data", "unfinished", "no run", "extended"])
def test_other_runs_are_passed_over_in_silence(first, change):
    shutil.copytree(first / "teacher", first.parents[1] / "good")
    config, weights = first / "teacher" / "config.yaml", first / "teacher" / "student.safetensors"
    if change == "options":
        config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | {"lr": 0.77}))
    if change == "data":
        weights_with(weights, {"data": {"images": 3, "classes": ["a"]}})
    if change == "extended":
        from fastkd.weights_file import read_about

        weights_with(weights, read_about(weights) | {"epoch": 7})
    if change == "unfinished":
        weights.unlink()
    if change == "no run":
        config.unlink()
    lines: list[str] = []
    assert found_in(first, lines) is None and lines == []


def test_reuse_is_shown_with_its_path(first, fastkd, few_digits):
    broken = Path(shutil.copytree(first, first.parent / "a"))
    weights_with(broken / "teacher" / "student.safetensors", **NAN)
    status, out, err = fastkd(*ARGUMENTS, "--out", "runs/second")
    assert status == 0, err
    assert "taken from runs/first/teacher" in out
    assert "runs/a/teacher is passed over: " in out and "not finite, in fc.bias" in out
    assert not Path("runs/second/teacher").exists()


def test_a_run_trains_its_teacher_if_all_neighbours_are_damaged(first, fastkd, few_digits):
    make_pipe(first / "teacher" / "config.yaml")
    status, out, err = fastkd(*ARGUMENTS, "--out", "runs/second")
    assert status == 0, err
    assert "is passed over" in out and Path("runs/second/teacher/student.safetensors").is_file()


@pytest.mark.parametrize("inner", [pytest.param("", marks=pytest.mark.every), "teacher"])
def test_teacher_run_names_one(first, fastkd, few_digits, inner):
    elsewhere = first.rename(Path("elsewhere"))
    shutil.copytree(elsewhere, "runs/nearer")
    status, out, err = fastkd(*ARGUMENTS, "--out", "runs/second", "--teacher-run", elsewhere / inner)
    assert status == 0 and "taken from elsewhere/teacher" in out, err
    assert yaml.safe_load(Path("runs/second/config.yaml").read_text())["teacher_run"] == str(elsewhere / inner)
    if inner:
        again = fastkd("train", "--out", "runs/second", "--resume")
        assert again[0] == 0, again[2]


def test_teacher_run_of_other_settings_is_refused_before_anything_is_written(first, fastkd, few_digits):
    given = [*ARGUMENTS, "--out", "runs/second", "--teacher-run"]
    check_refused(fastkd(*given, "runs/first", "--lr", "0.77"), "--teacher-run runs/first", "lr was", "now 0.77")
    check_refused(fastkd(*given, "nowhere"), "--teacher-run nowhere: no such folder")
    check_refused(fastkd(*given, "runs/first/config.yaml"), "--teacher-run", "it is a file, not a folder")
    check_refused(fastkd(*given, "x" * 5000), "--teacher-run")
    weights_with(first / "teacher" / "student.safetensors", **NAN)
    check_refused(fastkd(*given, "runs/first"), "not finite, in fc.bias")
    assert os.listdir("runs") == ["first"]


def test_teacher_run_needs_teacher_epochs(fastkd):
    check_refused(fastkd("train", "--teacher-run", "x", "--teacher-weights", "y.pth"), "--teacher-epochs N trained")
