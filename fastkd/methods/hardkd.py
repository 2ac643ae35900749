"""HardKD: the student learns from the labels and from the class that its teacher chooses (arXiv:2012.12877, eq. 3).

    L = ce_weight * CE(z_s, y) + hard_weight * CE(z_s, argmax z_t)

Defaults: 0.5 / 0.5, as in the paper. There is no temperature. Label smoothing, mixup and CutMix apply to y alone; the
teacher's label is always one class, as the paper has it.
Departures: the paper adds a distillation token whose own classifier learns from the teacher. Here one classifier has
both terms, so any student fits. timm's distilled DeiTs give the mean of their two classifiers, which has both terms.
"""

from collections.abc import Hashable
from dataclasses import dataclass

from torch import Tensor

from .base import Method, WeightOptions, cross_entropy
from .forwards import ForwardCache


@dataclass(frozen=True)
class HardKDOptions(WeightOptions):
    """Hard-label distillation."""

    ce_weight: float = 0.5
    """Weight of the cross-entropy with the labels; from 0."""
    hard_weight: float = 0.5
    """Weight of the cross-entropy with the class that the teacher chooses; from 0."""


class HardKD(Method):
    """The class that the teacher chooses, as a second label (DeiT, Touvron et al. 2021)."""

    Options = HardKDOptions
    options: HardKDOptions
    paper = "arXiv:2012.12877"
    uses_logits_alone = True
    takes_topk = True
    takes_bce = True

    def losses(self, out: ForwardCache, target: Tensor, plan: Hashable) -> dict[str, Tensor]:
        ours, o = out(self.student), self.options
        top = out.topk(self.teacher)
        teacher_label = top[1][:, 0] if top else out(self.teacher).argmax(1)
        ce = self.hard_loss(ours, target, o.ce_weight)
        return {"ce": ce, "hard": cross_entropy(ours, teacher_label, o.hard_weight)}
