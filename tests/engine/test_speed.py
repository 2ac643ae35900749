"""The engine's forms from the trainer's side: options, resume, errors."""

import pytest
import torch

from fastkd import Trainer, TrainOptions, checkpoint
from fastkd.engine import GraphedStep, Step
from fastkd.engine.launch import why_not
from fastkd.errors import UserError
from fastkd.methods import CE, KD


def trainer(tiny_net, tiny_loaders, folder, **options) -> Trainer:
    settings = TrainOptions(**{"epochs": 2, "lr": 0.05, "out": str(folder), "device": "cpu"} | options)
    return Trainer(KD(tiny_net(0), tiny_net(1)), *tiny_loaders(), settings)


def weights(run: Trainer) -> dict:
    return run.method.student.state_dict()


@pytest.mark.parametrize("form", ["folded", "fused"])
def test_the_form_is_kept_over_a_resume(tiny_net, tiny_loaders, tmp_path, form, capsys):
    whole = trainer(tiny_net, tiny_loaders, tmp_path / "whole", teacher_form=form)
    whole.fit()
    half = trainer(tiny_net, tiny_loaders, tmp_path / "half", teacher_form=form)
    half.config = half.step.options = TrainOptions(epochs=1, lr=0.05, out=str(tmp_path / "half"), device="cpu")
    half.schedule.options = whole.config
    half.fit()
    assert checkpoint.load(tmp_path / "half/last.pt")["teacher_form"] == form
    config = (tmp_path / "whole/config.yaml").read_text()
    (tmp_path / "half/config.yaml").write_text(config.replace(f"teacher_form: {form}", "teacher_form: auto"))
    again = trainer(tiny_net, tiny_loaders, tmp_path / "half", teacher_form="auto", resume=True)
    again.fit()
    assert again.form == form and f"teacher form: {form}" in capsys.readouterr().out
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(again).items())


def test_on_a_cpu_auto_is_plain_and_eager(tiny_net, tiny_loaders, tmp_path):
    run = trainer(tiny_net, tiny_loaders, tmp_path / "run", epochs=1)
    run.fit()
    assert run.form == "plain" and type(run.step) is Step


def test_a_graph_that_cannot_be_is_an_error(tiny_net, tiny_loaders, tmp_path):
    with pytest.raises(UserError, match="--graph on: there is no CUDA device"):
        trainer(tiny_net, tiny_loaders, tmp_path / "run", graph="on").fit()


def test_why_there_is_no_graph(tiny_net):
    step, cuda = Step(CE(tiny_net()), TrainOptions(lr=0.1), torch.device("cpu")), torch.device("cuda")
    assert why_not(step, cuda, 1) == ""
    assert "several processes" in why_not(step, cuda, 2)
    step.optimizer = object()
    assert "learning rate on the host" in why_not(step, cuda, 1)


def test_a_graphed_step_is_a_step_to_the_trainer(tiny_net):
    step = Step(CE(tiny_net()), TrainOptions(lr=0.1), torch.device("cpu"))
    graphed = GraphedStep(step, new_graph=None)
    assert graphed.meter is step.meter and graphed.state_dict().keys() == step.state_dict().keys()
    assert graphed.close() == "0 CUDA graphs, 0 MB, replayed in 0 of 0 steps"


def test_compiled_steps_learn_the_same(tiny_net, tiny_loaders, tmp_path):
    runs = [trainer(tiny_net, tiny_loaders, tmp_path / name, epochs=1, compile=name == "compiled")
            for name in ("eager", "compiled")]  # fmt: skip
    for run in runs:
        run.fit()
    torch.testing.assert_close(*(dict(weights(run)) for run in runs), rtol=1e-3, atol=1e-4)
    assert checkpoint.load(tmp_path / "compiled/last.pt")["student"].keys() == weights(runs[0]).keys()
