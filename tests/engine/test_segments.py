"""Steps of very many paths, replayed part by part, equal eager ones bit for bit."""

import pytest
import torch
from every_method import batch, build
from replays import CPU, Graph, same, trained

from fastkd import create_model
from fastkd.engine import Step, TrainOptions, choose_form
from fastkd.engine.launch import graphed, paths, why_not
from fastkd.engine.precision import Precision
from fastkd.engine.segments import SegmentedStep
from fastkd.errors import UserError
from fastkd.methods import IAKD
from fastkd.methods.iakd import IAKDOptions

PATHS = [(True, True, True), (True, False, True), (False, False, False)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"opt": "adamw", "ema_decay": 0.9, "clip_grad": 0.5},
        {"grad_accum": 2, "ema_decay": 0.5, "opt": "nesterov"},
        {"amp_dtype": "bfloat16"},
        {"amp_dtype": "float16"},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["iakd", "iakd --teacher-bn batch"])
def test_replayed_parts_equal_eager_ones(name, options):
    eager, _ = trained(name, **options)
    replayed, run = trained(name, SegmentedStep, **options)
    assert all(segment.replays for segment in run.segments if segment.key)
    assert sum(bool(segment.key) for segment in run.segments) >= 6, "too little was captured"
    assert same(eager, replayed)
    run.close()
    assert not any("forward" in vars(module) for module in run.step.method.modules())


def test_maps_between_the_parts_reach_the_loss():
    """There three gradients meet, in another order: equal within rounding."""
    eager, _ = trained("iakd+at", steps=4)
    replayed, run = trained("iakd+at", SegmentedStep, steps=4)
    assert sum(bool(segment.key) for segment in run.segments) >= 5
    torch.testing.assert_close(replayed["method"], eager["method"], rtol=1e-4, atol=1e-5)
    assert replayed["terms"] == pytest.approx(eager["terms"], rel=1e-5)


@pytest.mark.parametrize("form", ["plain", "fused"])
def test_the_teacher_s_own_forward_is_replayed(form):
    states = []
    for wrap in (lambda step: step, lambda step: SegmentedStep(step, Graph, warm_up=1)):
        method = build("iakd --teacher-bn batch")
        method.teacher.batch_statistics = False
        method.train()
        precision = Precision("float32", CPU)
        choose_form(method, batch(0, 8)[0], form, precision, lambda line: None)
        run = wrap(Step(method, TrainOptions(lr=0.05), CPU))
        for number in range(6):
            run(*batch(number % 3, 8), PATHS[number % 3])
        states.append(run.state_dict())
    *_, last = run.segments
    assert last.replays == 5 and same(*states)


def test_a_part_that_is_left_out_stays_untouched():
    method = build("iakd")
    run = SegmentedStep(Step(method, TrainOptions(lr=0.1, weight_decay=0.1), CPU), Graph, warm_up=1)
    for path in (*PATHS, *PATHS):
        run(*batch(0, 8), path)
    before = [{name: v.clone() for name, v in gate.student.state_dict().items()} for gate in method.gates]
    run(*batch(1, 8), (True, False, True))
    left = [same(old, dict(gate.student.state_dict())) for old, gate in zip(before, method.gates, strict=True)]
    assert left == [False, True, False]


def test_other_batches_and_evaluation_run_eagerly():
    method = build("iakd")
    run = SegmentedStep(Step(method, TrainOptions(lr=0.1), CPU), Graph, warm_up=0)
    plain = build("iakd")
    step = Step(plain, TrainOptions(lr=0.1), CPU)
    for size in (8, 8, 5, 8):
        run(*batch(0, size), PATHS[0])
        step(*batch(0, size), PATHS[0])
    assert [segment.replays for segment in run.segments if segment.key] == [3] * 5
    with torch.inference_mode():
        assert torch.equal(method.student.eval()(batch(1, 8)[0]), plain.student.eval()(batch(1, 8)[0]))


@pytest.mark.parametrize("fault", ["stale input", "stale gradient", "frozen weights"])
def test_faults_are_caught(fault, monkeypatch):
    from fastkd.engine.segments import Segment

    eager, _ = trained("iakd")
    if fault == "stale input":

        def forward(self, x):
            self.graph.replay()
            return self.y.detach()

        monkeypatch.setattr(Segment, "forward", forward)
    elif fault == "stale gradient":
        backward = Segment.backward
        monkeypatch.setattr(Segment, "backward", lambda self, dy: backward(self, self.dy.clone()))
    else:
        monkeypatch.setattr(Segment, "backward", lambda self, dy: (self.back.replay(), self.dx)[1])
    replayed, _ = trained("iakd", SegmentedStep)
    assert not same(eager, replayed)


def by_blocks() -> IAKD:
    return IAKD(create_model("resnet26", 10), create_model("resnet44", 10), IAKDOptions(gates="stage"))


def test_when_the_parts_are_captured(monkeypatch):
    cuda, made = torch.device("cuda"), []
    method = IAKD(create_model("resnet56", 10), create_model("resnet56", 10), IAKDOptions(gates="block"))
    assert paths(method) == 2**27 and paths(by_blocks()) == 8
    assert "--compile" in why_not(Step(method, TrainOptions(lr=0.1, compile=True), CPU), cuda, 1)
    monkeypatch.setattr("torch.cuda.graph_pool_handle", lambda: None)
    monkeypatch.setattr("torch.cuda.Stream", lambda device: None)
    step = graphed(Step(method, TrainOptions(lr=0.1), CPU), "on", cuda, 1, made.append)
    assert type(step) is SegmentedStep and len(step.segments) == 2 * 27 + 2
    assert step.close() == "CUDA graphs of 0 of 56 parts, 0 MB, replayed 0 times"
    assert not any("forward" in vars(module) for module in method.student.modules())
    with pytest.raises(UserError, match="paths"):
        graphed(Step(method, TrainOptions(lr=0.1, compile=True), CPU), "on", cuda, 1, made.append)
