"""Which way a call goes: past torch's dispatcher where nobody watches, else as the registered operator."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastkd.kernels import (
    attention_transfer,
    dist_loss,
    dkd_loss,
    factor_distance,
    hint_distance,
    kd_loss,
    logit_loss,
    overhaul_distance,
)
from fastkd.kernels.map_distance import _map_distance

MAPS, LOGITS = (4, 3, 2, 2), (4, 5)
LOSSES = {  # of a student, a teacher, and labels or a margin
    "attention_transfer": (MAPS, lambda s, t, _: attention_transfer(s, t)),
    "dist_loss": (LOGITS, lambda s, t, _: dist_loss(s, t)),
    "dkd_loss": (LOGITS, lambda s, t, y: dkd_loss(s, t, y)),
    "factor_distance": (MAPS, lambda s, t, _: factor_distance([s], t, [1.0]).loss),
    "logit_loss": (LOGITS, lambda s, t, y: logit_loss([s, t], y, [1.0, 0.0], [[0.0, 1.0], [0.0, 0.0]]).loss),
    "logit_loss of two": (LOGITS, lambda s, t, y: kd_loss(s, t, y).loss),
    "map_distance": (MAPS, lambda s, t, _: hint_distance(s, t)),
    "map_distance with a margin": (MAPS, lambda s, t, margin: overhaul_distance(s, t, margin)),
}
each_loss = pytest.mark.parametrize("name", LOSSES)


def case(name, device="cpu"):
    """(the loss, its three arguments)"""
    shape, loss = LOSSES[name]
    student, teacher = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    third = torch.arange(4) if shape == LOGITS else torch.full((3,), -1.0)
    return loss, student.clone().requires_grad_(), teacher, third.to(device)


def gradient(name):
    loss, student, *others = case(name)
    return torch.autograd.grad(loss(student, *others), student)[0]


class Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "fastkd":
            self.seen.add(function.name())
        return function(*args, **(kwargs or {}))


@each_loss
def test_who_watches_sees_the_operators(name):
    with Watch() as watch:
        watched = gradient(name)
    op = "fastkd::" + name.split()[0]
    assert watch.seen == {op, op + "_backward"}
    torch.testing.assert_close(watched, gradient(name))


@each_loss
def test_who_watches_the_backward_pass_alone_sees_its_operator(name):
    loss, student, *others = case(name)
    value = 2 * loss(student, *others)
    with Watch() as watch:
        watched = torch.autograd.grad(value, student)[0]
    assert watch.seen == {"fastkd::" + name.split()[0] + "_backward"}
    torch.testing.assert_close(watched, 2 * gradient(name))


@each_loss
def test_an_eager_call_takes_no_way_through_the_operators(name, monkeypatch):
    def refuse(op, *_args, **_options):
        raise AssertionError(f"{op} was called")

    monkeypatch.setattr(type(_map_distance.op), "__call__", refuse)
    assert gradient(name).abs().sum() > 0


@each_loss
def test_a_tracer_before_dispatch_sees_the_operator(name):
    loss, student, *others = case(name)
    graph = make_fx(lambda x: loss(x, *others), pre_dispatch=True)(student.detach()).graph
    assert f"fastkd.{name.split()[0]}.default" in [str(node.target) for node in graph.nodes]


@each_loss
def test_tensors_without_data(name):
    loss, student, *others = case(name, "meta")
    value = loss(student, *others)
    assert value.shape == () and value.is_meta
    assert torch.autograd.grad(value, student)[0].shape == student.shape


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@each_loss
def test_a_loss_may_be_changed_in_place(name, device):
    loss, student, *others = case(name, device)
    value = loss(student, *others)
    value /= 4
    torch.testing.assert_close(torch.autograd.grad(value, student)[0].cpu(), gradient(name) / 4)


class Stop(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, gradient):
        return None


@each_loss
def test_nothing_from_above_is_no_gradient(name):
    loss, student, *others = case(name)
    Stop.apply(loss(student, *others)).backward()
    assert student.grad is None or not student.grad.any()


@each_loss
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_subclass_from_above(name):
    loss, student, *others = case(name)
    two = TwoTensor(torch.tensor(2.0), torch.tensor(2.0))
    got = torch.autograd.grad(loss(student, *others) * two, student)[0]
    torch.testing.assert_close(got.a if isinstance(got, TwoTensor) else got, 2 * gradient(name))


@pytest.mark.parametrize("name", ["attention_transfer", "dist_loss"])
def test_a_batch_of_gradients(name):
    loss, student, *others = case(name)
    value = loss(student, *others)
    batch = torch.autograd.grad(value, student, torch.tensor([1.0, 2.0]), is_grads_batched=True)[0]
    torch.testing.assert_close(batch, torch.stack([gradient(name), 2 * gradient(name)]))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_dist_of_a_batch_of_batches():
    loss, student, teacher, _ = case("dist_loss")
    two = torch.func.vmap(dist_loss)(torch.stack([student, 2 * student]), torch.stack([teacher, teacher]))
    torch.testing.assert_close(two, torch.stack([dist_loss(student, teacher), dist_loss(2 * student, teacher)]))
