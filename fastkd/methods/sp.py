"""SP: samples that are alike to the teacher are alike to the student (arXiv:1907.09682).

    L = ce_weight * CE(z_s, y) + similarity_weight * |G_s - G_t|_F^2 / N^2
    G: the Gram matrix [N, N] of the last stage's maps, flattened, each row over its norm

Defaults: ce_weight 1 and similarity_weight 3000, as in the code of DKD's comparison.
Departures: none known.
"""

from dataclasses import dataclass

from ..losses import SPLoss
from .base import Method, check_weights, cross_entropy


@dataclass(frozen=True)
class SPOptions:
    """Similarities of samples."""

    ce_weight: float = 1.0
    """Weight of the cross-entropy with the labels; from 0."""
    similarity_weight: float = 3000.0
    """Weight of the squared distance of the similarity matrices, a mean over all pairs of samples; from 0."""

    def __post_init__(self):
        check_weights(ce_weight=self.ce_weight, similarity_weight=self.similarity_weight)


class SP(Method):
    """Which samples are alike (Tung and Mori 2019)."""

    Options = SPOptions
    paper = "arXiv:1907.09682"
    needs_stages = "both staged, any shapes"

    def __init__(self, student, teacher, options=None, peers=()):
        super().__init__(student, teacher, options, peers)
        self.request_features(self.student)
        self.request_features(self.teacher)
        self.loss = SPLoss(self.options.similarity_weight)

    def losses(self, out, target, plan):
        ours, theirs = (out.features(net)[-1] for net in (self.student, self.teacher))
        return {"ce": cross_entropy(out(self.student), target, self.options.ce_weight), "sp": self.loss(ours, theirs)}
