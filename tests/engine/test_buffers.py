"""BatchNorm buffers in one block: the network does not notice. (test_step.py: a bad step is undone.)"""

import copy

import torch
from safetensors.torch import load, save

from fastkd import create_model
from fastkd.engine.batched import join_buffers

CPU = torch.device("cpu")


def test_the_network_does_not_notice():
    plain = create_model("resnet8", 4)
    moved = copy.deepcopy(plain)
    joined = join_buffers(moved, CPU)
    images = torch.randn(4, 3, 16, 16)
    for net in (plain, moved):
        for _ in range(2):
            net.train()(images)
    assert moved.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in moved.state_dict().items())
    assert torch.equal(plain.eval()(images), moved.eval()(images))
    assert joined.abs().sum() > 0
    assert load(save(moved.state_dict())).keys() == plain.state_dict().keys()


def test_what_is_copied_into_the_block_is_in_the_network(tiny_net):
    net = tiny_net()
    joined = join_buffers(net, CPU)
    saved, before = joined.clone(), net.bn.running_mean.clone()
    net.bn.running_mean.fill_(float("nan"))
    assert not joined.isfinite().all()
    joined.copy_(saved)
    assert torch.equal(net.bn.running_mean, before)


def test_a_network_without_buffers_has_an_empty_block_on_its_device():
    joined = join_buffers(torch.nn.Linear(2, 2, device="meta"), torch.device("meta"))
    assert joined.numel() == 0 and joined.device.type == "meta"
