"""Would the tests notice? Each line of a kernel or a closed form is spoilt in turn, and the comparison must fail."""

import shutil

import pytest
import torch
from logit_cases import DCM, KD, independent, make
from mutants import KERNELS, load, mutant

if not KERNELS.exists():  # installed, without the source tree
    pytest.skip("needs the source tree", allow_module_level=True)

KERNEL, TERMS, CLOSED = "gpu/logit_loss", "gpu/logit_terms", "cpu/logit_loss"
PAIR, MANY = "cpu/student_teacher", "cpu/many_heads"
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
    (CLOSED, "mul_(temperature / N)", "mul_(1 / N)"),
    (CLOSED, "table[:, 1:] * temperature**2", "table[:, 1:] * temperature"),
    (CLOSED, "(self.smoothing - 1) * scale", "-scale"),
    (CLOSED, "self.log_sum = -self.p.amax(2).log()", "self.log_sum = 0 * self.p.amax(2)"),
    (CLOSED, "w * gradient if w else 0.0", "w if w else 0.0"),
    (PAIR, "mul_(kd_weight * temperature / N)", "mul_(kd_weight / N)"),
    (PAIR, "kd_weight * temperature**2 / N", "kd_weight * temperature / N"),
    (PAIR, "exact[:2].sub_(exact[2:4])", "exact[:2]"),
    (PAIR, "-WIDEST <= lowest.item()", "True"),
    (PAIR, "highest.item() <= WIDEST", "True"),
    (PAIR, "alpha=ce_weight / N", "alpha=ce_weight"),
    (MANY, "* temperature\n", "\n"),
    (MANY, "pulls *= temperature**2", "pulls *= temperature"),
    (MANY, ".sub_(log_p)", ""),
    (MANY, "- divergence.diagonal()", "- divergence.diagonal()[:, None]"),
    (MANY, "alpha=weight / N", "alpha=weight"),
    (MANY, "from_label.expand(-1, N, 1)", "0 * from_label.expand(-1, N, 1)"),
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
            settings = (weights, T, smoothing, None, False, [i < learners for i in range(len(c))])
            grads = torch.full((learners, 5, 10), torch.nan)
            loss, terms = compute(heads, y, *settings, grads)
            want, gradients = independent(heads, y, c, W, T=T, smoothing=smoothing)
            again = torch.full_like(grads, torch.nan)
            compute(heads, y, *settings, again, (torch.tensor(0.5), None))
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
