"""The engine's forms from the trainer's side: options, resume, errors."""

from dataclasses import replace

import pytest
import torch
from every_method import Loader
from replays import Graph, same

from fastkd import Trainer, TrainOptions, create_model
from fastkd.engine import GraphedStep, Step, graphed
from fastkd.engine.launch import _stop, compiles, why_not
from fastkd.engine.partial_graphs import PartialGraphStep
from fastkd.engine.precision import Precision, cast_frozen
from fastkd.errors import UserError
from fastkd.methods import CE, IAKD, KD, ForwardCache
from fastkd.run import checkpoint


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
    state = checkpoint.load(tmp_path / "half/last.pt")
    state["identity"]["options"]["teacher_form"] = "auto"
    checkpoint.save_run(tmp_path / "half", state)
    again = trainer(tiny_net, tiny_loaders, tmp_path / "half", teacher_form="auto", resume=True)
    again.fit()
    assert again.form == form and f"teacher form: {form}" in capsys.readouterr().out
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(again).items())


def test_on_a_cpu_auto_is_plain_and_eager(tiny_net, tiny_loaders, tmp_path):
    run = trainer(tiny_net, tiny_loaders, tmp_path / "run", epochs=1)
    run.fit()
    assert run.form == "plain" and run.runner is run.step and type(run.step) is Step


def test_a_graph_that_cannot_be_is_an_error(tiny_net, tiny_loaders, tmp_path):
    step = Step(CE(tiny_net()), TrainOptions(lr=0.1), torch.device("cpu"))
    with pytest.raises(UserError, match="--graph on: there is no CUDA device"):
        graphed(step, "on", torch.device("cpu"), print)
    with pytest.raises(UserError, match="--graph on: there is no CUDA device"):
        trainer(tiny_net, tiny_loaders, tmp_path / "run", graph="on").fit()


def test_why_there_is_no_graph():
    options, cuda = TrainOptions(lr=0.1), torch.device("cuda")
    assert why_not(options, cuda) == ""
    assert "learning rate on the host" in why_not(replace(options, opt="fusedlamb"), cuda)


@pytest.mark.parametrize("wanted", ["on", "auto"])
def test_what_happens_if_a_step_cannot_be_captured(wanted):
    said = []
    if wanted == "on":
        with pytest.raises(UserError, match="--graph on: net.py:7 waits for the device; use --graph auto or off"):
            _stop(wanted, said.append, "net.py:7 waits for the device")
    else:
        _stop(wanted, said.append, "net.py:7 waits for the device")
        assert said == ["steps run eagerly from here on: net.py:7 waits for the device"]


def test_auto_compiles_long_runs_on_a_gpu(tiny_net):
    method, said, cuda = CE(tiny_net()), [], torch.device("cuda")
    answers = {
        (wanted, device.type, steps): compiles(method, TrainOptions(compile=wanted), device, steps, said.append)
        for wanted in ("auto", "on", "off")
        for device in (cuda, torch.device("cpu"))
        for steps in (99_999, 100_000)
    }
    yes = {each for each, answer in answers.items() if answer}
    assert yes == {("auto", "cuda", 100_000)} | {each for each in answers if each[0] == "on"}
    assert said == ["compiling networks and losses, which pays in 100,000 steps; --compile off does without"]


def broken(graph, inputs):
    raise RuntimeError("no compiler here\nand a long story")


@pytest.mark.parametrize("wanted", ["on", "auto"])
def test_a_compiler_that_fails(tiny_net, wanted, monkeypatch):
    """With auto the run goes on, as if it had never been compiled; statistics that were moved are put back."""
    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compile_(self, backend=broken, **options))
    images, target = torch.randn(8, 3, 8, 8), torch.arange(8) % 4
    states, said = [], []
    for compiled in (False, True):
        options = TrainOptions(lr=0.1, compile=wanted)
        step = Step(CE(tiny_net()).train(), options, torch.device("cpu"), compiled=compiled, log=said.append)
        if compiled and wanted == "on":
            with pytest.raises(UserError, match="--compile on: torch.compile failed: .*; use --compile auto or off"):
                step(images, target), step(images, target)
            return
        for _ in range(3):
            step(images, target)
        states.append(step.state_dict())
    assert same(*states) and len(said) == 1
    assert said[0].startswith("steps run without the compiler: torch.compile failed: BackendCompilerFailed")


