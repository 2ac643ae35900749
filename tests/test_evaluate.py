"""Accuracy against a count by hand."""

import pytest
import torch

from fastkd import distributed
from fastkd.engine.precision import Precision
from fastkd.errors import UserError
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


class Caching(torch.nn.Module):
    """Keeps in eval mode what it computes from its weights, as LeViT does with its attention biases."""

    def __init__(self, net):
        super().__init__()
        self.net, self.bias, self.kept = net, torch.nn.Parameter(torch.zeros(4)), None

    def train(self, mode=True):
        self.kept = None if mode else self.kept
        return super().train(mode)

    def forward(self, x):
        if not self.training and self.kept is None:
            self.kept = self.bias.detach().clone()
        return self.net(x) + (self.bias if self.training else self.kept)


def test_what_a_network_keeps_in_eval_mode_is_computed_again(tiny_net, tiny_loaders):
    net, loader = Caching(tiny_net()).eval(), tiny_loaders()[1]
    evaluate(net, loader, CPU32)
    net.bias.data[2] = 100.0  # an average of weights changes so, and its copy is never in train mode
    scores = evaluate(net, loader, CPU32)
    assert scores["top1"] == pytest.approx(100 * (loader.target == 2).double().mean().item())


def test_top5_counts_the_five_best(tiny_net, tiny_loaders):
    loader = tiny_loaders()[1]
    loader.classes = tuple("abcdefghi")
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 64, 9))
    ranks = net(loader.images.contiguous()).argsort(1, descending=True)
    want = (ranks[:, :5] == loader.target[:, None]).any(1).double().mean().item()
    assert evaluate(net, loader, CPU32)["top5"] == pytest.approx(100 * want)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_images_without_finite_logits_are_counted_and_are_wrong(tiny_net, tiny_loaders, value):
    """Whatever their label: torch's topk takes NaN for the largest logit."""
    net, loader = tiny_net(), tiny_loaders()[1]
    good = net.eval()(loader.images).argmax(1) == loader.target
    bad = loader.target == 2
    loader.images[bad, 1, 3, 3] = value
    scores = evaluate(net, loader, CPU32)
    assert scores["nonfinite"] == bad.sum().item() > 0
    assert scores["top1"] == pytest.approx(100 * (good & ~bad).double().mean().item())
    assert scores["top5"] == pytest.approx(100 * (~bad).double().mean().item())


def test_speed_is_images_per_second(tiny_net, tiny_loaders):
    assert speed(tiny_net(), tiny_loaders()[1], CPU32, seconds=0.05) > 100


def batches(count: int, label: int = 0, **more):
    """A loader of `count` batches of 4 images; `label` is that of the last image."""
    target = torch.tensor([0, 1, 2, label])
    kind = type("Loader", (list,), more)
    return kind([(torch.zeros(4, 3, 8, 8), target)] * count)


@pytest.mark.parametrize("label", [-100, -1, 4, 1000])
def test_labels_that_are_no_class_are_an_error(tiny_net, label):
    with pytest.raises(UserError, match="2 of the 8 evaluation labels are none of the classes"):
        evaluate(tiny_net(), batches(2, label), CPU32)


def test_fewer_batches_than_the_length_are_an_error(tiny_net):
    loader = batches(2, __len__=lambda self: 3)
    with pytest.raises(UserError, match="gave 2 batches, but its length is 3"):
        evaluate(tiny_net(), loader, CPU32)


def test_another_number_of_classes_is_an_error(tiny_net):
    with pytest.raises(UserError, match="TinyNet has 4 outputs and the evaluation loader 10 classes"):
        evaluate(tiny_net(), batches(2, classes=tuple("0123456789")), CPU32)


@pytest.mark.parametrize(
    "target", [torch.eye(4), torch.zeros(4, 1).long(), torch.zeros(4), torch.zeros(4).int()], ids=str
)
def test_labels_that_are_no_indices_are_an_error(tiny_net, target):
    with pytest.raises(UserError, match="accuracy needs one class index per image"):
        evaluate(tiny_net(), [(torch.zeros(4, 3, 8, 8), target)], CPU32)


@pytest.mark.parametrize("output", [(torch.zeros(4, 4), 1), torch.zeros(4, 4, 1), {"logits": 1}], ids=type)
def test_a_network_that_returns_no_logits_is_named(output):
    net = torch.nn.Module()
    net.forward = lambda images: output
    with pytest.raises(UserError, match=r"Module returns .* but logits \[images, classes\] are needed"):
        evaluate(net, batches(1), CPU32)


def test_labels_of_another_number_of_images_are_an_error(tiny_net):
    with pytest.raises(UserError, match="3 labels for 4 images"):
        evaluate(tiny_net(), [(torch.zeros(4, 3, 8, 8), torch.zeros(3).long())], CPU32)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_an_evaluation_that_is_stopped_in_any_process_ends_in_all(tiny_net, tiny_loaders, monkeypatch, elsewhere):
    """`elsewhere`: it is another process that is stopped."""
    if elsewhere:
        monkeypatch.setattr(distributed, "gather", lambda stopped: [stopped, True])
    asked = []
    stop = lambda: bool(asked.append(1)) or not elsewhere  # noqa: E731
    assert evaluate(tiny_net(), tiny_loaders()[1], Precision("float32", torch.device("cpu")), stop) == {}
    assert len(asked) == (3 if elsewhere else 1)


def test_images_of_another_number_format_are_named(tiny_net, tiny_loaders):
    loader = tiny_loaders()[1]
    loader.images = loader.images.double()
    with pytest.raises(UserError, match=r"images are torch.float64 and the weights torch.float32: .* by \.float\(\)$"):
        evaluate(tiny_net(), loader, CPU32)
