"""The examples run, and the student learns."""

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy
import torch


def example(name: str) -> ModuleType:
    path = Path(__file__).parent.parent / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_plain_loop(tiny_net, tiny_loaders):
    batches = list(tiny_loaders(samples=48)[0])
    history = example("plain_loop").train(tiny_net(0), tiny_net(1), batches, epochs=6)
    assert history[-1] < history[0]


def test_timm_loop():
    torch.manual_seed(0)
    numpy.random.seed(0)  # timm's mixup draws from it
    labels = torch.randint(3, (8,))
    batches = [(torch.randn(8, 3, 32, 32) + labels[:, None, None, None], labels)] * 4
    history = example("timm_loop").train(batches, classes=3, student="resnet10t", teacher="resnet10t", epochs=10)
    assert history[-1] < 0.8 * history[0]
