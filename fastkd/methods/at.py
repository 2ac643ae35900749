"""AT: the student's attention maps match the teacher's at every stage (arXiv:1612.03928).

    L = ce_weight * CE(z_s, y) + attention_weight * sum over stages of mean (a_s - a_t)^2
    a = l2norm(flatten(mean_c f^2)), f: the output of the stage

If the maps of a stage differ in height or width, the larger one is average-pooled to the smaller one first.
Defaults: ce_weight 1 and attention_weight 1000, as in the code of DKD's comparison; the pooling is from there too.
As in the authors' code, the maps of a Wide ResNet (pre-activation) are sums before the activation.
Departures: its last map is taken after the final norm and activation (docs/taps.md); in that code it is a sum too.
"""

from collections.abc import Hashable
from dataclasses import dataclass

from torch import Tensor, nn

from ..errors import UserError
from ..losses import AttentionTransferLoss
from ..models import stage_shapes
from ..models.own_input import plain_network
from ..models.sizes import image_size_of
from .base import Method, WeightOptions
from .forwards import ForwardCache, pooled


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
    needs_stages = "both staged, equally many stages"
    takes_bce = True

    def build(self) -> None:
        check_stage_counts(self.student, self.teacher.net)
        self.request_features(self.student, self.teacher)
        self.loss = AttentionTransferLoss(self.options.attention_weight)

    def losses(self, out: ForwardCache, target: Tensor, plan: Hashable) -> dict[str, Tensor]:
        ce = self.hard_loss(out(self.student), target, self.options.ce_weight)
        stages = zip(out.features(self.student), out.features(self.teacher), strict=True)
        ours, theirs = zip(*(pooled(mine, other) for mine, other in stages), strict=True)
        return {"ce": ce, "at": self.loss(list(ours), list(theirs))}


def check_stage_counts(student: nn.Module, teacher: nn.Module) -> None:
    """Raise UserError unless both networks have equally many stages."""
    size = image_size_of(student, teacher)
    ours, theirs = stage_shapes(student, size), stage_shapes(teacher, size)
    if len(ours) != len(theirs):
        listed = [", ".join("x".join(map(str, shape)) for shape in shapes) for shapes in (ours, theirs)]
        names = [type(plain_network(net)).__name__ for net in (student, teacher)]
        raise UserError(
            f"AT compares the maps of every stage; for images of {size} pixels the stages "
            f"(C x H x W) of the student {names[0]} are {listed[0]}, those of the teacher "
            f"{names[1]} {listed[1]}: use networks with equally many stages, name them "
            "(--student-stages, --teacher-stages), or use a method without maps (kd, dkd, dist, rkd, sp)"
        )
