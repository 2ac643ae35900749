"""Blocks that IAKD swaps in, with BatchNorm folded: equal results and gradients, and afterwards the teacher's own."""

import copy
import itertools

import pytest
import torch
from every_method import batch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastkd import create_model
from fastkd.engine import Step, TrainOptions, choose_form, folded_gates
from fastkd.engine.precision import Precision
from fastkd.engine.teacher_forms import TeacherForm, check_form, teacher_form
from fastkd.errors import UserError
from fastkd.methods import IAKD, find_method
from fastkd.methods.iakd import IAKDOptions

CPU = torch.device("cpu")
FP32 = Precision("float32", CPU)
PAIRS = {
    "resnet8 resnet14": IAKDOptions(),
    "resnet14 resnet26": IAKDOptions(gates="block"),
    "resnet8 resnet8x4": IAKDOptions(adapters=True),
    "timm/resnet18 timm/resnet34": IAKDOptions(),
}


def net(name, seed=0):
    torch.manual_seed(seed)
    made = create_model(name, 10).to(memory_format=torch.channels_last)
    for norm in (module for module in made.modules() if isinstance(module, _BatchNorm)):
        norm.running_mean.normal_(0, 0.1)
        norm.running_var.uniform_(0.5, 1.5)
    return made


def iakd(names="resnet8 resnet14", options=None, **more):
    student, teacher = names.split()
    return IAKD(net(student), net(teacher, 1), options or IAKDOptions(**more)).train()


def norms(method) -> int:
    """BatchNorms in the blocks that may be swapped in, without those of the adapters."""
    mine = set(method.adapters.modules())
    modules = {module for gate in method.gates for module in gate.teacher.modules()}
    return sum(isinstance(module, _BatchNorm) for module in modules - mine)


