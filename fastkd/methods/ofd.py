"""OFD: the student's pre-ReLU maps match the teacher's where they are active (arXiv:1904.01866).

    L = ce_weight * CE(z_s, y) + overhaul_weight * sum_l 2^-(L-l) d(c_l(f_s), max(f_t, m_l)),    l = 1 .. L stages
    d(s, t) = sum of (s - t)^2 / N where s > t or t > 0;    c: 1x1 convolution, BatchNorm
    m: E[x | x < 0] of the output x of the teacher's BatchNorm before the map

Defaults: overhaul_weight 1e-3, the connectors and their initialisation from the authors' CIFAR code; ce_weight 1.
Departures: the teacher is in eval mode; the code leaves it in train mode. The maps of pre-activation networks (Wide
ResNet) pass their BatchNorm once; in the code twice (see fastkd/models/stages/preactivation.py).
"""

from collections.abc import Hashable
from dataclasses import dataclass

from torch import Tensor, nn

from ..losses import OverhaulLoss
from ..models import PreActivation
from ..models.nets.resnet import he_init
from ..models.stages.staged import check_stage_shapes
from .base import Method, WeightOptions, cross_entropy
from .forwards import ForwardCache


@dataclass(frozen=True)
class OFDOptions(WeightOptions):
    """The overhaul of feature distillation."""

    ce_weight: float = 1.0
    """Weight of the cross-entropy with the labels; from 0."""
    overhaul_weight: float = 1e-3
    """Weight of the partial squared error of the last stage, a sum over elements; halved per earlier stage; from 0."""


class OFD(Method):
    """The teacher's maps before the ReLU, above a margin (Heo et al. 2019)."""

    Options = OFDOptions
    options: OFDOptions
    paper = "arXiv:1904.01866"
    needs_stages = "both ResNet, WRN, VGG-BN or MobileNet, equal H x W at every stage"

    def build(self) -> None:
        ours, theirs = check_stage_shapes(self.student, self.teacher.net, "OFD")
        view = PreActivation(self.teacher.net)
        self.staged_views[self.student] = PreActivation(self.student)
        self.staged_views[self.teacher] = view
        self.connectors = nn.ModuleList(
            nn.Sequential(nn.Conv2d(s[0], t[0], 1, bias=False), nn.BatchNorm2d(t[0]))
            for s, t in zip(ours, theirs, strict=True)
        )
        he_init(self.connectors)
        self.loss = OverhaulLoss(self.options.overhaul_weight)
        for number, margin in enumerate(self.loss.margins(view.norms)):
            self.register_buffer(f"margin{number}", margin, persistent=False)

    def losses(self, out: ForwardCache, target: Tensor, plan: Hashable) -> dict[str, Tensor]:
        ours = [connect(f) for connect, f in zip(self.connectors, out.features(self.student), strict=True)]
        margins = [getattr(self, f"margin{number}") for number in range(len(ours))]
        ce = cross_entropy(out(self.student), target, self.options.ce_weight, self.ignore_index)
        return {"ce": ce, "ofd": self.loss(ours, out.features(self.teacher), margins)}
