"""The worked examples of the README run, and the student learns."""

import torch
from examples import plain_loop, timm_loop


def test_plain_loop(tiny_net, tiny_loaders):
    batches = list(tiny_loaders(samples=48)[0])
    history = plain_loop.train(tiny_net(0), tiny_net(1), batches, epochs=6)
    assert history[-1] < history[0]


def test_timm_loop():
    torch.manual_seed(0)
    labels = torch.randint(3, (8,))
    batches = [(torch.randn(8, 3, 32, 32) + labels[:, None, None, None], labels)] * 2
    history = timm_loop.train(batches, classes=3, student="resnet10t", teacher="resnet10t", epochs=3)
    assert history[-1] < history[0]
