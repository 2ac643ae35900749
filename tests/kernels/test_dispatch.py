"""Which way a call goes: past torch's dispatcher where nobody watches, else as the registered operator."""

import pytest
import torch
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

LOSSES = {
    "attention_transfer": lambda m, z, y: attention_transfer(m[0], m[1]),
    "dist_loss": lambda m, z, y: dist_loss(z[0], z[1]),
    "dkd_loss": lambda m, z, y: dkd_loss(z[0], z[1], y),
    "factor_distance": lambda m, z, y: factor_distance(m[:1], m[1], [1.0]).loss,
    "logit_loss": lambda m, z, y: logit_loss(z, y, [1.0, 0.0], [[0.0, 1.0], [0.0, 0.0]]).loss,
    "logit_loss of two": lambda m, z, y: kd_loss(z[0], z[1], y).loss,
    "map_distance": lambda m, z, y: hint_distance(m[0], m[1]),
    "map_distance with a margin": lambda m, z, y: overhaul_distance(m[0], m[1], torch.full((3,), -1.0)),
}
each_loss = pytest.mark.parametrize("name", LOSSES)


def gradients(name):
    g = torch.Generator().manual_seed(0)
    maps, logits = torch.randn(2, 4, 3, 2, 2, generator=g), torch.randn(2, 4, 5, generator=g)
    student = [x[0].clone().requires_grad_() for x in (maps, logits)]
    m, z = ([x, both[1]] for x, both in zip(student, (maps, logits), strict=True))
    LOSSES[name](m, z, torch.tensor([0, 1, 2, 4])).backward()
    return [x.grad for x in student if x.grad is not None]


class Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.add(function.name())
        return function(*args, **(kwargs or {}))


@each_loss
def test_who_watches_sees_the_operators(name):
    with Watch() as watch:
        watched = gradients(name)
    op = "fastkd::" + name.split()[0]
    assert {seen for seen in watch.seen if seen.startswith("fastkd::")} == {op, op + "_backward"}
    torch.testing.assert_close(watched, gradients(name))


@each_loss
def test_an_eager_call_takes_no_way_through_the_operators(name, monkeypatch):
    def refuse(op, *_args, **_options):
        raise AssertionError(f"{op} was called")

    monkeypatch.setattr(type(_map_distance), "__call__", refuse)
    assert gradients(name)
