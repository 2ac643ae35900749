"""DIST: the student's probabilities correlate with the teacher's, per sample and per class (arXiv:2205.10536).

    L = ce_weight * CE(z_s, y) + T^2 * (beta * (1 - mean Pearson over rows) + gamma * (1 - mean Pearson over columns))
    rows and columns: of the matrices [N, C] softmax(z_s / T) and softmax(z_t / T)

Defaults: ce_weight 1, beta = gamma = 2 and T = 4 for CIFAR, from the authors' code; for ImageNet T = 1.
Departures: none known.
"""

from collections.abc import Hashable
from dataclasses import dataclass

from torch import Tensor

from ..losses import DISTLoss
from .base import Method, WeightOptions
from .forwards import ForwardCache


@dataclass(frozen=True)
class DISTOptions(WeightOptions):
    """Correlations instead of divergences."""

    temperature: float = 4.0
    """Softens both networks' logits before they are compared; above 0."""
    ce_weight: float = 1.0
    """Weight of the cross-entropy with the labels; from 0."""
    beta: float = 2.0
    """Weight of 1 - correlation between the classes of a sample, times T^2; from 0."""
    gamma: float = 2.0
    """Weight of 1 - correlation between the samples of the batch in a class, times T^2; from 0."""


class DIST(Method):
    """Correlation with the teacher per sample and per class (Huang et al. 2022)."""

    Options = DISTOptions
    options: DISTOptions
    paper = "arXiv:2205.10536"
    uses_logits_alone = True
    takes_bce = True

    def build(self) -> None:
        self.loss = DISTLoss(self.options.beta, self.options.gamma, self.options.temperature)

    def losses(self, out: ForwardCache, target: Tensor, plan: Hashable) -> dict[str, Tensor]:
        ours, theirs = out(self.student), out(self.teacher)
        return {
            "ce": self.hard_loss(ours, target, self.options.ce_weight),
            "dist": self.loss(ours, theirs),
        }
