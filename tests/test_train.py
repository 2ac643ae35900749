"""The trainer: it learns, it leaves a run folder that explains itself, and a killed run continues exactly."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from stopped_run import kill_after

from fastkd import Trainer, TrainOptions, create_model
from fastkd.errors import UserError
from fastkd.files import write_atomic
from fastkd.methods import CE, IAKD, KD
from fastkd.models import load_weights
from fastkd.run import checkpoint
from fastkd.run.folder import new_folder


def fit(tiny_net, tiny_loaders, out, epochs=3, net_seed=0, **options):
    method = KD(tiny_net(net_seed), tiny_net(9))
    settings = TrainOptions(epochs=epochs, lr=0.05, out=str(out), **options)
    return Trainer(method, *tiny_loaders(), settings, {"student": "tiny"}).fit(), method


EVERYTHING = {"ema_decay": 0.9, "mixup": 0.4, "cutmix": 1.0, "smoothing": 0.1, "amp_dtype": "float16", "clip_grad": 1.0}


def test_the_loss_falls_and_the_accuracy_rises(tiny_net, tiny_loaders, tmp_path):
    method = CE(tiny_net())
    result = Trainer(method, *tiny_loaders(samples=64), TrainOptions(epochs=12, lr=0.1, out=str(tmp_path / "r"))).fit()
    assert result.history[-1]["ce"] < 0.6 * result.history[0]["ce"]
    assert result.top1 > 60 > 25


def test_run_folder_explains_itself(tiny_net, tiny_loaders, tmp_path):
    result, method = fit(tiny_net, tiny_loaders, tmp_path / "run")
    out = result.out
    names = {path.name for path in out.iterdir()}
    files = {"config.yaml", "environment.json", "README.txt", "history.csv", "history.jsonl", "curves.png"}
    assert names == files | {".lock", "report.html", "last.pt", "last-1.pt", "best.pt", "student.safetensors"}
    assert yaml.safe_load((out / "config.yaml").read_text())["lr"] == 0.05
    assert json.loads((out / "environment.json").read_text())["packages"]["torch"]
    rows = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    assert rows == result.history and [row["epoch"] for row in rows] == [1, 2, 3]
    table = list(csv.DictReader((out / "history.csv").open()))
    assert [float(row["kd"]) for row in table] == [row["kd"] for row in rows]
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    saved = load_file(out / "student.safetensors")
    assert {name: value.tolist() for name, value in saved.items()} == {
        name: value.tolist() for name, value in method.student.state_dict().items()
    }


def test_checkpoints_hold_no_teacher(tiny_net, tiny_loaders, tmp_path):
    result, _ = fit(tiny_net, tiny_loaders, tmp_path / "run", ema_decay=0.9)
    state = checkpoint.load(result.out / "last.pt")
    assert all(name.startswith("student.") for name in state["method"])


RESET = {"reset_momentum": True, "sched": "multistep", "decay_milestones": (1.0, 2.0), "opt": "nesterov"}


@pytest.mark.parametrize("saves", [1, 2, 3, 5])
@pytest.mark.parametrize("options", [{}, EVERYTHING, RESET], ids=["plain", "everything", "reset"])
def test_resumed_equals_uninterrupted(tiny_net, tiny_loaders, tmp_path, options, saves, monkeypatch):
    """After a state within an epoch, before an evaluation and after one."""
    whole, _ = fit(tiny_net, tiny_loaders, tmp_path / "whole", **options)
    kill_after(monkeypatch, saves)
    options = options | {"checkpoint_every": "2"}
    with pytest.raises(KeyboardInterrupt):
        fit(tiny_net, tiny_loaders, tmp_path / "cut", **options)
    monkeypatch.undo()
    resumed, _ = fit(tiny_net, tiny_loaders, tmp_path / "cut", net_seed=5, resume=True, **options)
    wanted, got = load_file(whole.student), load_file(resumed.student)
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)
    timing = ("img_per_s", "train_s", "data_wait_ms", "data_wait_percent")
    strip = lambda rows: [{k: v for k, v in row.items() if k not in timing} for row in rows]  # noqa: E731
    assert strip(resumed.history) == strip(whole.history)


def test_killed_at_any_moment_it_resumes_exactly(tmp_path):
    """A real process, killed by the system before its first checkpoint and after each of the next two."""
    command = [sys.executable, "-m", "fastkd", "train", "--method", "ce", "--student", "resnet8", "--epochs", "4"]
    command += ["--no-baseline", "--batch-size", "256", "--ema-decay", "0.9", "--recipe", "digits"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = lambda out: [*command, "--out", str(tmp_path / out)]  # noqa: E731
    history = tmp_path / "cut/history.jsonl"
    epochs = lambda: len(history.read_text().splitlines()) if history.exists() else 0  # noqa: E731
    subprocess.run(run("whole"), check=True, env=environment, capture_output=True)
    for wanted, resume in ((0, []), (1, ["--resume"]), (2, ["--resume"])):
        process = subprocess.Popen(
            [*run("cut"), *resume], env=environment, stdout=subprocess.DEVNULL, start_new_session=True
        )
        while not ((tmp_path / "cut/config.yaml").exists() and epochs() >= wanted):
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(0.3)  # into the next epoch
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "cut/student.safetensors").exists() and epochs() < 4
    done = subprocess.run([*run("cut"), "--resume"], check=True, env=environment, capture_output=True, text=True)
    assert "resuming" in done.stdout
    wanted, got = (load_file(tmp_path / out / "student.safetensors") for out in ("whole", "cut"))
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)


def test_a_kill_while_the_first_file_is_written_does_not_block_the_folder(tiny_net, tiny_loaders, tmp_path):
    (tmp_path / ".config.yaml.tmp").write_text("epo")
    result, _ = fit(tiny_net, tiny_loaders, tmp_path, epochs=1)
    assert result.student.exists()


def test_equal_runs_leave_equal_bytes(tiny_net, tiny_loaders, tmp_path):
    one, two = (fit(tiny_net, tiny_loaders, tmp_path / name, epochs=1)[0] for name in ("one", "two"))
    assert one.student.read_bytes() == two.student.read_bytes()


class Batches:
    """A training loader of random images that says it has `length` batches and gives `given[epoch]`."""

    classes, samples = ("a", "b", "c", "d"), 16

    def __init__(self, length: int, *given: int):
        self.length, self.given, self.epoch = length, given, 0

    def __len__(self):
        return self.length

    def __iter__(self):
        count = self.given[self.epoch]
        self.epoch += 1
        for _ in range(count):
            yield torch.randn(8, 3, 8, 8), torch.arange(8) % 4

    def state_dict(self):
        return {"epoch": self.epoch}

    def load_state_dict(self, state):
        self.epoch = state["epoch"]


@pytest.mark.parametrize("length", [0, 2])
def test_an_empty_training_loader_is_an_error_before_anything_is_written(tiny_net, tiny_loaders, tmp_path, length):
    options = TrainOptions(epochs=1, out=str(tmp_path / "run"))
    with pytest.raises(UserError, match=f"train_loader is empty: it gives no batch .its length is {length}"):
        Trainer(CE(tiny_net()), Batches(length, 0), tiny_loaders()[1], options)
    with pytest.raises(UserError, match="val_loader is empty"):
        Trainer(CE(tiny_net()), Batches(2, 2), [], options)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="the evaluation loader gave no images"):
        Trainer(CE(tiny_net()), Batches(2, 2), Batches(1, 0), options).fit()


@pytest.mark.parametrize("given, words", [(0, "no batches"), (1, "1 batch"), (2, "2 batches"), (4, "4 batches")])
def test_a_loader_with_other_batches_than_its_length(tiny_net, tiny_loaders, tmp_path, given, words):
    """The schedule follows the length. The epochs before the wrong one are kept."""
    options = TrainOptions(epochs=2, lr=0.01, out=str(tmp_path / "run"), device="cpu")
    with pytest.raises(UserError, match=f"train_loader gave {words} in epoch 2, but its length is 3; .*len"):
        Trainer(CE(tiny_net()), Batches(3, 3, given), tiny_loaders()[1], options).fit()
    assert len((tmp_path / "run/history.jsonl").read_text().splitlines()) == 1


def test_best_checkpoint_is_a_weights_file_too(tiny_net, tiny_loaders, tmp_path):
    result, method = fit(tiny_net, tiny_loaders, tmp_path / "run", epochs=1, ema_decay=0.9)
    other = tiny_net(5)
    load_weights(other, result.out / "best.pt")
    saved = load_file(result.student)
    assert all(torch.equal(saved[name], value) for name, value in other.state_dict().items())


def test_new_folders_are_never_shared(tmp_path):
    names = [new_folder(str(tmp_path / "runs/a")).name for _ in range(3)]
    assert names == ["a", "a-2", "a-3"]


def test_a_stretched_schedule_keeps_its_shape():
    options = TrainOptions(epochs=200, sched="multistep", decay_milestones=(100, 150), warmup_epochs=10)
    short = options.stretched(20)
    assert (short.epochs, short.warmup_epochs, short.decay_milestones) == (20, 1, (10, 15))


def test_another_run_is_not_overwritten(tiny_net, tiny_loaders, tmp_path):
    fit(tiny_net, tiny_loaders, tmp_path / "run", epochs=1)
    before = (tmp_path / "run/student.safetensors").read_bytes()
    with pytest.raises(UserError, match="not empty.*--resume"):
        fit(tiny_net, tiny_loaders, tmp_path / "run", epochs=1)
    with pytest.raises(UserError, match="other options: epochs was 1, now 2; give the old ones to go on, add --extend"):
        fit(tiny_net, tiny_loaders, tmp_path / "run", epochs=2, resume=True)
    assert (tmp_path / "run/student.safetensors").read_bytes() == before


def test_a_folder_of_something_else_is_not_taken(tiny_net, tiny_loaders, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="no run"):
        fit(tiny_net, tiny_loaders, tmp_path, resume=True)


def test_resume_needs_the_same_data(tiny_net, tiny_loaders, tmp_path):
    fit(tiny_net, tiny_loaders, tmp_path / "run", epochs=1)
    with pytest.raises(UserError, match="other data.*22.*30"):
        fit(tiny_net, lambda: tiny_loaders(samples=30), tmp_path / "run", epochs=1, resume=True)


def test_divergence_stops_the_run_with_advice(tiny_net, tiny_loaders, tmp_path):
    loaders, method = tiny_loaders(), CE(tiny_net())
    with pytest.raises(UserError, match=r"diverged.*2 of 3 steps.*--lr 1e\+30"):
        Trainer(method, *loaders, TrainOptions(epochs=2, lr=1e30, out=str(tmp_path / "r"))).fit()
    assert all(p.isfinite().all() for p in method.parameters())


@pytest.mark.parametrize("epochs", [0, 1])
def test_the_last_good_state_is_named_where_there_is_one(tiny_net, tiny_loaders, tmp_path, epochs):
    train, val = tiny_loaders()
    images = train.images.clone()

    def batches(self):
        good_epoch = self.epoch < epochs
        self.epoch += 1
        for part in torch.arange(22).split(8):
            is_good = good_epoch or part[0] == 0  # the first batch is looked at before the run
            yield images[part] if is_good else images[part] * float("inf"), self.target[part]

    loader = type("Diverging", (type(train),), {"__iter__": batches})()
    options = TrainOptions(epochs=2, lr=0.05, out=str(tmp_path / "r"), device="cpu")
    with pytest.raises(UserError, match="training diverged") as caught:
        Trainer(CE(tiny_net()), loader, val, options).fit()
    assert ("the last good state is" in str(caught.value)) == (tmp_path / "r/last.pt").exists() == bool(epochs)


def test_weights_are_kept_where_the_picture_cannot_be_drawn(tiny_net, tiny_loaders, tmp_path, capsys, monkeypatch):
    def broken(history):
        raise ImportError("no fonts")

    monkeypatch.setattr("fastkd.report.plot", broken)
    result, _ = fit(tiny_net, tiny_loaders, tmp_path / "run", epochs=1)
    assert result.student.exists() and "curves.png is not drawn: ImportError: no fonts" in capsys.readouterr().out


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    write_atomic(tmp_path / "last.pt", b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*last.pt \(3 bytes\): No space left on device.*--resume"):
        write_atomic(tmp_path / "last.pt", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]
    assert (tmp_path / "last.pt").read_bytes() == b"old"


def test_a_damaged_checkpoint_is_named(tmp_path):
    checkpoint.save_run(tmp_path, {"history": [{"top1": 1.0}], "step": 0})
    whole = (tmp_path / "last.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="last.pt is not a readable checkpoint"):
        checkpoint.load(tmp_path / "last.pt")


@pytest.mark.parametrize(
    "options, words",
    [
        ({"epochs": 0}, "--epochs.*got 0"),
        ({"lr": 0}, "--lr.*got 0"),
        ({"lr": -1}, "--lr.*got -1"),
        ({"lr": float("inf")}, "--lr.*got inf"),
        ({"warmup_epochs": 5, "epochs": 5}, "--warmup-epochs.*5.*got 5"),
        ({"sched": "multistep"}, "--decay-milestones"),
        ({"sched": "multistep", "decay_milestones": (30, 120)}, "below --epochs 100, got 30 120"),
        ({"sched": "multistep", "decay_milestones": (60, 30)}, "must rise.*got 60 30"),
        ({"sched": "multistep", "decay_milestones": (-3, 30)}, "above 0.*got -3 30"),
        ({"seed": -1}, "--seed must be >= 0.*got -1"),
        ({"opt": "nesterov", "momentum": 0.0}, "momentum"),
        ({"smoothing": 1.0}, "--smoothing.*got 1.0"),
        ({"mixup": -0.1}, "--mixup.*got -0.1"),
        ({"grad_accum": 0}, "--grad-accum.*got 0"),
        ({"ema_decay": 1.5}, "--ema-decay.*got 1.5"),
    ],
)
def test_bad_options_are_named_with_their_values(options, words):
    with pytest.raises(UserError, match=words):
        TrainOptions(**options)


def test_options_in_python_are_checked_as_on_the_command_line(tiny_net, tiny_loaders, tmp_path, monkeypatch):
    wrong = {"teacher_form": "fusd", "graph": "yes", "opt": "SGD", "lr": "a", "epochs": 1.5, "grad_accum": True}
    for name, value in wrong.items():
        with pytest.raises(UserError, match=f"--{name.replace('_', '-')} .*{value}"):
            TrainOptions(**{name: value})
    monkeypatch.chdir(tmp_path)
    result = Trainer(KD(tiny_net(0), tiny_net(1)), *tiny_loaders(), TrainOptions(epochs=1, device="cpu")).fit()
    assert result.student.exists() and result.out == Path("runs/run")


def test_a_form_that_would_not_be_used_is_an_error(tiny_net, tiny_loaders):
    for method, reason in ((CE(tiny_net()), "no teacher"), (iakd(), "never runs the teacher as a whole")):
        with pytest.raises(UserError, match=f"--teacher-form fused: the method .*{reason}"):
            Trainer(method, *tiny_loaders(), TrainOptions(teacher_form="fused", device="cpu"))


def iakd() -> IAKD:
    return IAKD(create_model("resnet8", 4), create_model("resnet14", 4))
