"""Numbers that are not finite: skipped and counted, the run stopped in time, and never saved."""

import copy
import io
import json
import math
import re
import time
from pathlib import Path

import pytest
import torch
from sealing import sealed
from torch import nn

from fastkd import Trainer, TrainOptions, create_model
from fastkd.data import create_loaders
from fastkd.engine import Step
from fastkd.engine.finite import Checked, check_network, first_nonfinite
from fastkd.errors import UserError
from fastkd.methods import CE, KD
from fastkd.run import checkpoint
from fastkd.run.diverged import last_good

CPU = torch.device("cpu")


def poisoned(loader, factors):
    """The loader, whose images of step n, counted over all epochs, are multiplied by `factors[n]`."""
    batches, given = type(loader).__iter__, iter(range(10**6))

    def multiplied(self):
        for images, target in batches(self):
            yield images * factors.get(next(given) - 1, 1.0), target  # the first batch is looked at before the run

    loader.__class__ = type("Poisoned", (type(loader),), {"__iter__": multiplied})
    return loader


def train(tiny_net, tiny_loaders, tmp_path, factors, samples=80, net=None, **options):
    loader, val = tiny_loaders(samples=samples)
    settings = TrainOptions(**{"epochs": 2, "lr": 0.05, "out": str(tmp_path / "r"), "device": "cpu"} | options)
    trainer = Trainer(CE(net or tiny_net()), poisoned(loader, factors), val, settings)
    return trainer, trainer.fit


INFINITE, HUGE = float("inf"), 1e25


def test_skipped_steps_are_a_column_of_the_history_and_a_warning(tiny_net, tiny_loaders, tmp_path, capsys):
    _, fit = train(tiny_net, tiny_loaders, tmp_path, {3: INFINITE, 5: INFINITE, 14: INFINITE}, max_bad_steps=2)
    assert [row["bad_steps"] for row in fit().history] == [2, 1]
    said = capsys.readouterr().out
    assert "not finite in 2 of 10 steps of epoch 1: skipped" in said and "bad_steps" not in said
    assert "1 of 10 steps of epoch 2" in said and not (tmp_path / "r/diverged.json").exists()


def test_a_run_stops_after_so_many_bad_steps_in_a_row(tiny_net, tiny_loaders, tmp_path):
    """Over the end of an epoch; the weights are those before the first of them, and the file says what led there."""
    bad = dict.fromkeys((18, 19, 20, 21), INFINITE)
    trainer, fit = train(tiny_net, tiny_loaders, tmp_path, {15: INFINITE} | bad, epochs=9, max_bad_steps=4)
    with pytest.raises(UserError, match=r"in the last 4 steps \(--max-bad-steps 4\).*last good state is .*last.pt"):
        fit()
    assert not (tmp_path / "r/student.safetensors").exists()
    found = json.loads((tmp_path / "r/diverged.json").read_text())
    steps = found["steps"]
    assert [(row["epoch"], row["step"]) for row in steps[-4:]] == [(2, 9), (2, 10), (3, 1), (3, 2)] and len(steps) == 22
    assert [row["terms"]["ce"] for row in steps[-4:]] == ["nan"] * 4 and 0 < steps[-5]["terms"]["ce"] < 3
    assert [row["gradient_norm"] for row in steps[-4:]] == ["nan"] * 4 and 0 < steps[-5]["gradient_norm"] < 9
    assert steps[0]["images"] == [*range(8)] and len(steps[-1]["images"]) == 8
    assert found["last_good_checkpoint"].endswith("last.pt") and set(found["layers"]) == {
        name for name, _ in trainer.method.named_parameters()
    }
    layer = found["layers"]["student.fc.weight"]
    assert layer["weight"] == pytest.approx(trainer.method.student.fc.weight.norm().item())
    assert layer["gradient_of_last_step"] == "nan" and 0 < layer["gradient_of_last_good_step"] < 9


