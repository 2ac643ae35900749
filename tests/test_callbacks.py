"""Callbacks: what they are told, when, what their exceptions do, and that they change nothing."""

import dataclasses
import signal

import pytest
import torch
from safetensors.torch import load_file

from fastkd import Trainer, TrainOptions
from fastkd.callbacks import EpochEnd, RunEnd, StepEnd
from fastkd.engine.meter import Meter
from fastkd.errors import UserError
from fastkd.export import load_trained
from fastkd.methods import KD
from fastkd.run import checkpoint
from fastkd.signals import Stopped


class Recorder:
    def __init__(self):
        self.seen = []

    def on_step(self, step):
        self.seen.append(step)

    on_epoch = on_end = on_step

    def of(self, kind):
        return [each for each in self.seen if isinstance(each, kind)]


def trainer(tiny_net, tiny_loaders, out, *callbacks, epochs=2, **options):
    settings = TrainOptions(epochs=epochs, lr=0.05, out=str(out), device="cpu", **options)
    return Trainer(KD(tiny_net(), tiny_net(9)), *tiny_loaders(), settings, callbacks=callbacks)


def test_callbacks_follow_a_run_in_order(tiny_net, tiny_loaders, tmp_path):
    one = Recorder()
    result = trainer(tiny_net, tiny_loaders, tmp_path / "run", one).fit()
    kinds = [type(each) for each in one.seen]
    assert kinds == [*[StepEnd] * 3, EpochEnd, *[StepEnd] * 3, EpochEnd, RunEnd]
    steps = one.of(StepEnd)
    assert [(step.epoch, step.step, step.steps, step.images) for step in steps] == [
        *((1, number, 6, 8 if number < 3 else 6) for number in (1, 2, 3)),
        *((2, number, 6, 8 if number < 6 else 6) for number in (4, 5, 6)),
    ]
    assert [step.lr for step in steps][0] == 0.05 and all(step.images_per_s > 0 for step in steps)
    assert [dict(epoch.row) for epoch in one.of(EpochEnd)] == result.history
    assert one.seen[-1] == RunEnd("finished", result.history, result.out)


def test_loss_terms_are_the_means_so_far_and_read_only_when_asked(tiny_net, tiny_loaders, tmp_path, monkeypatch):
    read, reads, terms = Meter.read, [], []
    monkeypatch.setattr(Meter, "read", lambda self, everywhere=True: reads.append(everywhere) or read(self, everywhere))

    class Last:
        def on_step(self, step):
            if step.step == 3:
                terms.append(step.loss_terms())

    result = trainer(tiny_net, tiny_loaders, tmp_path / "run", Last(), Recorder(), epochs=1).fit()
    assert terms == [{name: result.history[0][name] for name in terms[0]}] and terms[0].keys() >= {"ce", "kd"}
    assert reads == [False, True]  # the callback's, and the epoch's


def test_callbacks_change_nothing(tiny_net, tiny_loaders, tmp_path):
    class Changes:
        def on_step(self, step):
            torch.rand(3)
            with pytest.raises(dataclasses.FrozenInstanceError):
                step.lr = 5.0

        def on_epoch(self, epoch):
            epoch.row["top1"] = -1.0
            epoch.row.clear()

        def on_end(self, end):
            end.history.clear()

    plain = trainer(tiny_net, tiny_loaders, tmp_path / "plain").fit()
    followed = trainer(tiny_net, tiny_loaders, tmp_path / "followed", Changes()).fit()
    wanted, got = load_file(plain.student), load_file(followed.student)
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)
    assert [row["top1"] for row in followed.history] == [row["top1"] for row in plain.history]


@pytest.mark.parametrize("hook, epochs", [("on_step", 0), ("on_epoch", 1)])
def test_an_exception_ends_the_run_with_its_own_traceback(tiny_net, tiny_loaders, tmp_path, hook, epochs):
    """The states before it are whole: a resume ends like a run that was never stopped."""

    def broken(self, data):
        raise ZeroDivisionError("of the callback")

    other = Recorder()
    one = trainer(tiny_net, tiny_loaders, tmp_path / "run", type("Broken", (), {hook: broken})(), other)
    with pytest.raises(ZeroDivisionError, match="of the callback") as caught:
        one.fit()
    assert caught.traceback[-1].name == "broken"
    assert other.seen[-1].status == "failed" and len(other.seen[-1].history) == epochs
    if epochs:
        assert checkpoint.load(tmp_path / "run/last.pt")["epoch"] == epochs
    resumed = trainer(tiny_net, tiny_loaders, tmp_path / "run", resume=True).fit()
    whole = trainer(tiny_net, tiny_loaders, tmp_path / "whole").fit()
    wanted, got = load_file(whole.student), load_file(resumed.student)
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)


def test_an_exception_at_the_end_is_raised_and_the_others_are_told(tiny_net, tiny_loaders, tmp_path, capsys):
    class Broken:
        def on_end(self, end):
            raise ZeroDivisionError(end.status)

    other = Recorder()
    with pytest.raises(ZeroDivisionError, match="finished"):
        trainer(tiny_net, tiny_loaders, tmp_path / "run", Broken(), other, epochs=1).fit()
    assert other.seen[-1].status == "finished" and (tmp_path / "run/student.safetensors").exists()
    assert "WARNING: on_end of Broken: ZeroDivisionError: finished" in capsys.readouterr().out


def test_a_stopped_run_says_so(tiny_net, tiny_loaders, tmp_path):
    class Stops(Recorder):
        def on_step(self, step):
            one.request.name = "SIGTERM"

    recorder = Stops()
    one = trainer(tiny_net, tiny_loaders, tmp_path / "run", recorder)
    with pytest.raises(Stopped):
        one.fit()
    assert recorder.of(RunEnd)[0].status == "stopped"


def test_a_callback_stops_a_run_by_a_signal(tiny_net, tiny_loaders, tmp_path):
    """As docs/guide.md says: the state is saved, best.pt can be loaded, and a resume goes on with the same bits."""

    class Stops(Recorder):
        def on_epoch(self, epoch):
            if epoch.epoch == 2:
                signal.raise_signal(signal.SIGTERM)

    recorder = Stops()
    with pytest.raises(Stopped, match="stopped by SIGTERM after step 7 of 12"):
        trainer(tiny_net, tiny_loaders, tmp_path / "run", recorder, epochs=4).fit()
    assert recorder.seen[-1].status == "stopped" and len(recorder.seen[-1].history) == 2
    images = {"image_size": 8, "mean": [0.5] * 3, "std": [0.5] * 3}
    trained = load_trained(tmp_path / "run/best.pt", tiny_net(3), **images)
    best = checkpoint.load(tmp_path / "run/best.pt")["student"]
    assert not trained.net.training
    assert all(torch.equal(best[name], value) for name, value in trained.net.state_dict().items())
    resumed = trainer(tiny_net, tiny_loaders, tmp_path / "run", epochs=4, resume=True).fit()
    whole = trainer(tiny_net, tiny_loaders, tmp_path / "whole", epochs=4).fit()
    wanted, got = load_file(whole.student), load_file(resumed.student)
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)


@pytest.mark.parametrize(
    "wrong, words", [(print, "a builtin_function"), (Recorder, "the class Recorder"), (3, "a int")]
)
def test_what_is_no_callback_is_refused_before_anything_is_written(tiny_net, tiny_loaders, tmp_path, wrong, words):
    with pytest.raises(UserError, match=f"callbacks holds {words}.*on_step, on_epoch, on_end"):
        trainer(tiny_net, tiny_loaders, tmp_path / "run", wrong)
    assert not (tmp_path / "run").exists()
