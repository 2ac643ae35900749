"""--resume --extend: a run goes on with more epochs or another learning rate, when asked, and says so."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fastkd import Trainer, TrainOptions, create_model
from fastkd.engine import Step
from fastkd.errors import UserError
from fastkd.methods import CE, DKD, KD, find_method
from fastkd.run.extend import extension
from fastkd.weights_file import read_about, save_network


def fit(tiny_net, tiny_loaders, out, epochs=2, net_seed=0, **options):
    settings = TrainOptions(**{"epochs": epochs, "lr": 0.05, "out": str(out), "device": "cpu"} | options)
    trainer = Trainer(CE(tiny_net(net_seed)), *tiny_loaders(), settings)
    return trainer, trainer.fit()


def test_more_epochs_go_on_from_the_end_of_the_run(tiny_net, tiny_loaders, tmp_path, capsys):
    """With a constant rate the result is that of a run that was as long from the start."""
    fit(tiny_net, tiny_loaders, tmp_path / "run", sched="constant")
    _, longer = fit(tiny_net, tiny_loaders, tmp_path / "run", 4, 5, sched="constant", resume=True, extend=True)
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if "--extend" in line] == ["--extend: epochs 2 -> 4 from here on"]
    _, whole = fit(tiny_net, tiny_loaders, tmp_path / "whole", 4, sched="constant")
    wanted, got = load_file(whole.student), load_file(longer.student)
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)
    assert [row["epoch"] for row in longer.history] == [1, 2, 3, 4]
    saved = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert saved["epochs"] == 4 and "extend" not in saved
    _, again = fit(tiny_net, tiny_loaders, tmp_path / "run", 4, sched="constant", resume=True)  # no change now
    assert again.history == longer.history


def test_the_cosine_is_that_of_the_new_length(tiny_net, tiny_loaders, tmp_path, capsys):
    fit(tiny_net, tiny_loaders, tmp_path / "run")
    _, longer = fit(tiny_net, tiny_loaders, tmp_path / "run", 4, resume=True, extend=True)
    _, whole = fit(tiny_net, tiny_loaders, tmp_path / "whole", 4)
    rates = [row["lr"] for row in longer.history]
    assert rates[2:] == [row["lr"] for row in whole.history][2:] and rates[1] < rates[2]
    out = capsys.readouterr().out
    assert "--extend: the cosine ends with epoch 4, not 2\n" in out
    assert "--extend: the next step has the learning rate 0.025, not 0\n" in out  # the middle of the cosine


def test_rates_and_weight_decay_change_from_there_on(tiny_net, tiny_loaders, tmp_path, capsys):
    fit(tiny_net, tiny_loaders, tmp_path / "run", sched="constant")
    new = {"lr": 0.01, "weight_decay": 0.5, "clip_grad": 1.0, "smoothing": 0.1, "sched": "cosine"}
    trainer, result = fit(tiny_net, tiny_loaders, tmp_path / "run", 3, resume=True, extend=True, **new)
    assert {group["weight_decay"] for group in trainer.step.optimizer.param_groups} == {0.5}
    assert result.history[1]["lr"] == 0.05 and result.history[2]["lr"] < 0.01
    out = capsys.readouterr().out
    for line in ("lr 0.05 -> 0.01", "weight_decay 0.0001 -> 0.5", "smoothing 0.0 -> 0.1", "sched constant -> cosine"):
        assert out.count(f"--extend: {line} from here on\n") == 1


def test_without_it_the_refusal_names_it_where_it_would_help(tiny_net, tiny_loaders, tmp_path):
    fit(tiny_net, tiny_loaders, tmp_path / "run")
    with pytest.raises(UserError, match="lr was 0.05, now 0.1; give the old ones to go on, add --extend to go on with"):
        fit(tiny_net, tiny_loaders, tmp_path / "run", lr=0.1, resume=True)
    for extend in (False, True):
        with pytest.raises(UserError, match="seed was 0, now 1; give the old ones to go on, or begin a new run"):
            fit(tiny_net, tiny_loaders, tmp_path / "run", seed=1, resume=True, extend=extend)


def test_what_cannot_be_extended_changes_no_file(tiny_net, tiny_loaders, tmp_path):
    with pytest.raises(UserError, match="--extend goes on with a run under other options: .* --resume"):
        fit(tiny_net, tiny_loaders, tmp_path / "run", extend=True)
    fit(tiny_net, tiny_loaders, tmp_path / "run")
    before = (tmp_path / "run/config.yaml").read_text()
    with pytest.raises(UserError, match="--extend --epochs 1: .* is after epoch 2; give --epochs 2 or more"):
        fit(tiny_net, tiny_loaders, tmp_path / "run", 1, resume=True, extend=True)
    assert (tmp_path / "run/config.yaml").read_text() == before


def test_the_weights_say_their_accuracy_and_their_epoch(tiny_net, tiny_loaders, tmp_path):
    """Also after an extension that is stopped."""
    _, result = fit(tiny_net, tiny_loaders, tmp_path)
    noted = {"top1": result.top1, "epoch": 2, "epochs": 2}
    assert noted.items() <= read_about(result.student).items()
    options = TrainOptions(epochs=4, lr=0.05, out=str(tmp_path), device="cpu", resume=True, extend=True)
    with pytest.raises(RuntimeError):
        Trainer(CE(tiny_net()), *tiny_loaders(), options, callbacks=[Stop(10)]).fit()
    assert noted.items() <= read_about(result.student).items()
    rows = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    best = max(rows, key=lambda row: (row["top1"], row["epoch"]))
    noted = {"top1": best["top1"], "epoch": best["epoch"], "epochs": 4 if best["epoch"] > 2 else 2}
    assert noted.items() <= read_about(tmp_path / "best.pt").items()


class Stop:
    """Ends a run by an error after so many steps."""

    def __init__(self, step):
        self.last = step

    def on_step(self, step):
        if step.step == self.last:
            raise RuntimeError("stop")


def test_epochs_that_end_before_the_newest_step_are_refused(tiny_net, tiny_loaders, tmp_path):
    """An epoch has three steps: the newest state is within epoch 2."""
    settings = {"lr": 0.05, "out": str(tmp_path), "device": "cpu", "checkpoint_every": "1"}
    with pytest.raises(RuntimeError):
        Trainer(CE(tiny_net()), *tiny_loaders(), TrainOptions(epochs=3, **settings), callbacks=[Stop(5)]).fit()
    before = contents(tmp_path)
    with pytest.raises(UserError, match="--extend --epochs 1: .* is after step 1 of epoch 2; give --epochs 2 or more"):
        Trainer(CE(tiny_net()), *tiny_loaders(), TrainOptions(epochs=1, resume=True, extend=True, **settings))
    assert contents(tmp_path) == before
    options = TrainOptions(epochs=2, resume=True, extend=True, **settings)
    assert len(Trainer(CE(tiny_net()), *tiny_loaders(), options).fit().history) == 2


def contents(folder):
    """Of each file but the lock, which names the last process."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def test_a_refused_resume_changes_no_file(tiny_net, tiny_loaders, tmp_path):
    """With a damaged last.pt, which a resume that is accepted would rename."""
    settings = {"out": str(tmp_path), "device": "cpu"}
    Trainer(KD(tiny_net(), tiny_net(1)), *tiny_loaders(), TrainOptions(epochs=3, **settings)).fit()
    newest = tmp_path / "last.pt"
    newest.write_bytes(newest.read_bytes()[:-9])
    before = contents(tmp_path)
    new = TrainOptions(epochs=4, lr=0.01, log_interval=1.0, resume=True, extend=True, **settings)
    with pytest.raises(UserError, match="teacher's weights are not those of the run"):
        Trainer(KD(tiny_net(), tiny_net(2)), *tiny_loaders(), new).fit()
    assert contents(tmp_path) == before
    Trainer(KD(tiny_net(), tiny_net(1)), *tiny_loaders(), new).fit()
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["lr"] == 0.01
    assert (tmp_path / "last.pt.damaged").exists()