def test_weights_stay_those_of_the_last_good_step(tiny_net, tiny_loaders, tmp_path):
    good, fit = train(tiny_net, tiny_loaders, tmp_path / "a", {}, epochs=1, samples=48)
    fit()
    trainer, fit = train(tiny_net, tiny_loaders, tmp_path / "b", dict.fromkeys(range(6, 99), INFINITE), samples=48)
    trainer.schedule.options = good.schedule.options
    with pytest.raises(UserError, match="6 of 6 steps of epoch 2"):
        fit()
    for name, value in trainer.method.state_dict().items():
        assert torch.equal(value, good.method.state_dict()[name]) or name.endswith("num_batches_tracked"), name


def test_bad_steps_in_a_row_are_counted_over_a_resume(tiny_net):
    images, target = torch.full((8, 3, 8, 8), INFINITE), torch.arange(8) % 4
    first, second = (Step(CE(tiny_net()).train(), TrainOptions(max_bad_steps=3), CPU) for _ in range(2))
    for _ in range(2):
        first(images, target)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    second(images, target)
    assert second.bad.counts.tolist()[:4] == [3, 3, 3, 3] and second.bad.first == 2


def test_a_statistic_that_is_not_finite_is_never_saved(tiny_net, tiny_loaders, tmp_path):
    """Huge images: their variance is infinite, BatchNorm gives zeros, so loss and gradient are finite."""
    _, fit = train(tiny_net, tiny_loaders, tmp_path, {15: HUGE})
    with pytest.raises(UserError, match=r"student\.bn\.running_var holds an infinite number after step 20") as caught:
        fit()
    assert checkpoint.load(tmp_path / "r/last.pt")["epoch"] == checkpoint.load(tmp_path / "r/best.pt")["epoch"] == 1
    assert "last good state is" in str(caught.value) and (tmp_path / "r/diverged.json").exists()


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("weight", r"^student\.fc\.bias holds NaN"),
        ("average", r"^the average of student\.fc\.bias holds NaN"),
        ("momentum", r"^the optimizer's momentum_buffer of student\.fc\.bias holds NaN"),
        ("buffer", r"^student\.bn\.running_mean holds NaN"),
    ],
)
def test_the_first_bad_tensor_of_a_state_is_named(tiny_net, place, words):
    step = Step(CE(tiny_net()).train(), TrainOptions(ema_decay=0.9), CPU)
    step(torch.randn(8, 3, 8, 8), torch.arange(8) % 4)
    assert step.first_nonfinite() == ""
    bias, ema = step.method.student.fc.bias, step.ema.net["student"].fc.bias
    tensor = {"weight": bias, "average": ema, "momentum": step.optimizer.state[bias]["momentum_buffer"]}
    with torch.no_grad():
        tensor.get(place, step.method.student.bn.running_mean)[1] = math.nan
    assert re.search(words, step.first_nonfinite())


def test_constants_of_a_network_may_be_infinite_but_not_nan():
    """The mask of an attention is; a half-precision weight at its largest number is finite."""
    net = nn.Linear(2, 2)
    net.register_buffer("mask", torch.full((2, 2), -INFINITE).triu(1))
    net.register_buffer("count", torch.tensor(3))
    net.register_buffer("none", torch.zeros(0))
    check_network("the teacher", net)
    assert first_nonfinite([Checked("half", torch.tensor([65504.0]).half()), Checked("big", torch.tensor(3e38))]) == ""
    net.mask[0, 0] = math.nan
    with pytest.raises(UserError, match="the teacher cannot be used: mask holds NaN; take other weights"):
        check_network("the teacher", net)


@pytest.mark.parametrize("tensor", ["conv.weight", "bn.running_var", "fc.bias"])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_teacher_with_a_bad_tensor_is_refused_before_anything_is_written(
    tiny_net, tiny_loaders, tmp_path, tensor, value
):
    teacher = tiny_net(9)
    teacher.state_dict()[tensor].view(-1)[-1] = value
    with pytest.raises(UserError, match=f"the teacher TinyNet cannot be used: {tensor} holds"):
        Trainer(KD(tiny_net(), teacher), *tiny_loaders(), TrainOptions(out=str(tmp_path / "r")))
    assert not (tmp_path / "r").exists()


