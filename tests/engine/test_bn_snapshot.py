"""BatchNorm buffers in one block: the network does not notice, and a bad step is undone."""

import copy

import torch
from safetensors.torch import load, save

from fastkd import create_model
from fastkd.engine.bn_snapshot import BatchNormSnapshot


def test_the_network_does_not_notice():
    plain = create_model("resnet8", 4)
    moved = copy.deepcopy(plain)
    snapshot = BatchNormSnapshot(moved)
    images = torch.randn(4, 3, 16, 16)
    for net in (plain, moved):
        for _ in range(2):
            net.train()(images)
    assert moved.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in moved.state_dict().items())
    assert torch.equal(plain.eval()(images), moved.eval()(images))
    assert snapshot.flat.abs().sum() > 0
    assert load(save(moved.state_dict())).keys() == plain.state_dict().keys()


def test_restored_only_if_bad(tiny_net):
    net = tiny_net()
    before = net.bn.running_mean.clone()
    snapshot = BatchNormSnapshot(net)
    for bad in (True, False):
        snapshot.save()
        net.bn.running_mean.fill_(float("nan") if bad else 7.0)
        snapshot.restore_if(torch.tensor(bad))
        assert torch.equal(net.bn.running_mean, before if bad else torch.full_like(before, 7.0))


def test_a_network_without_buffers():
    snapshot = BatchNormSnapshot(torch.nn.Linear(2, 2))
    snapshot.save()
    snapshot.restore_if(torch.tensor(True))
    assert snapshot.flat.numel() == 0