def test_a_graphed_step_is_a_step_to_the_trainer(tiny_net):
    step = Step(CE(tiny_net()), TrainOptions(lr=0.1), torch.device("cpu"))
    replayed = GraphedStep(step, new_graph=None)
    assert replayed.step is step
    assert replayed.close() == "0 CUDA graphs, 0 MB, replayed in 0 of 0 steps"


def test_compiled_steps_learn_the_same(tiny_net, tiny_loaders, tmp_path):
    runs = [trainer(tiny_net, tiny_loaders, tmp_path / name, epochs=1, compile="on" if name == "compiled" else "off")
            for name in ("eager", "compiled")]  # fmt: skip
    for run in runs:
        run.fit()
    torch.testing.assert_close(*(dict(weights(run)) for run in runs), rtol=1e-3, atol=1e-4)
    assert checkpoint.load(tmp_path / "compiled/last.pt")["student"].keys() == weights(runs[0]).keys()


@pytest.mark.parametrize("kind", ["whole", "parts"])
def test_replayed_runs_resume_exactly(kind, tmp_path, monkeypatch, capsys):
    """The trainer with graphs, as on CUDA; the imitation stands for them. What ends a run leaves plain networks."""

    def replayed(step, *_):
        return (
            PartialGraphStep(step, lambda: Graph, warm_up=1) if kind == "parts" else GraphedStep(step, Graph, warm_up=1)
        )

    def trainer(folder: str, **options) -> Trainer:
        torch.manual_seed(0)
        method = IAKD(create_model("resnet8", 10), create_model("resnet14", 10), IAKD.Options(schedule="uniform"))
        settings = TrainOptions(epochs=4, lr=0.05, out=str(tmp_path / folder), device="cpu", ema_decay=0.9, **options)
        return Trainer(method, Loader(), Loader(), settings)

    def fit(run: Trainer) -> dict:
        run.fit()
        return run.step.state_dict()

    eager = fit(trainer("eager"))
    monkeypatch.setattr("fastkd.train.graphed", replayed)
    assert same(fit(trainer("whole")), eager)
    assert "replayed in 0 of" not in capsys.readouterr().out
    finish = Trainer._finish_epoch

    def killed(self):
        finish(self)
        if self.epoch == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_finish_epoch", killed)
    half = trainer("half")
    with pytest.raises(KeyboardInterrupt):
        fit(half)
    assert not any("forward" in vars(module) for module in half.method.modules())
    monkeypatch.setattr(Trainer, "_finish_epoch", finish)
    assert same(fit(trainer("half", resume=True)), eager)


def test_a_run_gives_the_teacher_its_weights_back(tiny_net, tiny_loaders, tmp_path):
    """In bf16 its weights are cast for the time of the run; a second run, in another form, starts from them."""
    teacher, loaders = tiny_net(1), tiny_loaders()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    for form in ("plain", "folded"):
        settings = TrainOptions(epochs=1, lr=0.05, out=str(tmp_path / form), device="cpu", amp_dtype="bfloat16")
        Trainer(KD(tiny_net(0), teacher), *loaders, replace(settings, teacher_form=form)).fit()
        assert same(before, dict(teacher.state_dict()))


def test_teachers_that_leave_autocast_are_not_cast():
    class Exact(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(12, 4)

        def forward(self, images):
            with torch.autocast("cpu", enabled=False):
                return self.fc(images.float().flatten(1))

    images, precision = torch.randn(2, 3, 2, 2), Precision("bfloat16", torch.device("cpu"))
    for teacher, dtype in ((Exact(), torch.float32), (torch.nn.Sequential(torch.nn.Conv2d(3, 4, 2)), torch.bfloat16)):
        method = KD(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 4)), teacher)
        put_back = cast_frozen(method, images, precision)
        assert {p.dtype for p in teacher.parameters()} == {dtype}
        put_back()
        assert {p.dtype for p in teacher.parameters()} == {torch.float32}


def test_a_compiled_step_does_not_ask_whether_it_is_captured(monkeypatch):
    """The answer would be a guard: compiled once for eager steps, and again in the middle of the capture."""

    class Images:
        @property
        def is_cuda(self):
            raise AssertionError("asked")

    monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)
    student, teacher = torch.nn.Identity(), torch.nn.Identity()
    ForwardCache(Images(), {}).start(student, [teacher], [student])