def test_the_last_good_checkpoint_is_named_only_where_it_is_one(tmp_path):
    def write(name, value):
        state = {"method": {"student.bn.running_var": torch.tensor([1.0, value])}, "history": []}
        buffer = io.BytesIO()
        torch.save({"format": checkpoint.FORMAT, **state}, buffer)
        (tmp_path / name).write_bytes(sealed(buffer.getvalue()))

    assert last_good(tmp_path) is None
    write("last.pt", math.inf)
    assert last_good(tmp_path) is None
    write("best.pt", 1.0)
    assert last_good(tmp_path) == tmp_path / "best.pt"
    (tmp_path / "best.pt").write_bytes(b"no checkpoint")
    assert last_good(tmp_path) is None
    write("last.pt", 1.0)
    assert last_good(tmp_path) == tmp_path / "last.pt"


def test_the_last_good_checkpoint_may_still_be_written_when_the_run_stops(
    tiny_net, tiny_loaders, tmp_path, monkeypatch
):
    save = checkpoint.save_run

    def slow(*given):
        time.sleep(0.3)
        save(*given)

    monkeypatch.setattr(checkpoint, "save_run", slow)
    _, fit = train(tiny_net, tiny_loaders, tmp_path, {1: INFINITE}, checkpoint_every="1", max_bad_steps=1)
    with pytest.raises(UserError, match="last good state is .*last.pt"):
        fit()
    assert json.loads((tmp_path / "r/diverged.json").read_text())["last_good_checkpoint"].endswith("last.pt")


@pytest.mark.parametrize("opt", ["fusedsgd", "fusedlamb", "fusedadam"])
def test_apex_with_float16_is_refused(opt):
    with pytest.raises(UserError, match=f"--opt {opt} --amp-dtype float16.*cannot skip.*bfloat16"):
        TrainOptions(opt=opt, amp_dtype="float16")
    TrainOptions(opt=opt, amp_dtype="bfloat16")


@pytest.mark.parametrize("value", [0, -3])
def test_the_limit_is_at_least_one_step(value):
    with pytest.raises(UserError, match=f"--max-bad-steps must be 1 or more, got {value}"):
        TrainOptions(max_bad_steps=value)


FROZEN = ("--epochs", "1", "--warmup-epochs", "0", "--teacher-epochs", "0", "-b", "256", "--no-baseline")


def test_the_command_refuses_a_teacher_that_is_not_finite_before_it_writes(fastkd, few_digits, tmp_path):
    net = create_model("resnet20", 10)
    net.state_dict()["layer2.0.bn1.running_var"][3] = math.nan
    torch.save(net.state_dict(), "bad.pth")
    status, out, error = fastkd("train", *FROZEN, "--teacher-weights", "bad.pth", "--out", "r")
    assert status == 2 and len(error.splitlines()) == 1 and not (tmp_path / "r").exists()
    assert "the teacher resnet20" in error and "layer2.0.bn1.running_var holds NaN" in error


def test_a_teacher_whose_logits_are_bad_on_validation_images_is_found_before_an_epoch(fastkd, few_digits, monkeypatch):
    """Its weights are finite, and so are its logits on the first training images."""
    torch.save(create_model("resnet20", 10).state_dict(), "t.pth")
    digits = create_loaders

    def with_a_bright_image(*given, **named):
        train, val = digits(*given, **named)
        batches = type(val).__iter__

        def bright(self):
            for images, target in batches(self):
                images[:1] = math.inf
                yield images, target

        val.__class__ = type("Bright", (type(val),), {"__iter__": bright})
        return train, val

    monkeypatch.setattr("fastkd.commands.job.create_loaders", with_a_bright_image)
    status, out, error = fastkd("train", *FROZEN, "--teacher-weights", "t.pth", "--out", "r")
    assert status == 2 and not re.search(r"epoch +1/", out)
    assert "the teacher resnet20 gives logits that are NaN or infinite for" in error
    assert not Path("r/last.pt").exists()
