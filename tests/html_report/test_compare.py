"""The pass over the validation images: predictions, and the images that two networks see most differently."""

import pytest
import torch
from torch import nn

from fastkd.engine.precision import Precision
from fastkd.evaluate import evaluate
from fastkd.html_report import compare as module
from fastkd.html_report.compare import IMAGES, SIDE, Comparison, compare
from fastkd.methods.frozen import FrozenTeacher

CPU = Precision("float32", torch.device("cpu"))


@pytest.fixture
def pair(tiny_net):
    """A student in train mode and a frozen teacher, with logits that differ clearly."""
    nets = {"student": tiny_net(0), "teacher": FrozenTeacher(tiny_net(1))}
    for net in (nets["student"], nets["teacher"].net):
        net.fc.weight.data *= 8
    return nets


@pytest.fixture
def loader(tiny_loaders):
    return tiny_loaders()[1]


def probabilities(nets, images):
    with torch.no_grad():
        return [net.eval()(images).softmax(1) for net in nets.values()]


def test_it_finds_what_one_batch_of_all_images_shows(pair, loader):
    found = compare(pair, loader, CPU)
    p, q = probabilities(pair, loader.images)
    difference = (p - q).abs().sum(1) / 2
    best = difference.argsort(descending=True)[:IMAGES]
    assert 0 < len(best) < len(difference)
    torch.testing.assert_close(found.shown.difference, difference[best])
    torch.testing.assert_close(found.shown.pixels, loader.images[best])
    assert torch.equal(found.shown.target, loader.target[best])
    assert torch.equal(found.target, loader.target)
    assert torch.equal(found.predictions, torch.stack([p.argmax(1), q.argmax(1)]))
    for place, each in enumerate((p, q)):
        top = each[best].topk(3)
        torch.testing.assert_close(found.shown.probabilities[:, place], top.values)
        assert torch.equal(found.shown.classes[:, place], top.indices)
    assert found.agreement == pytest.approx(100 * (p.argmax(1) == q.argmax(1)).double().mean().item())


def test_its_accuracy_is_that_of_the_evaluation_and_modes_stay(pair, loader):
    pair["student"].train()
    found = compare(pair, loader, CPU)
    assert pair["student"].training and not pair["teacher"].net.training
    for place, net in enumerate(pair.values()):
        assert found.top1(place) == pytest.approx(evaluate(net, loader, CPU)["top1"])


def test_alone_an_image_counts_by_what_its_class_lacks(pair, loader):
    del pair["teacher"]
    found = compare(pair, loader, CPU)
    lacking = 1 - probabilities(pair, loader.images)[0].gather(1, loader.target[:, None])[:, 0]
    torch.testing.assert_close(found.shown.difference, lacking.sort(descending=True).values[:IMAGES])
    assert found.shown.probabilities.shape == (IMAGES, 1, 3)


class Part:
    """Some of the batches of a loader."""

    def __init__(self, loader, start, stop):
        self.batches = list(loader)[start:stop]

    def __iter__(self):
        return iter(self.batches)


def as_processes(monkeypatch, *loaders, nets, stops=(False, False, False)):
    """What the last of several processes gets, one for each of `loaders`."""
    parts = []

    def gather(mine):
        parts.append(mine)
        return list(parts)

    monkeypatch.setattr(module.distributed, "gather", gather)
    return [compare(nets, each, CPU, lambda stop=stop: stop) for each, stop in zip(loaders, stops, strict=False)][-1]


def test_processes_with_a_part_of_the_images_each_find_the_same(pair, loader, monkeypatch):
    whole = compare(pair, loader, CPU)
    joined = as_processes(monkeypatch, Part(loader, 0, 2), Part(loader, 3, 3), Part(loader, 2, 3), nets=pair)
    assert torch.equal(joined.predictions, whole.predictions) and torch.equal(joined.target, whole.target)
    for one, two in zip(joined.shown, whole.shown, strict=True):
        torch.testing.assert_close(one, two)


class Broken(nn.Module):
    def forward(self, images):
        raise RuntimeError("out of memory\nwith more lines")


def test_a_failure_in_one_process_is_the_reason_in_all(pair, loader, monkeypatch):
    parts = [compare(pair | {"teacher": Broken()}, loader, CPU)]
    assert parts == ["RuntimeError: out of memory"] and pair["student"].training
    monkeypatch.setattr(module.distributed, "gather", lambda mine: [*parts, mine])
    assert compare(pair, loader, CPU) == "RuntimeError: out of memory"


def test_a_signal_in_one_process_ends_it_in_all(pair, loader, monkeypatch):
    asked = as_processes(monkeypatch, loader, loader, nets=pair, stops=(True, False))
    assert asked == "a signal ended the pass over the validation images"


def test_no_images(pair):
    assert compare(pair, [], CPU) == "there are no validation images"


def test_large_images_are_reduced(pair):
    images = torch.rand(2, 3, 3 * SIDE, 2 * SIDE)
    images[1] = 0.25
    found = compare(pair, [(images, torch.tensor([0, 1]))], CPU)
    assert isinstance(found, Comparison) and found.shown.pixels.shape == (2, 3, SIDE, round(SIDE * 2 / 3))
    grey = found.shown.pixels[found.shown.target == 1]
    torch.testing.assert_close(grey, torch.full_like(grey, 0.25))
