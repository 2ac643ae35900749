"""AT: the student's attention follows the teacher's at every stage (arXiv:1612.03928).

    L = ce_weight * CE(z_s, y) + attention_weight * sum over stages of mean (a_s - a_t)^2
    a = l2norm(flatten(mean_c f^2)), f: the output of the stage

Defaults: ce_weight 1 and attention_weight 1000, as in the code of DKD's comparison.
Departures: none. In pre-activation nets (Wide ResNet) the map is the sum, not activated, as in the authors' code.
"""

from dataclasses import dataclass

from ..losses import AttentionTransferLoss
from ..models.stages.shapes import check_stage_shapes
from .base import Method, check_weights, cross_entropy


@dataclass(frozen=True)
class ATOptions:
    """Attention transfer."""

    ce_weight: float = 1.0
    """Weight of the cross-entropy with the labels; from 0."""
    attention_weight: float = 1000.0
    """Weight of the squared distances of the attention maps, a mean over their pixels, summed over stages; from 0."""

    def __post_init__(self):
        check_weights(ce_weight=self.ce_weight, attention_weight=self.attention_weight)


class AT(Method):
    """Where the teacher's stages are active (Zagoruyko and Komodakis 2017)."""

    Options = ATOptions
    paper = "arXiv:1612.03928"
    needs_stages = "both staged, equal H x W at every stage"

    def __init__(self, student, teacher, options=None, peers=()):
        super().__init__(student, teacher, options, peers)
        check_stage_shapes(self.student, self.teacher.net, "AT")
        self.request_features(self.student)
        self.request_features(self.teacher)
        self.loss = AttentionTransferLoss(self.options.attention_weight)

    def losses(self, out, target, plan):
        ce = cross_entropy(out(self.student), target, self.options.ce_weight)
        return {"ce": ce, "at": self.loss(out.features(self.student), out.features(self.teacher))}
