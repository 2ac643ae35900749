"""Accuracy against a count by hand."""

import pytest
import torch

from fastkd.engine.precision import Precision
from fastkd.evaluate import evaluate, speed

CPU32 = Precision("float32", torch.device("cpu"))


@pytest.mark.parametrize("batch_size", [1, 5, 17, 64])
def test_each_image_counts_once(tiny_net, tiny_loaders, batch_size):
    net, loader = tiny_net(), tiny_loaders()[1]
    loader.batch_size = batch_size
    logits = net.eval()(loader.images)
    scores = evaluate(net.train(), loader, CPU32)
    assert net.training and scores["images"] == 17 and scores["top5"] == 100
    assert scores["top1"] == pytest.approx(100 * (logits.argmax(1) == loader.target).double().mean().item())
    want = -logits.log_softmax(1)[torch.arange(17), loader.target].double().mean().item()
    assert scores["loss"] == pytest.approx(want, rel=1e-5)


def test_top5_counts_the_five_best(tiny_net, tiny_loaders):
    loader = tiny_loaders()[1]
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 64, 9))
    ranks = net(loader.images.contiguous()).argsort(1, descending=True)
    want = (ranks[:, :5] == loader.target[:, None]).any(1).double().mean().item()
    assert evaluate(net, loader, CPU32)["top5"] == pytest.approx(100 * want)


def test_speed_is_images_per_second(tiny_net, tiny_loaders):
    assert speed(tiny_net(), tiny_loaders()[1], CPU32, seconds=0.05) > 100
