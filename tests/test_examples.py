"""The scripts in examples/ run, and the student learns."""

import sys
from pathlib import Path

import numpy
import pytest
import torch


@pytest.fixture(autouse=True)
def _examples_importable(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "examples")
    yield
    for name in ("plain_loop", "timm_loop"):
        sys.modules.pop(name, None)


def test_plain_loop(tiny_net, tiny_loaders):
    import plain_loop

    batches = list(tiny_loaders(samples=48)[0])
    history = plain_loop.train(tiny_net(0), tiny_net(1), batches, epochs=6)
    assert history[-1] < history[0]


def test_timm_loop():
    import timm_loop

    torch.manual_seed(0)
    numpy.random.seed(0)  # timm's mixup draws from it
    labels = torch.randint(3, (8,))
    batches = [(torch.randn(8, 3, 32, 32) + labels[:, None, None, None], labels)] * 4
    history = timm_loop.train(batches, classes=3, student="resnet10t", teacher="resnet10t", epochs=10)
    assert history[-1] < 0.8 * history[0]
