"""Images without a label: no cross-entropy, every other term."""

import pytest
import torch
import torch.nn.functional as F
from every_method import NAMES, batch, build, prepare

from fastkd.errors import UserError
from fastkd.losses import UNLABELLED
from fastkd.methods.base import cross_entropy

IMAGES, TARGET = batch(0, 6)
UNKNOWN = torch.tensor([1, 4])
MIXED = TARGET.index_fill(0, UNKNOWN, UNLABELLED)
USES_LABELS = [name for name in NAMES if "dkd" in name.split()[0].split("+")]
OTHERS = [name for name in NAMES if name not in USES_LABELS]


def made(name, tmp_path, unlabelled=True):
    method = build(name)
    prepare(method, tmp_path)
    if unlabelled:
        method.allow_unlabelled()
    return method


def is_ce(term):
    return term.split("_")[0] == "ce"


@pytest.mark.parametrize("name", OTHERS)
def test_only_the_cross_entropy_leaves_them_out(name, tmp_path):
    """A soft target of zeros has no cross-entropy either; its mean is over all rows."""
    method = made(name, tmp_path)
    soft = F.one_hot(TARGET, 10).float().index_fill(0, UNKNOWN, 0)
    for plan in method.plans(0):
        got, want = method(IMAGES, MIXED, plan), method(IMAGES, soft, plan)
        assert any(map(is_ce, got)) and got.keys() == want.keys()
        for term, value in want.items():
            factor = len(TARGET) / (len(TARGET) - len(UNKNOWN)) if is_ce(term) else 1
            torch.testing.assert_close(got[term], factor * value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OTHERS)
def test_a_batch_without_labels_has_no_nan(name, tmp_path):
    method = made(name, tmp_path)
    for plan in method.plans(0):
        terms = method(IMAGES, torch.full_like(TARGET, UNLABELLED), plan)
        assert all(value == 0 for term, value in terms.items() if is_ce(term))
        sum(terms.values()).backward()
        gradients = [p.grad for p in method.parameters() if p.grad is not None]
        assert gradients and all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("name", NAMES)
def test_where_all_are_labelled_such_a_label_is_an_error(name, tmp_path):
    method = made(name, tmp_path, unlabelled=False)
    with pytest.raises((ValueError, IndexError), match="-100"):
        method(IMAGES, MIXED, method.plans(0)[0])


@pytest.mark.parametrize("name", USES_LABELS)
def test_a_method_that_needs_labels_says_so(name):
    method = build(name, taught=False)
    assert type(method).needs_labels
    with pytest.raises(UserError, match=r"needs the label of every image: leave the unlabelled images out"):
        method.allow_unlabelled()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_cross_entropy_is_the_mean_over_the_labelled(dtype):
    z = torch.randn(6, 10, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    kept = MIXED != UNLABELLED
    want = 0.3 * F.cross_entropy(z[kept].double(), MIXED[kept])
    got = cross_entropy(z, MIXED, 0.3, UNLABELLED)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(got, z)
    assert not gradient[~kept].any() and gradient[kept].any(1).all()
