"""RKD: distances and angles between the samples of a batch match the teacher's (arXiv:1904.05068).

    L = ce_weight * CE(z_s, y) + distance_weight * mean_ij h(d_s, d_t) + angle_weight * mean_ijk h(a_s, a_t)
    d: distances of pooled features, divided by their mean; a: cosines of the angles of triples; h: smooth L1

Defaults: 25 and 50 from the authors' code, ce_weight 1 as in the code of DKD's comparison.
Departures: the features are the means of the last stage's maps. In ResNets these are the inputs of the classifier. In
networks with layers between the last stage and the pool (a Wide ResNet's BatchNorm and ReLU) they are taken before.
"""

from collections.abc import Hashable
from dataclasses import dataclass

from torch import Tensor

from ..losses import RKDLoss
from .base import Method, WeightOptions, cross_entropy
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
    needs_stages = "both staged, any shapes"

    def build(self) -> None:
        self.request_features(self.student, self.teacher)
        self.loss = RKDLoss(self.options.distance_weight, self.options.angle_weight)

    def losses(self, out: ForwardCache, target: Tensor, plan: Hashable) -> dict[str, Tensor]:
        ours, theirs = (out.features(net)[-1].flatten(2).mean(2) for net in (self.student, self.teacher))
        return {
            "ce": cross_entropy(out(self.student), target, self.options.ce_weight, self.ignore_index),
            "rkd": self.loss(ours, theirs),
        }
