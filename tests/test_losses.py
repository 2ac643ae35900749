"""The modules that other trainers import."""

import pytest
import torch

from fastkd.kernels import kd_loss
from fastkd.losses import KDLoss


def test_kd_loss_is_the_sum_of_its_terms():
    z_s, z_t, y = torch.randn(5, 7), torch.randn(5, 7), torch.arange(5)
    loss = KDLoss(temperature=2.0, ce_weight=0.4, kd_weight=0.6, label_smoothing=0.1)
    want = kd_loss(z_s, z_t, y, temperature=2.0, ce_weight=0.4, kd_weight=0.6, label_smoothing=0.1)
    assert torch.equal(loss(z_s, z_t, y), want.loss)
    torch.testing.assert_close(want.loss, want.ce + want.kd)
    assert list(loss.terms(z_s, z_t, y)) == ["ce", "kd"]


def test_defaults_are_the_contract():
    loss = KDLoss()
    assert (loss.temperature, loss.ce_weight, loss.kd_weight) == (4.0, 0.1, 0.9)
    assert (loss.label_smoothing, loss.standardize) == (0.0, False)


def test_compiles_without_a_break():
    z_s, z_t, y = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7), torch.arange(5)
    eager = KDLoss()(z_s, z_t, y)
    compiled = torch.compile(KDLoss(), fullgraph=True, backend="aot_eager")(z_s, z_t, y)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(torch.autograd.grad(compiled, z_s), torch.autograd.grad(eager, z_s))


def test_under_autocast_it_still_computes_in_fp32():
    z_s, z_t, y = torch.randn(5, 70).bfloat16(), torch.randn(5, 70).bfloat16(), torch.arange(5)
    with torch.autocast("cpu", torch.bfloat16):
        inside = KDLoss()(z_s, z_t, y)
    assert inside.dtype == torch.float32 and torch.equal(inside, KDLoss()(z_s, z_t, y))


@pytest.mark.parametrize(
    "name, value",
    [("temperature", 0), ("temperature", -1), ("ce_weight", -0.1), ("kd_weight", float("nan")), ("label_smoothing", 1)],
)
def test_bad_settings_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        KDLoss(**{name: value})
