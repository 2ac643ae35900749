"""KD against its formula, through the protocol."""

import pytest
import torch
import torch.nn.functional as F

from fastkd.methods import CE, KD, METHODS
from fastkd.methods.kd import KDOptions


def test_terms_are_the_formula(tiny_net):
    student, teacher = tiny_net(0).double(), tiny_net(1).double()
    images, target = torch.randn(6, 3, 8, 8, dtype=torch.float64), torch.arange(6) % 4
    terms = KD(student, teacher, KDOptions(temperature=3.0, ce_weight=0.25, kd_weight=0.5))(images, target)
    p_t = F.softmax(teacher.eval()(images) / 3, dim=1)
    log_p_s = F.log_softmax(student(images) / 3, dim=1)
    kl = (p_t * (p_t.log() - log_p_s)).sum(1).mean()
    torch.testing.assert_close(terms["ce"], 0.25 * F.cross_entropy(student(images), target))
    torch.testing.assert_close(terms["kd"], 0.5 * 9 * kl)


def test_without_the_teacher_term_it_is_plain_training(tiny_net):
    images, target = torch.randn(6, 3, 8, 8), torch.arange(6) % 4
    plain, distilled = tiny_net(0), tiny_net(0)
    sum(CE(plain)(images, target).values()).backward()
    sum(KD(distilled, tiny_net(1), KDOptions(ce_weight=1.0, kd_weight=0.0))(images, target).values()).backward()
    for mine, theirs in zip(distilled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_a_teacher_equal_to_the_student_teaches_nothing(tiny_net):
    net = tiny_net(0).eval()
    terms = KD(net, tiny_net(0))(torch.randn(6, 3, 8, 8), torch.arange(6) % 4)
    assert terms["kd"].abs() < 1e-6


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_what_it_is(name):
    assert METHODS[name].__doc__ and METHODS[name].Options.__doc__
