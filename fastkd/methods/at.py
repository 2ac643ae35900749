"""AT: the student's attention maps match the teacher's at every stage (arXiv:1612.03928).

    L = ce_weight * CE(z_s, y) + attention_weight * sum over stages of mean (a_s - a_t)^2
    a = l2norm(flatten(mean_c f^2)), f: the output of the stage

Defaults: ce_weight 1 and attention_weight 1000, as in the code of DKD's comparison.
Departures: none. As in the authors' code, the map of a Wide ResNet (pre-activation) is the sum before the activation.
"""

from collections.abc import Hashable
from dataclasses import dataclass

from torch import Tensor

from ..losses import AttentionTransferLoss
from ..models.stages.staged import check_stage_shapes
from .base import Method, WeightOptions, cross_entropy
from .forwards import ForwardCache


@dataclass(frozen=True)
class ATOptions(WeightOptions):
    """Attention transfer."""

    ce_weight: float = 1.0
    """Weight of the cross-entropy with the labels; from 0."""
    attention_weight: float = 1000.0
    """Weight of the squared distance of the attention maps, a mean over pixels, summed over stages; from 0."""


class AT(Method):
    """Attention maps of all stages (Zagoruyko and Komodakis 2017)."""

    Options = ATOptions
    options: ATOptions
    paper = "arXiv:1612.03928"
    needs_stages = "both staged, equal H x W at every stage"

    def build(self) -> None:
        check_stage_shapes(self.student, self.teacher.net, "AT")
        self.request_features(self.student, self.teacher)
        self.loss = AttentionTransferLoss(self.options.attention_weight)

    def losses(self, out: ForwardCache, target: Tensor, plan: Hashable) -> dict[str, Tensor]:
        ce = cross_entropy(out(self.student), target, self.options.ce_weight, self.ignore_index)
        return {"ce": ce, "at": self.loss(out.features(self.student), out.features(self.teacher))}
