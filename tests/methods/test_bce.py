"""--loss bce: timm's binary cross-entropy in the place of the term `ce`."""

import pytest
import torch
from timm.loss import BinaryCrossEntropy

from fastkd.engine import TrainOptions
from fastkd.engine.mixup import Mixup
from fastkd.errors import UserError
from fastkd.methods import METHODS, find_method
from fastkd.methods.base import binary_cross_entropy

CLASSES = 4
TAKING = [name for name, kind in METHODS.items() if kind.takes_bce]


@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.2])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("mixes", [False, True])
def test_it_is_timms_for_labels_and_mixed_targets(threshold, smoothing, mixes):
    torch.manual_seed(0)
    logits = torch.randn(8, CLASSES, dtype=torch.float64, requires_grad=True)
    labels, images = torch.randint(CLASSES, (8,)), torch.randn(8, 3, 6, 6)
    ours = Mixup(0.3 * mixes, 1.0 * mixes, smoothing, CLASSES)(images, labels, 0, torch.arange(8))[1]
    theirs = BinaryCrossEntropy(smoothing, threshold if threshold >= 0 else None)
    wanted = theirs(logits, ours.double() if mixes else labels)
    found = binary_cross_entropy(logits, ours, threshold)
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=0)
    grads = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (found, wanted)]
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-9)


def method(name, tiny_net):
    kind = find_method(name)
    return kind(tiny_net(0), tiny_net(1) if kind.needs_teacher else None)


@pytest.mark.parametrize("name", ["ce", "kd", "hardkd", "dkd", "dist", "kd+dkd"])
def test_the_term_ce_alone_becomes_it(name, tiny_net):
    images, target = torch.randn(6, 3, 8, 8), torch.arange(6) % CLASSES
    made = method(name, tiny_net).eval()
    before = made(images, target)
    made.set_label_loss("bce", 0.2)
    after = made(images, target)
    weight = before["ce"] / torch.nn.functional.cross_entropy(made.student(images), target)
    wanted = weight * BinaryCrossEntropy(0.0, 0.2)(made.student(images), target)
    torch.testing.assert_close(after.pop("ce"), wanted)
    for term, value in after.items():
        torch.testing.assert_close(value, before[term])
    made.set_label_loss("ce")
    torch.testing.assert_close(made(images, target), before)


def test_which_methods_take_it():
    assert {*TAKING} == {"ce", "kd", "hardkd", "dkd", "dist", "fitnet", "at", "ft", "ofd", "rkd", "sp"}
    assert find_method("kd+at").takes_bce and not find_method("kd+iakd").takes_bce


def test_others_refuse_it(tiny_net):
    kind = find_method("dml")
    with pytest.raises(UserError, match="--loss bce: the cross-entropy of DML is part of its own loss; use kd"):
        kind(tiny_net(0), None, None, [tiny_net(1)]).set_label_loss("bce")


def test_unlabelled_images_refuse_it(tiny_net):
    first, second = method("kd", tiny_net), method("kd", tiny_net)
    first.allow_unlabelled()
    second.set_label_loss("bce")
    for call in (lambda: first.set_label_loss("bce"), second.allow_unlabelled):
        with pytest.raises(UserError, match="--loss bce and --unlabelled"):
            call()


def test_the_threshold_is_for_it():
    with pytest.raises(UserError, match="--bce-target-thresh 0.2 is for --loss bce, got --loss ce"):
        TrainOptions(bce_target_thresh=0.2)
