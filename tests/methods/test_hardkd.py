"""HardKD against its formula, through the protocol."""

import pytest
import torch
import torch.nn.functional as F

from fastkd.methods import CE
from fastkd.methods.hardkd import HardKD, HardKDOptions


@torch.no_grad()
def nets_and_batch(tiny_net):
    generator = torch.Generator().manual_seed(0)
    images, target = torch.randn(6, 3, 8, 8, dtype=torch.float64, generator=generator), torch.arange(6) % 4
    teacher = tiny_net(1).double()
    teacher.fc.bias -= teacher.eval()(images).mean(0)  # or it would choose one class for all images
    return tiny_net(0).double(), teacher, images, target


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_terms_are_the_formula(tiny_net, smoothing):
    """Smoothed labels leave the teacher's label as it is."""
    student, teacher, images, target = nets_and_batch(tiny_net)
    y = F.one_hot(target, 4).double() * (1 - smoothing) + smoothing / 4
    terms = HardKD(student, teacher, HardKDOptions(ce_weight=0.25, hard_weight=0.6))(images, y if smoothing else target)
    log_p = F.log_softmax(student(images), dim=1)
    chosen = teacher.eval()(images).argmax(1)
    assert len(chosen.unique()) > 1 and not torch.equal(chosen, target)
    torch.testing.assert_close(terms["ce"], -0.25 * (y * log_p).sum(1).mean())
    torch.testing.assert_close(terms["hard"], -0.6 * log_p[torch.arange(6), chosen].mean())


def test_the_weights_are_the_papers():
    assert (HardKDOptions().ce_weight, HardKDOptions().hard_weight) == (0.5, 0.5)


def test_a_teacher_that_is_right_is_plain_training(tiny_net):
    student, teacher, images, _ = nets_and_batch(tiny_net)
    target = teacher.eval()(images).argmax(1)
    torch.testing.assert_close(
        sum(HardKD(student, teacher)(images, target).values()), sum(CE(student)(images, target).values())
    )


def test_nothing_to_learn_is_refused():
    with pytest.raises(ValueError, match="--ce-weight, --hard-weight are all 0"):
        HardKDOptions(ce_weight=0.0, hard_weight=0.0)
