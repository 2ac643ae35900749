"""SP: samples that are similar in the teacher are similar in the student (arXiv:1907.09682).

    L = ce_weight * CE(z_s, y) + similarity_weight * |G_s - G_t|_F^2 / N^2
    G: the Gram matrix [N, N] of the last stage's flattened maps, each row divided by its norm

Defaults: ce_weight 1 and similarity_weight 3000, as in the code of DKD's comparison.
Departures: none known.
"""

from collections.abc import Hashable
from dataclasses import dataclass

from torch import Tensor

from ..losses import SPLoss
from .base import Method, WeightOptions, cross_entropy
from .forwards import ForwardCache


@dataclass(frozen=True)
class SPOptions(WeightOptions):
    """Similarities of samples."""

    ce_weight: float = 1.0
    """Weight of the cross-entropy with the labels; from 0."""
    similarity_weight: float = 3000.0
    """Weight of the squared distance of the similarity matrices, a mean over all pairs of samples; from 0."""


class SP(Method):
    """Similarities between samples (Tung and Mori 2019)."""

    Options = SPOptions
    options: SPOptions
    paper = "arXiv:1907.09682"
    needs_stages = "both staged, any shapes"

    def build(self) -> None:
        self.request_features(self.student, self.teacher)
        self.loss = SPLoss(self.options.similarity_weight)

    def losses(self, out: ForwardCache, target: Tensor, plan: Hashable) -> dict[str, Tensor]:
        ours, theirs = (out.features(net)[-1] for net in (self.student, self.teacher))
        return {
            "ce": cross_entropy(out(self.student), target, self.options.ce_weight, self.ignore_index),
            "sp": self.loss(ours, theirs),
        }
