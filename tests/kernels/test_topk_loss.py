"""KL over the teacher's k largest classes and the rest: definition, gradient, and its distance from the whole KL."""

import pytest
import torch
import torch.nn.functional as F

from fastkd.kernels import kd_loss_reference, topk_kd_loss, topk_kd_loss_reference, topk_of
from fastkd.losses import TopKLoss


def logits(N=6, C=100, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (scale * torch.randn(N, C, generator=generator, dtype=torch.float64) for _ in range(2))
    return student.requires_grad_(), teacher


def whole(student, teacher, T, weight):
    return kd_loss_reference(student, teacher, None, temperature=T, ce_weight=0.0, kd_weight=weight).kd


@pytest.mark.parametrize("T, k", [(1.0, 1), (4.0, 10), (2.0, 99)])
def test_the_loss_and_its_gradient_are_the_references(T, k):
    student, teacher = logits()
    values, classes = topk_of(teacher, k, T)
    got, want = topk_kd_loss(student, values, classes, T, 0.7), topk_kd_loss_reference(student, values, classes, T, 0.7)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    ours, theirs = (torch.autograd.grad(each, student)[0] for each in (got, want))
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-12)
    assert torch.autograd.gradcheck(lambda z: topk_kd_loss(z, values, classes, T), student)


def test_what_is_kept_gives_the_probabilities_of_the_outcomes():
    _, teacher = logits()
    values, classes = topk_of(teacher, 5, 2.0)
    p = (teacher / 2).softmax(1).gather(1, classes)
    torch.testing.assert_close((values / 2).softmax(1), torch.cat([p, 1 - p.sum(1, keepdim=True)], 1))
    assert torch.equal(classes[:, 0], teacher.argmax(1)) and (p.diff(dim=1) <= 0).all()


@pytest.mark.parametrize("T, k, seed", [(1.0, 10, 0), (4.0, 10, 1), (4.0, 50, 2), (1.0, 1, 3)])
def test_its_bias_is_within_the_documented_bound(T, k, seed):
    """Of 100 classes. In the k classes the gradient is exact; the others differ by weight T r / N at most."""
    student, teacher = logits(seed=seed)
    N, weight = len(student), 0.9
    values, classes = topk_of(teacher, k, T)
    ours, all_of_it = topk_kd_loss(student, values, classes, T, weight), whole(student, teacher, T, weight)
    difference = torch.autograd.grad(ours, student)[0] - torch.autograd.grad(all_of_it, student)[0]
    rest = 1 - (teacher / T).softmax(1).gather(1, classes).sum(1)
    bound = weight * T * rest / N
    assert (difference.gather(1, classes).abs() < 1e-12).all()
    assert (difference.abs().amax(1) <= bound + 1e-12).all() and (difference.abs().sum(1) <= 2 * bound + 1e-12).all()
    assert (difference.abs().amax(1) > bound / 1000).all()  # there is a bias
    others = F.one_hot(classes, 100).sum(1) == 0
    p, q = ((z[others].view(N, -1) / T).softmax(1) for z in (teacher, student.detach()))
    gap = weight * T**2 * (rest * (p * (p / q).log()).sum(1)).mean()
    torch.testing.assert_close(all_of_it - ours, gap)


def test_extreme_logits_stay_finite():
    """The mass of the rest is below the smallest fp32 number for both networks."""
    teacher = torch.tensor([[500.0, 0.0, -100.0], [0.0, 300.0, -300.0]])
    student = teacher.flip(0).clone().requires_grad_()
    loss = topk_kd_loss(student, *topk_of(teacher, 1, 1.0), 1.0)
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_fp32(dtype):
    student, teacher = logits()
    student = student.detach().to(dtype).requires_grad_()
    values, classes = topk_of(teacher.to(dtype), 10, 4.0)
    loss = topk_kd_loss(student, values, classes)
    want = topk_kd_loss_reference(student.double(), values.double(), classes)
    assert loss.dtype == torch.float32 and values.dtype == torch.float32
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-6)
    loss.backward()
    assert student.grad.dtype == dtype


def test_the_teachers_side_gets_no_gradient():
    student, teacher = logits()
    values, classes = topk_of(teacher.requires_grad_(), 3, 4.0)
    TopKLoss()(student, values, classes).backward()
    assert teacher.grad is None and student.grad is not None


@pytest.mark.parametrize(
    "values, classes, words",
    [
        (torch.zeros(6, 5), torch.zeros(6, 5, dtype=torch.int64), "1 <= k < C"),
        (torch.zeros(5, 6), torch.zeros(5, 5, dtype=torch.int64), r"\[5, 6\]"),
        (torch.zeros(6, 6), torch.zeros(6, 5, dtype=torch.int32), "int32"),
        (torch.zeros(6, 101), torch.zeros(6, 100, dtype=torch.int64), r"\[6, 101\]"),
    ],
)
def test_wrong_shapes_are_named(values, classes, words):
    with pytest.raises(ValueError, match=words):
        topk_kd_loss(logits()[0], values, classes)
