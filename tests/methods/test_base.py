"""The protocol: a frozen teacher, one forward pass per network and step, feature maps."""

import copy
from pathlib import Path

import pytest
import torch

from fastkd import Trainer, TrainOptions, create_model
from fastkd.methods import CE, DML, KD, ForwardCache, FrozenTeacher, Method


def test_frozen_stays_out_of_its_holder(tiny_net):
    method = KD(tiny_net(0), tiny_net(1)).train()
    teacher = method.teacher.net
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert all(name.startswith("student.") for name in method.state_dict())
    theirs = {id(p) for p in teacher.parameters()}
    assert not theirs & {id(p) for p in method.parameters()}
    assert not theirs & {id(p) for group in method.param_groups(0.1) for p in group["params"]}


def test_frozen_follows_to(tiny_net):
    method = KD(tiny_net(0), tiny_net(1)).to(torch.float64, memory_format=torch.channels_last)
    assert method.teacher.net.fc.weight.dtype == torch.float64
    assert method.teacher.net.conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_frozen_gives_no_gradient_and_keeps_its_bytes(tiny_net):
    frozen = FrozenTeacher(tiny_net())
    before = copy.deepcopy(frozen.net.state_dict())
    frozen.train()
    assert not frozen(torch.randn(2, 3, 8, 8, requires_grad=True)).requires_grad
    assert all(torch.equal(before[key], value) for key, value in frozen.net.state_dict().items())


def test_a_network_runs_once_a_step(tiny_net):
    net = tiny_net()
    calls = []
    net.register_forward_hook(lambda *_: calls.append(1))
    out = ForwardCache(torch.randn(2, 3, 8, 8), {})
    assert out(net) is out(net) and len(calls) == 1


def test_features_come_with_the_same_forward_pass():
    student, teacher = create_model("resnet8", 4), create_model("resnet14", 4)

    class Hint(Method):
        def __init__(self, student, teacher):
            super().__init__(student, teacher)
            self.request_features(student)
            self.request_features(self.teacher)

        def losses(self, out, target, plan):
            ours, theirs = out.features(self.student), out.features(self.teacher)
            return {"hint": (ours[-1] - theirs[-1]).square().mean() + out(self.student).sum() * 0}

    method = Hint(student, teacher)
    calls = []
    student.conv1.register_forward_hook(lambda *_: calls.append(1))
    terms = method(torch.randn(2, 3, 32, 32), torch.zeros(2).long())
    terms["hint"].backward()
    assert len(calls) == 1 and student.conv1.weight.grad is not None
    assert all(p.grad is None for p in teacher.parameters())
    assert all(name.startswith("student.") for name in method.state_dict())


def test_features_must_be_requested(tiny_net):
    with pytest.raises(ValueError, match=r"did not call request_features\(\) for TinyNet"):
        ForwardCache(torch.randn(2, 3, 8, 8), {}).features(tiny_net())


def test_extra_outputs_are_refused_by_name(tiny_net):
    class Two(torch.nn.Module):
        def forward(self, images):
            return images, images

    with pytest.raises(ValueError, match="Two returns tuple, but logits"):
        ForwardCache(torch.randn(2, 3, 8, 8), {})(Two())


def test_teacher_needed_or_refused(tiny_net):
    with pytest.raises(ValueError, match="KD needs a teacher"):
        KD(tiny_net(), None)
    with pytest.raises(ValueError, match="CE takes no teacher"):
        CE(tiny_net(), tiny_net(1))


@pytest.fixture
def captured(monkeypatch):
    """(events, images): what happens on which stream, as if a CUDA graph were captured; images to give a method."""
    events = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            events.append(f"{self.name} waits for {other.name}")

        def __enter__(self):
            current.append(self)

        def __exit__(self, *problem):
            current.pop()

    class Images(torch.Tensor):
        is_cuda = True

    current = [Stream("main")]
    streams = [current[0], *(Stream(f"side {number}") for number in range(3))]  # one of them may be in use
    monkeypatch.setattr(torch.cuda, "default_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[-1])
    monkeypatch.setattr("fastkd.methods.forwards._streams", lambda device: streams)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, to: events.append(f"kept for {to.name}"))

    def watch(**nets):
        for name, net in nets.items():
            net.register_forward_hook(lambda *_, name=name: events.append(f"{name} on {current[-1].name}"))

    return events, torch.randn(2, 3, 8, 8).as_subclass(Images), watch


def test_in_a_capture_the_teacher_runs_beside_the_student(tiny_net, captured):
    """Both are enqueued before a result of either is used, in whichever order the losses ask for them."""
    events, images, watch = captured
    student, teacher = tiny_net(0), tiny_net(1)
    watch(student=student, teacher=teacher)
    method = KD(student, teacher)
    wanted = ["side 0 waits for main", "teacher on side 0", "student on main", "main waits for side 0"]
    for losses in (
        lambda out, target, plan: {"x": out(method.teacher).sum() + out(student).sum()},  # as in SOKD
        lambda out, target, plan: {"x": out(student).sum()},  # joined at the end, or the capture would be invalid
    ):
        method.losses = losses
        method(images, None)
        assert events == [*wanted, "kept for main"]
        events.clear()


@pytest.mark.parametrize("plan", [None, 0, 2])
def test_in_a_capture_peers_run_beside_the_student(plan, tiny_net, captured):
    events, images, watch = captured
    nets = [tiny_net(number) for number in range(3)]
    watch(student=nets[0], peer1=nets[1], peer2=nets[2])
    method = DML(nets[0], None, DML.Options(alternate=plan is not None), nets[1:])
    sum(method(images, torch.zeros(2, dtype=torch.long), plan).values()).backward()
    assert events[:5] == ["side 0 waits for main", "peer1 on side 0", "side 1 waits for main", "peer2 on side 1",
                          "student on main"]  # fmt: skip
    assert events[5:] == ["main waits for side 0", "kept for main", "main waits for side 1", "kept for main"]
    for number, net in enumerate(nets):  # the networks that are not trained now run without a gradient
        assert (next(net.parameters()).grad is not None) == (plan in (None, number))


def test_a_lone_network_starts_nothing(tiny_net, captured):
    events, images, watch = captured
    student = tiny_net()
    watch(student=student)
    CE(student)(images, torch.zeros(2, dtype=torch.long))
    assert events == ["student on main"]


def test_the_method_of_the_documentation_trains(tiny_net, tiny_loaders, tmp_path):
    text = (Path(__file__).parents[2] / "docs/method-protocol.md").read_text()
    names = {}
    exec(text.split("```python\n")[1].split("```")[0], names)
    options = TrainOptions(epochs=1, lr=0.01, out=str(tmp_path / "run"))
    result = Trainer(names["LogitMSE"](tiny_net(0), tiny_net(1)), *tiny_loaders(), options).fit()
    assert result.history[0]["mse"] > 0
