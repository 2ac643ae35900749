"""--sync-bn in one process, as if there were several: two processes are in tests/faults/test_processes.py."""

import copy

import pytest
import torch
from torch import nn

from fastkd import TrainOptions, distributed
from fastkd.engine.launch import check_graph, compiles
from fastkd.engine.step import Step
from fastkd.engine.sync_batch_norm import SyncedNorm, synchronise
from fastkd.errors import UserError
from fastkd.methods import CE

CPU = torch.device("cpu")


@pytest.fixture
def several(monkeypatch):
    """Two processes with equal images: what is gathered is this one's twice."""
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_gather", lambda tensor: torch.stack([tensor, tensor]))
    monkeypatch.setattr(distributed, "all_reduce_sum", lambda tensor: 2 * tensor)


class Net(nn.Module):
    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norm, self.weight = norm, nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.norm(x) * self.weight


def timm_norm(channels: int) -> nn.Module:
    return pytest.importorskip("timm.layers").BatchNormAct2d(channels)


@pytest.mark.parametrize(
    "norm, shape",
    [
        (nn.BatchNorm2d(5), (4, 5, 6, 6)),
        (nn.BatchNorm1d(5), (8, 5)),
        (nn.BatchNorm1d(5), (8, 5, 3)),
        (nn.BatchNorm2d(5, affine=False), (4, 5, 6, 6)),
        (nn.BatchNorm2d(5, momentum=None), (4, 5, 6, 6)),
        (nn.BatchNorm2d(5, track_running_stats=False), (4, 5, 6, 6)),
        (timm_norm, (4, 5, 6, 6)),
    ],
)
def test_twice_the_images_of_one_process(several, norm, shape):
    """The layer on a batch and its copy is torch's layer on both: values, gradients, statistics, names, eval mode."""
    torch.manual_seed(0)
    net = CE(Net(norm(5) if norm is timm_norm else norm)).double()
    plain = copy.deepcopy(net).student.norm
    synchronise(net)
    ours = net.student.norm
    assert isinstance(ours, SyncedNorm) and isinstance(ours, type(plain))
    copied = copy.deepcopy(ours)  # as the average of the weights is
    assert ours.state_dict().keys() == plain.state_dict().keys() == copied.state_dict().keys()
    x, weights = (3 + 100 * torch.randn(shape, dtype=torch.float64) for _ in range(2))
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    for _ in range(2):
        y, both = ours(mine), plain(torch.cat([theirs, theirs]))
        torch.testing.assert_close(y, both[: len(x)])
        (y * weights).sum().backward()
        (both[: len(x)] * weights).sum().backward(retain_graph=True)
        (both[len(x) :] * weights).sum().backward()
    torch.testing.assert_close(2 * mine.grad, theirs.grad)  # the other process adds as much
    for one, two in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(2 * one.grad, two.grad)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value)
    torch.testing.assert_close(ours.eval()(x), plain.eval()(x))


def test_a_small_variance_beside_a_large_mean(several):
    """In fp32: a difference of sums of squares would leave nothing of it."""
    net = CE(Net(nn.BatchNorm2d(2)))
    synchronise(net)
    x = 1000 + 0.1 * torch.randn(8, 2, 4, 4)
    want = nn.BatchNorm2d(2)(torch.cat([x, x]).double().float())[:8]
    torch.testing.assert_close(net.student.norm(x), want, rtol=1e-2, atol=1e-2)


def test_one_process_keeps_its_layers():
    net = CE(Net(nn.BatchNorm2d(2)))
    Step(net, TrainOptions(sync_bn=True), CPU)
    assert type(net.student.norm) is nn.BatchNorm2d


def test_a_layer_with_a_forward_of_its_own_is_refused(several):
    class Odd(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(2 * x)

    with pytest.raises(UserError, match="student.norm is a Odd"):
        synchronise(CE(Net(Odd(2))))


@pytest.mark.parametrize("options", [{"grad_accum": 2}, {"compile": "on"}])
def test_what_it_excludes(options):
    with pytest.raises(UserError, match="--sync-bn and --"):
        TrainOptions(sync_bn=True, **options)


def test_its_steps_are_neither_captured_nor_compiled(several):
    cuda, options = torch.device("cuda"), TrainOptions(sync_bn=True)
    with pytest.raises(UserError, match="--graph on: --sync-bn"):
        check_graph("on", options, cuda)
    assert not compiles(CE(Net(nn.BatchNorm2d(2))), options, cuda, 10**6, print)