def run(method, path):
    """Terms, and the gradient of every weight."""
    method.zero_grad()
    terms = method(*batch(0, 8), path)
    sum(terms.values()).backward()
    return {**terms} | {name: p.grad for name, p in method.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("pair", PAIRS)
def test_results_and_gradients_stay(pair):
    method, lines = iakd(pair, PAIRS[pair]), []
    state, teacher = copy.deepcopy(method.state_dict()), copy.deepcopy(method.teacher.net.state_dict())
    paths = [*itertools.islice(itertools.product((False, True), repeat=len(method.gates)), 5), (True, False, False)]
    paths = [path + (False,) * (len(method.gates) - len(path)) for path in paths]
    plain, before = [run(copy.deepcopy(method), path) for path in paths], norms(method)
    with teacher_form(method, lambda: batch(0, 8)[0], "folded", FP32, lines.append) as name:
        assert name == "folded" and norms(method) == 0 and lines[-1].startswith("swapped-in blocks: folded, error")
        assert all(module.training for module in method.student.modules())
        for key, value in method.state_dict().items():
            assert torch.equal(value, state[key])  # no statistic was moved
        for path, want in zip(paths, plain, strict=True):
            method.load_state_dict(state)
            found = run(method, path)
            assert found.keys() == want.keys()
            for key in want:
                torch.testing.assert_close(found[key], want[key], rtol=1e-3, atol=1e-4)
    modules = {module for gate in method.gates for module in gate.teacher.modules()}
    assert norms(method) == before > 0 and set(method.teacher.net.modules()) & modules
    assert all(torch.equal(value, teacher[key]) for key, value in method.teacher.net.state_dict().items())


def test_on_the_cpu_auto_leaves_every_block_as_it_is():
    for dtype in ("float32", "bfloat16"):
        method = iakd()
        blocks = [gate.teacher for gate in method.gates]
        with teacher_form(method, lambda: batch(0, 8)[0], "auto", Precision(dtype, CPU), print) as name:
            assert name == "plain" and all(a is gate.teacher for a, gate in zip(blocks, method.gates, strict=True))


def test_graphs_are_made_of_the_folded_blocks():
    method = iakd()
    choose_form(method, batch(0, 8)[0], "folded", FP32, lambda line: None)
    groups = method.graph_groups()[1:-1]
    assert [group[1] for group in groups] == [gate.teacher for gate in method.gates]
    assert not any(isinstance(module, _BatchNorm) for group in groups for module in group[1].modules())


def test_blocks_that_would_be_wrong_are_refused(monkeypatch):
    right = folded_gates.fuse_conv_bn

    def broken(net, images):
        twin = right(net, images)
        twin.layer2[0].conv1.weight.mul_(-5)
        return twin

    monkeypatch.setattr(folded_gates, "fuse_conv_bn", broken)
    method, lines = iakd(), []
    blocks = [gate.teacher for gate in method.gates]
    assert choose_form(method, batch(0, 8)[0], "auto", FP32, lines.append) == "plain"
    assert "swapped-in blocks: plain, refused: folded they differ by" in lines[-1]
    assert all(a is gate.teacher for a, gate in zip(blocks, method.gates, strict=True))
    with pytest.raises(UserError, match="--teacher-form folded: swapped-in blocks: refused"):
        choose_form(method, batch(0, 8)[0], "folded", FP32, lines.append)


def test_blocks_that_cannot_be_folded_say_why(monkeypatch):
    def fails(net, images):
        raise TypeError("no such layer")

    monkeypatch.setattr(folded_gates, "fuse_conv_bn", fails)
    method, lines = iakd(), []
    assert choose_form(method, batch(0, 8)[0], "auto", FP32, lines.append) == "plain"
    assert lines[-1] == "swapped-in blocks: plain, not possible: TypeError: no such layer"


def test_an_untrained_student_does_not_hide_a_wrong_block(monkeypatch):
    """With a head of zeros all its probabilities are equal; those of the teacher are not."""
    method, lines, right = iakd(), [], folded_gates.fuse_conv_bn
    nn.init.zeros_(method.student.fc.weight)

    def broken(net, images):
        twin = right(net, images)
        twin.layer3[0].conv1.weight.mul_(-5)
        return twin

    monkeypatch.setattr(folded_gates, "fuse_conv_bn", broken)
    assert choose_form(method, batch(0, 8)[0], "auto", FP32, lines.append) == "plain" and "refused" in lines[-1]


def test_gates_that_were_refused_are_refused_again_when_the_run_goes_on(monkeypatch):
    """`asked` is the user's option; the form is what an earlier run or rank 0 has made of it."""
    monkeypatch.setattr(folded_gates, "_fold", lambda *_: "refused")
    method, lines = iakd(kd_weight=1.0), []
    assert choose_form(method, batch(0, 8)[0], "folded", FP32, lines.append, asked="auto") == "folded"
    assert lines[-1] == "swapped-in blocks: plain, refused"
    with pytest.raises(UserError, match="--teacher-form folded: swapped-in blocks: refused"):
        choose_form(method, batch(0, 8)[0], "folded", FP32, lines.append)


def test_statistics_of_the_batch_cannot_be_folded():
    method, lines = iakd(teacher_bn="batch"), []
    before = norms(method)
    assert choose_form(method, batch(0, 8)[0], "auto", FP32, lines.append) == "plain" and norms(method) == before
    with pytest.raises(UserError, match="--teacher-form folded"):
        check_form(method, "folded")


def test_only_folded_can_be_wanted_where_the_teacher_does_not_run_as_a_whole():
    method = iakd()
    check_form(method, "folded")
    for wanted in ("fused", "compiled"):
        with pytest.raises(UserError, match="never runs the teacher as a whole"):
            check_form(method, wanted)


@pytest.mark.parametrize("wanted, name", [("folded", "folded"), ("fused", "fused"), ("plain", "plain")])
def test_with_kd_the_whole_teacher_has_its_form_too(wanted, name):
    method = iakd(kd_weight=0.5)
    before = norms(method)
    assert choose_form(method, batch(0, 8)[0], wanted, FP32, lambda line: None) == name
    assert isinstance(method.staged_views.get(method.teacher), TeacherForm) == (wanted != "plain")
    assert norms(method) == (0 if wanted != "plain" else before)


def test_in_a_sum():
    method = find_method("iakd+at")(net("resnet8"), net("resnet14", 1)).train()
    assert choose_form(method, batch(0, 8)[0], "folded", FP32, lambda line: None) == "folded"
    assert norms(method.methods["iakd"]) == 0
    folded_gates.unfold_gates(method)
    assert norms(method.methods["iakd"]) > 0


def test_weights_of_folded_blocks_are_cast_once():
    method, bf16 = iakd(), Precision("bfloat16", CPU)
    with teacher_form(method, lambda: batch(0, 8)[0], "folded", bf16, lambda line: None):
        step = Step(method, TrainOptions(lr=0.05, amp_dtype="bfloat16"), CPU)
        layers = [layer for gate in method.gates for layer in gate.teacher.modules() if isinstance(layer, nn.Conv2d)]
        assert layers and all(p.dtype == torch.bfloat16 for layer in layers for p in layer.parameters())
        for number in range(2):
            step(*batch(number, 8), (False,) * 3)
    assert all(p.dtype == torch.float32 for p in method.teacher.net.parameters())
