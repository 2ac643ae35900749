"""OFD: the student's pre-ReLU maps match the teacher's where they are active (arXiv:1904.01866).

    L = ce_weight * CE(z_s, y) + overhaul_weight * sum_l 2^-(L-l) d(c_l(f_s), max(f_t, m_l)),    l = 1 .. L stages
    d(s, t) = sum of (s - t)^2 / N where s > t or t > 0;    c: 1x1 convolution, BatchNorm
    m: E[x | x < 0] of the output x of the teacher's BatchNorm before the map

Defaults: overhaul_weight 1e-3, the connectors and their initialisation from the authors' CIFAR code; ce_weight 1.
If the maps of a stage differ in height or width, the larger one is average-pooled to the smaller one first; the code
of mdistiller pools the teacher's.
Departures: the teacher is in eval mode; the code leaves it in train mode. The maps of pre-activation networks (Wide
ResNet) pass their BatchNorm once; in the code twice (see fastkd/models/stages/preactivation.py).
"""

from collections.abc import Hashable
from dataclasses import dataclass

from torch import Tensor, nn

from ..errors import UserError
from ..losses import OverhaulLoss
from ..models import PreActivation
from ..models.nets.resnet import he_init
from ..models.own_input import plain_network
from ..models.sizes import image_size_of
from ..models.stages.staged import map_shapes, staged
from .base import Method, WeightOptions
from .forwards import ForwardCache, pooled


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
    needs_stages = "both ResNet, WRN, VGG-BN or MobileNet, equally many stages"
    takes_bce = True

    def build(self) -> None:
        ours, theirs = self._shapes()
        view = PreActivation(self.teacher.net)
        norms = [norm for norm in view.norms if norm is not None]
        if len(norms) < len(view.norms):
            name = type(plain_network(self.teacher.net)).__name__
            raise UserError(
                f"OFD takes its margins from the BatchNorms that feed the teacher's maps, and {name} has none: it can "
                "be the student alone; choose another teacher"
            )
        self.staged_views[self.student] = PreActivation(self.student)
        self.staged_views[self.teacher] = view
        self.connectors = nn.ModuleList(
            nn.Sequential(nn.Conv2d(s[0], t[0], 1, bias=False), nn.BatchNorm2d(t[0]))
            for s, t in zip(ours, theirs, strict=True)
        )
        he_init(self.connectors)
        self.loss = OverhaulLoss(self.options.overhaul_weight)
        for number, margin in enumerate(self.loss.margins(norms)):
            self.register_buffer(f"margin{number}", margin, persistent=False)

    def losses(self, out: ForwardCache, target: Tensor, plan: Hashable) -> dict[str, Tensor]:
        mine = [connect(f) for connect, f in zip(self.connectors, out.features(self.student), strict=True)]
        pairs = [pooled(*maps) for maps in zip(mine, out.features(self.teacher), strict=True)]
        ours, theirs = ([pair[side] for pair in pairs] for side in (0, 1))
        margins = [getattr(self, f"margin{number}") for number in range(len(ours))]
        ce = self.hard_loss(out(self.student), target, self.options.ce_weight)
        return {"ce": ce, "ofd": self.loss(ours, theirs, margins)}

    def _shapes(self) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
        """[(C, H, W)] at the ends of the stages of student and teacher. UserError unless there are equally many."""
        size = image_size_of(self.student, self.teacher.net)
        ours, theirs = (map_shapes(staged(net), size) for net in (self.student, self.teacher.net))
        if len(ours) != len(theirs):
            raise UserError(
                f"OFD compares the maps of every stage: the student {type(self.student).__name__} has {len(ours)} and "
                f"the teacher {type(plain_network(self.teacher.net)).__name__} {len(theirs)}; choose networks with "
                "equally many stages, or a method without maps (kd, dkd, dist, rkd, sp)"
            )
        return ours, theirs
