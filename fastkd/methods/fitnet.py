"""FitNet: a map of the student, through a regressor, matches the teacher's at one stage (arXiv:1412.6550).

    L = ce_weight * CE(z_s, y) + hint_weight * mean (r(f_s) - f_t)^2,    r: 1x1 convolution, BatchNorm

Defaults: ce_weight 1, hint_weight 100 and the second of three stages, as in the code of DKD's comparison.
Departures: one phase, as in that comparison; the original has two, first the hint and then the logits. Ours: the
regressor has no ReLU, because a stage may end before one, and starts from He initialisation.
"""

from collections.abc import Hashable
from dataclasses import dataclass

from torch import Tensor, nn

from ..errors import UserError
from ..losses import HintLoss
from ..models import staged
from ..models.nets.resnet import he_init
from ..models.stages.staged import check_stage_shapes
from .base import Method, WeightOptions, cross_entropy
from .forwards import ForwardCache


@dataclass(frozen=True)
class FitNetOptions(WeightOptions):
    """Hints."""

    ce_weight: float = 1.0
    """Weight of the cross-entropy with the labels; from 0."""
    hint_weight: float = 100.0
    """Weight of the mean squared error of the student's map; from 0."""
    stage: int = 0
    """The stage whose maps are compared, counted from 1; 0 is the middle one (2 of 3, 2 of 4)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stage < 0:
            raise UserError(f"--stage counts from 1 (0: the middle one), got {self.stage}")


class FitNet(Method):
    """A hint: the teacher's map of one stage (Romero et al. 2015)."""

    Options = FitNetOptions
    options: FitNetOptions
    paper = "arXiv:1412.6550"
    needs_stages = "both staged, equal H x W at the hint's stage"

    def build(self) -> None:
        self.request_features(self.student, self.teacher)
        counts = [len(staged(net).stages) for net in (self.student, self.teacher.net)]
        if self.options.stage > min(counts):
            raise UserError(
                f"--stage {self.options.stage}: the student has {counts[0]} stages, the teacher {counts[1]}"
            )
        self.stage = (self.options.stage or (min(counts) + 1) // 2) - 1  # an index, the same in both networks
        ours, theirs = check_stage_shapes(self.student, self.teacher.net, "FitNet", self.stage)
        cin, cout = ours[self.stage][0], theirs[self.stage][0]
        self.regressor = nn.Sequential(nn.Conv2d(cin, cout, 1, bias=False), nn.BatchNorm2d(cout))
        he_init(self.regressor)
        self.loss = HintLoss(self.options.hint_weight)

    def losses(self, out: ForwardCache, target: Tensor, plan: Hashable) -> dict[str, Tensor]:
        ce = cross_entropy(out(self.student), target, self.options.ce_weight, self.ignore_index)
        ours, theirs = out.features(self.student)[self.stage], out.features(self.teacher)[self.stage]
        return {"ce": ce, "hint": self.loss(self.regressor(ours), theirs)}
