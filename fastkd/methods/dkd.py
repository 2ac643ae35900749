"""DKD: KD divided into a term for the true class and a term for the other classes (arXiv:2203.08679).

    L = ce_weight * CE(z_s, y) + T^2 * (alpha * TCKD + beta * NCKD)
    TCKD = KL((p_y, 1 - p_y) of teacher || of student),    NCKD = KL of the softmaxes over all classes but y

Defaults: ce_weight 1, alpha 1, beta 8, T = 4, from the authors' code for CIFAR-100, where beta depends on the pair
(ResNet-56 to ResNet-20: 2); for ImageNet beta 0.5, T = 1.
Departures: the terms have their full weight from the first step; the code increases it over 20 epochs (1 on ImageNet).
Ours: with soft labels (mixup, CutMix, smoothing), y is the class with the largest probability.
"""

from collections.abc import Hashable
from dataclasses import dataclass

from torch import Tensor

from ..losses import DKDLoss
from .base import Method, WeightOptions, cross_entropy
from .forwards import ForwardCache


@dataclass(frozen=True)
class DKDOptions(WeightOptions):
    """Decoupled distillation."""

    temperature: float = 4.0
    """Softens both networks' logits before they are compared; above 0."""
    ce_weight: float = 1.0
    """Weight of the cross-entropy with the labels; from 0."""
    alpha: float = 1.0
    """Weight of T^2 * TCKD, the true class against all others; from 0."""
    beta: float = 8.0
    """Weight of T^2 * NCKD, the other classes among themselves; from 0."""


class DKD(Method):
    """Separate terms for the true class and the others (Zhao et al. 2022)."""

    Options = DKDOptions
    options: DKDOptions
    paper = "arXiv:2203.08679"
    needs_labels = True

    def build(self) -> None:
        self.loss = DKDLoss(self.options.alpha, self.options.beta, self.options.temperature)

    def losses(self, out: ForwardCache, target: Tensor, plan: Hashable) -> dict[str, Tensor]:
        ours, theirs = out(self.student), out(self.teacher)
        labels = target.argmax(1) if target.is_floating_point() else target
        return {
            "ce": cross_entropy(ours, target, self.options.ce_weight, self.ignore_index),
            "dkd": self.loss(ours, theirs, labels),
        }