def test_what_follows_from_the_number_of_epochs_is_said(tiny_net, tiny_loaders):
    """6 steps of an average with the decay 0.9 warm up, 60 do not. DKD's ramp takes half of a short run."""
    train, _ = tiny_loaders()
    options = TrainOptions(epochs=20, ema_decay=0.9, sched="constant", device="cpu")
    step = Step(DKD(tiny_net(), tiny_net(1)), options, torch.device("cpu"), flat=False)
    assert list(extension({"epochs": 2}, options, step, train, 6)) == [
        "--extend: epochs 2 -> 20 from here on",
        "--extend: the next step has the decay 0.9 of the moving average, not 0.7267",
        "--extend: the DKD term has its full weight from epoch 10 on, not 1",
    ]
    assert list(extension({"epochs": 20, "seed": 3}, options, step, train, 6)) == []


def test_a_method_says_what_is_spread_over_the_epochs(tiny_net):
    teacher, student = create_model("resnet14", 4), create_model("resnet8", 4)
    kind = find_method("iakd+kd")
    assert kind(student, teacher).spread_over(2, 4) == ["--schedule linear ends after epoch 4, not 2"]
    uniform = find_method("iakd")
    assert uniform(student, teacher, uniform.Options(schedule="uniform")).spread_over(2, 4) == []


