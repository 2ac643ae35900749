"""The sizes of stage outputs, found without touching the network."""

import copy

import torch

from fastkd.models import create_model, stage_shapes, staged


def test_sizes_are_those_of_the_features():
    net = create_model("wrn_16_1", 4)
    maps = staged(net).features(torch.zeros(1, 3, 32, 32))[1]
    assert stage_shapes(net, 32) == [tuple(x.shape[1:]) for x in maps] == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]


def test_the_network_stays_as_it_was():
    net = create_model("resnet8", 4).train()
    net.bn1.eval()
    before, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    stage_shapes(net)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert net.training and net.layer1.training and not net.bn1.training
    assert torch.equal(random, torch.get_rng_state())
