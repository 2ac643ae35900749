"""A training before the first epoch goes on where it was, as the run does: by kills, signals and damaged files."""

import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from fastkd import Trainer, TrainOptions, create_model
from fastkd.methods import METHODS
from fastkd.methods.parts import autoencoder
from fastkd.run import checkpoint
from fastkd.signals import Stopped


def net(name: str, seed: int):
    torch.manual_seed(seed)
    return create_model(name, 4)


def fit(loaders, out, name="ft", seed=0, resume=False, every="2"):
    """A run of an epoch whose auto-encoder takes two epochs of 3 steps."""
    kind = METHODS[name]
    method = kind(net("resnet8", seed), net("resnet14", 1), kind.Options(ae_epochs=2))
    options = TrainOptions(epochs=1, lr=0.02, out=str(out), resume=resume, checkpoint_every=every, device="cpu", seed=0)
    return Trainer(method, *loaders, options, {"student": "resnet8"}).fit()


def stop_at_save(monkeypatch, number, how):
    """`how(folder)` is called after the state `number` (from 1) was written."""
    save, count = checkpoint.save_run, []

    def watched(folder, state, keep):
        save(folder, state, keep)
        count.append(folder)
        if len(count) == number:
            how(folder)

    monkeypatch.setattr(checkpoint, "save_run", watched)


def kill(folder):
    raise KeyboardInterrupt


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture(scope="module")
def whole_run(tiny_loaders, tmp_path_factory):
    """The folder of a run that was never stopped."""
    return fit(tiny_loaders(), tmp_path_factory.mktemp("whole")).out


@pytest.fixture(scope="module")
def whole(whole_run):
    return load_file(whole_run / "student.safetensors")


@pytest.mark.parametrize("number", [1, 2])
def test_killed_within_an_epoch_it_resumes_exactly(
    tiny_loaders, tmp_path, monkeypatch, capsys, whole, whole_run, number
):
    stop_at_save(monkeypatch, number, kill)
    with pytest.raises(KeyboardInterrupt):
        fit(tiny_loaders(), tmp_path / "cut")
    assert (tmp_path / "cut/paraphraser/last.pt").exists() and not (tmp_path / "cut/paraphraser.safetensors").exists()
    monkeypatch.undo()
    resumed = fit(tiny_loaders(), tmp_path / "cut", resume=True)
    steps = {1: "step 2 of epoch 1", 2: "step 1 of epoch 2"}  # 2 and 4 of steps of 3 to the epoch
    assert f"paraphraser after {steps[number]}" in capsys.readouterr().out
    assert equal(load_file(resumed.student), whole)
    wanted, got = (load_file(out / "paraphraser.safetensors") for out in (whole_run, tmp_path / "cut"))
    assert equal(wanted, got) and not (tmp_path / "cut/paraphraser").exists()


def test_a_kill_after_the_encoder_was_saved_leaves_no_states(tiny_loaders, tmp_path, monkeypatch, whole):
    monkeypatch.setattr("fastkd.run.phase.shutil.rmtree", kill)
    with pytest.raises(KeyboardInterrupt):
        fit(tiny_loaders(), tmp_path / "cut")
    monkeypatch.undo()
    monkeypatch.setattr(autoencoder, "train_auto_encoder", None)  # it would fail if it were called
    assert equal(load_file(fit(tiny_loaders(), tmp_path / "cut", resume=True).student), whole)
    assert not (tmp_path / "cut/paraphraser").exists()


def test_a_signal_saves_it(tiny_loaders, tmp_path, monkeypatch, whole):
    stop_at_save(monkeypatch, 1, lambda folder: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped, match="stopped by SIGTERM in the training of the paraphraser, after step . of epoch"):
        fit(tiny_loaders(), tmp_path / "cut")
    monkeypatch.undo()
    assert equal(load_file(fit(tiny_loaders(), tmp_path / "cut", resume=True).student), whole)


@pytest.mark.parametrize("damaged", [["last.pt"], ["last.pt", "last-1.pt"]], ids=["newest", "both"])
def test_a_damaged_state_is_said(tiny_loaders, tmp_path, monkeypatch, capsys, whole, damaged):
    stop_at_save(monkeypatch, 2, kill)
    with pytest.raises(KeyboardInterrupt):
        fit(tiny_loaders(), tmp_path / "cut")
    monkeypatch.undo()
    for name in damaged:
        file = tmp_path / "cut/paraphraser" / name
        file.write_bytes(file.read_bytes()[:-100])
    resumed = fit(tiny_loaders(), tmp_path / "cut", resume=True)
    said = capsys.readouterr().out
    assert "WARNING" in said and "last.pt is not a readable checkpoint" in said
    assert ("the paraphraser is trained anew" in said) == (len(damaged) == 2)
    assert equal(load_file(resumed.student), whole)


def test_a_loader_that_draws_from_the_generators_resumes_exactly(tiny_loaders, tmp_path, monkeypatch):
    """As a loader of the caller may: its order comes from torch's generator at the start of an epoch."""

    def loaders():
        train, val = tiny_loaders()

        def batches(self):
            for part in torch.randperm(len(self.images)).split(self.batch_size):
                yield self.images[part], self.target[part]
            self.epoch += 1

        drawing = type("Drawing", (type(train),), {"__iter__": batches})()
        return drawing, val

    whole = load_file(fit(loaders(), tmp_path / "whole").student)
    for number in (1, 2):
        stop_at_save(monkeypatch, number, kill)
        with pytest.raises(KeyboardInterrupt):
            fit(loaders(), tmp_path / f"cut{number}")
        monkeypatch.undo()
        assert equal(load_file(fit(loaders(), tmp_path / f"cut{number}", resume=True).student), whole)
