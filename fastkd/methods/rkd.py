"""RKD: distances and angles between the samples of a batch match the teacher's (arXiv:1904.05068).

    L = ce_weight * CE(z_s, y) + distance_weight * mean_ij h(d_s, d_t) + angle_weight * mean_ijk h(a_s, a_t)
    d: distances of embeddings, divided by their mean; a: cosines of the angles of triples; h: smooth L1
    embedding [N, D]: the input of the classifier; networks need no stages and D may differ

Defaults: 25 and 50 from the authors' code, ce_weight 1 as in the code of DKD's comparison.
Departures: none known. If a network has dropout before its classifier, the embedding has passed it.
"""

from collections.abc import Hashable
from dataclasses import dataclass

from torch import Tensor

from ..losses import RKDLoss
from .base import Method, WeightOptions
from .forwards import ForwardCache


@dataclass(frozen=True)
class RKDOptions(WeightOptions):
    """Relational knowledge distillation."""

    ce_weight: float = 1.0
    """Weight of the cross-entropy with the labels; from 0."""
    distance_weight: float = 25.0
    """Weight of the smooth L1 error of distances, a mean over pairs; from 0."""
    angle_weight: float = 50.0
    """Weight of the smooth L1 error of cosines, a mean over triples; from 0."""


class RKD(Method):
    """Distances and angles between samples (Park et al. 2019)."""

    Options = RKDOptions
    options: RKDOptions
    paper = "arXiv:1904.05068"
    takes_bce = True

    def build(self) -> None:
        self.request_embeddings(self.student, self.teacher)
        self.loss = RKDLoss(self.options.distance_weight, self.options.angle_weight)

    def losses(self, out: ForwardCache, target: Tensor, plan: Hashable) -> dict[str, Tensor]:
        ours, theirs = (out.embedding(net) for net in (self.student, self.teacher))
        return {
            "ce": self.hard_loss(out(self.student), target, self.options.ce_weight),
            "rkd": self.loss(ours, theirs),
        }
