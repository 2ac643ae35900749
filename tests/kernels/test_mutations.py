"""Would the tests notice? Each line of a kernel or a closed form is spoilt in turn, and the comparison must fail."""

import shutil

import pytest
import torch
from logit_cases import DCM, KD, independent, make
from mutants import KERNELS, load, mutant

from fastkd.kernels.logit_loss import Inputs

if not KERNELS.exists():  # installed, without the source tree
    pytest.skip("needs the source tree", allow_module_level=True)

KERNEL, TERMS, CLOSED, GENERAL = "gpu/logit_loss", "gpu/logit_terms", "cpu/logit_loss", "cpu/logit_loss_general"
MUTATIONS = [
    (TERMS, "at_t = tl.sum(tl.exp((z - top) * inverse), 0)", "at_t = tl.sum(tl.exp(z * inverse), 0)"),  # no maximum
    (TERMS, "gradient = kl_scale * temperature * pull", "gradient = kl_scale * pull"),  # T dropped
    (KERNEL, "ce_scale, kl_scale = 1.0 / N, 1.0 / N", "ce_scale, kl_scale = 1.0, 1.0"),  # 1 / N missing
    (TERMS, "head + row * (stride * UNIT)", "head + row * C"),  # wrong stride
    (TERMS, "return weights[k] * grad_output", "return weights[k]"),  # upstream gradient ignored
    (TERMS, "other=-float(\"inf\")", "other=0.0"),  # padding counts as a class
    (KERNEL, "kl_scale * temperature * temperature", "kl_scale * temperature"),
    (TERMS, "(p * labels_sum - y)", "(p * labels_sum)"),  # no label
    (TERMS, "q * (log_q - log_p)", "q * (log_p - log_q)"),  # sign
    (KERNEL, "row += tl.num_programs(0)", "row += N"),  # only the first rows
    (TERMS, "(p - q)", "(p - 0.5 * q)"),
    (GENERAL, "mul_(temperature / N)", "mul_(1 / N)"),
    (GENERAL, "table[:, 1:] * temperature**2", "table[:, 1:] * temperature"),
    (GENERAL, "(self.smoothing - 1) * scale", "-scale"),
    (GENERAL, "self.log_sum = -self.p.amax(2).log()", "self.log_sum = 0 * self.p.amax(2)"),
    (CLOSED, "w * (common + gradient) if w else 0.0", "w if w else 0.0"),
    (CLOSED, "mul_(kd_weight * temperature / N)", "mul_(kd_weight / N)"),
    (CLOSED, "kd_weight * temperature**2 / N", "kd_weight * temperature / N"),
    (CLOSED, "exact[:2].sub_(exact[2:4])", "exact[:2]"),
    (CLOSED, "-WIDEST <= lowest.item()", "True"),
    (CLOSED, "highest.item() <= WIDEST", "True"),
    (CLOSED, "alpha=ce_weight / N", "alpha=ce_weight"),
    (CLOSED, "* temperature\n", "\n"),
    (CLOSED, "pulls *= temperature**2", "pulls *= temperature"),
    (CLOSED, ".sub_(log_p)", ""),
    (CLOSED, "- divergence.diagonal()", "- divergence.diagonal()[:, None]"),
    (CLOSED, "alpha=weight / len(p)", "alpha=weight"),
    (CLOSED, "from_label.expand(-1, N, 1)", "0 * from_label.expand(-1, N, 1)"),
]  # fmt: skip


def wrong_and_sure(heads: list[torch.Tensor], y: torch.Tensor) -> None:
    y.zero_()
    for head in heads:
        head.zero_()[:, 9] = 102.3


def far_from_0(heads: list[torch.Tensor], y: torch.Tensor) -> None:
    for head in heads:
        head.add_(1e5)


CASES = [
    (KD, 1, 0.0, 4.0, 300.0, None),
    (KD, 1, 0.0, 4.0, 30.0, None),
    (KD, 1, 0.0, 4.0, 3.0, None),
    (KD, 1, 0.0, 4.0, 3.0, wrong_and_sure),
    (KD, 1, 0.0, 3.0, 0.1, far_from_0),
    (DCM, 4, 0.1, 3.0, 30.0, None),
    (DCM, 4, 0.0, 3.0, 3.0, None),
]
"""Table, learners, label smoothing, temperature, size of the logits: large ones take more care; what is changed."""


def right(modules) -> bool:
    """The comparison that the mutations must fail: two tables, smoothing, padded rows, more rows than programs."""
    for compute in (modules[KERNEL].launch, modules[CLOSED].closed_form):
        for (c, W), learners, smoothing, T, scale, change in CASES:
            heads, y = make(len(c), 5, 10, scale=scale)
            if change:
                change(heads, y)
            padded = torch.full((5, 16), 7.0)
            padded[:, :10] = heads[0]
            heads = [padded[:, :10], *heads[1:]]
            weights = [float(w) for ci, row in zip(c, W, strict=True) for w in (ci, *row)]
            settings = (None, weights, T, smoothing, None, False, False, "mean", [i < learners for i in range(len(c))])
            inputs, grads = Inputs(heads, y, *settings), torch.full((learners, 5, 10), torch.nan)
            loss, terms = torch.full((), torch.nan), torch.full((len(c), len(c) + 1), torch.nan)
            compute(inputs, (loss, terms), grads)
            want, gradients = independent(heads, y, c, W, T=T, smoothing=smoothing)
            again = torch.full_like(grads, torch.nan)
            compute(inputs, (None, None), again, (torch.tensor(0.5), None))
            for got, wanted in ((terms, want), (loss, want.sum()), *zip(grads, gradients, strict=False),
                                *zip(2 * again, gradients, strict=False)):  # fmt: skip
                if not torch.allclose(got.double(), wanted, rtol=1e-4, atol=1e-5):
                    return False
    return True


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(KERNELS, tmp_path / "mutant")
    return tmp_path / "mutant"


def test_the_comparison_accepts_the_kernels(copy):
    assert right(load(copy, "unchanged", KERNEL, CLOSED))


@pytest.mark.parametrize("file, before, after", MUTATIONS)
def test_a_mutation_is_caught(copy, file, before, after):
    assert not right(mutant(copy, file, before, after, KERNEL, CLOSED))
