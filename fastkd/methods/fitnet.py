"""FitNet: a map of the student, through a regressor, matches the teacher's at one stage (arXiv:1412.6550).

    L = ce_weight * CE(z_s, y) + hint_weight * mean (r(f_s) - f_t)^2,    r: 1x1 convolution, BatchNorm

Defaults: ce_weight 1, hint_weight 100 and the second of three stages, as in the code of DKD's comparison.
Departures: one phase, as in that comparison; the original is two: up to the hint alone, then the logits. Ours: the
regressor has no ReLU, since a stage may end before one, and is initialised after He et al.
"""

from dataclasses import dataclass

from torch import nn

from ..errors import UserError
from ..losses import HintLoss
from ..models.nets.init import he_init
from ..models.stages.shapes import check_stage_shapes
from .base import Method, check_weights, cross_entropy


@dataclass(frozen=True)
class FitNetOptions:
    """Hints."""

    ce_weight: float = 1.0
    """Weight of the cross-entropy with the labels; from 0."""
    hint_weight: float = 100.0
    """Weight of the mean squared error of the student's map; from 0."""
    stage: int = 0
    """Which stage gives the hint, counted from 1; 0 is the middle one (2 of 3, 2 of 4)."""

    def __post_init__(self):
        check_weights(ce_weight=self.ce_weight, hint_weight=self.hint_weight)
        if self.stage < 0:
            raise UserError(f"--stage counts from 1 (0: the middle one), got {self.stage}")


class FitNet(Method):
    """A hint from the middle of the teacher (Romero et al. 2015)."""

    Options = FitNetOptions
    paper = "arXiv:1412.6550"
    needs_stages = "both staged, equal H x W at the hint's stage"

    def __init__(self, student, teacher, options=None, peers=()):
        super().__init__(student, teacher, options, peers)
        self.request_features(self.student)
        self.request_features(self.teacher)
        self.stage = self._stage()
        ours, theirs = check_stage_shapes(self.student, self.teacher.net, "FitNet", self.stage)
        cin, cout = ours[self.stage][0], theirs[self.stage][0]
        self.regressor = nn.Sequential(nn.Conv2d(cin, cout, 1, bias=False), nn.BatchNorm2d(cout))
        he_init(self.regressor)
        self.loss = HintLoss(self.options.hint_weight)

    def _stage(self) -> int:
        """Its index, in both networks."""
        counts = [len(view.stages) for view in self.staged_views.values()]
        if self.options.stage > min(counts):
            raise UserError(
                f"--stage {self.options.stage}: the student has {counts[0]} stages, the teacher {counts[1]}"
            )
        return (self.options.stage or (min(counts) + 1) // 2) - 1

    def losses(self, out, target, plan):
        ce = cross_entropy(out(self.student), target, self.options.ce_weight)
        ours, theirs = out.features(self.student)[self.stage], out.features(self.teacher)[self.stage]
        return {"ce": ce, "hint": self.loss(self.regressor(ours), theirs)}