def test_the_student_alone_is_not_extended_if_the_student_is_refused(fastkd, few_digits, tmp_path):
    """The teacher's file has other weights now."""
    torch.manual_seed(0)
    for name in ("one", "other"):
        save_network(tmp_path / f"{name}.safetensors", create_model("resnet14", 10), {})
    (tmp_path / "one.safetensors").rename(tmp_path / "teacher.safetensors")
    train = ["train", "--student", "resnet8", "--teacher", "resnet14", "--teacher-weights", "teacher.safetensors"]
    status, _, err = fastkd(*train, "--epochs", "1", "--no-report", "--out", "run")
    assert status == 0, err
    (tmp_path / "other.safetensors").rename(tmp_path / "teacher.safetensors")
    before = contents(tmp_path / "run")
    status, _, err = fastkd("train", "--out", "run", "--resume", "--extend", "--epochs", "2")
    assert status == 2 and "teacher's weights are not those of the run" in err
    assert contents(tmp_path / "run") == before


def test_the_command_keeps_what_is_not_named_and_the_teacher(fastkd, few_digits, tmp_path):
    train = ["train", "--student", "resnet8", "--teacher", "resnet14", "--teacher-epochs", "1", "--no-baseline"]
    status, _, err = fastkd(*train, "--epochs", "2", "--warmup-epochs", "1", "--out", "run")
    assert status == 0, err
    teacher = (tmp_path / "run/teacher/student.safetensors").stat().st_mtime_ns
    status, out, err = fastkd("train", "--out", "run", "--resume", "--epochs", "3")
    assert status == 2 and "epochs was 2, now 3" in err and "add --extend" in err
    status, out, err = fastkd("train", "--out", "run", "--resume", "--extend", "--epochs", "3")
    assert status == 0, err
    assert "--extend: epochs 2 -> 3" in out and "epoch   3/3" in out and "trained before" in out
    assert (tmp_path / "run/teacher/student.safetensors").stat().st_mtime_ns == teacher
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["warmup_epochs"] == 1
    status, out, err = fastkd("train", "--out", "run", "--resume")  # the command that a stopped run names
    assert status == 0 and "trained before" in out, err
    assert (tmp_path / "run/teacher/student.safetensors").stat().st_mtime_ns == teacher
