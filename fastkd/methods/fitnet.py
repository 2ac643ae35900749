"""FitNet: a map of the student, through a regressor, matches the teacher's at one stage (arXiv:1412.6550).

    L = ce_weight * CE(z_s, y) + hint_weight * mean (r(f_s) - f_t)^2,    r: convolution, BatchNorm, ReLU

The regressor r brings the student's map to the teacher's shape. Its convolution is 1x1 if the maps are equally large,
3x3 with stride 2 or a transposed 4x4 if one is twice as large as the other, else as large as the difference plus 1.
Defaults: ce_weight 1, hint_weight 100, the second of three stages and the regressor, as in RepDistiller.
Departures: one phase, as there; the original has two, first the hint and then the logits. Ours: the convolution starts
from He initialisation (a transposed one from torch's), and has no bias, which the BatchNorm would take away.
"""

from collections.abc import Hashable
from dataclasses import dataclass

from torch import Tensor, nn

from ..errors import UserError
from ..losses import HintLoss
from ..models import stage_shapes
from ..models.nets.resnet import he_init
from ..models.sizes import image_size_of
from .base import Method, WeightOptions
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
    needs_stages = "both staged"
    takes_bce = True

    def build(self) -> None:
        self.request_features(self.student, self.teacher)
        size = image_size_of(self.student, self.teacher.net)
        ours, theirs = (stage_shapes(net, size) for net in (self.student, self.teacher.net))
        if self.options.stage > min(len(ours), len(theirs)):
            raise UserError(
                f"--stage {self.options.stage}: the student has {len(ours)} stages, the teacher {len(theirs)}"
            )
        self.stage = (self.options.stage or (min(len(ours), len(theirs)) + 1) // 2) - 1  # an index, equal in both
        mine, wanted = ours[self.stage], theirs[self.stage]
        self.regressor = nn.Sequential(_convolution(mine, wanted), nn.BatchNorm2d(wanted[0]), nn.ReLU(inplace=True))
        he_init(self.regressor)
        self.loss = HintLoss(self.options.hint_weight)

    def losses(self, out: ForwardCache, target: Tensor, plan: Hashable) -> dict[str, Tensor]:
        ce = self.hard_loss(out(self.student), target, self.options.ce_weight)
        ours, theirs = out.features(self.student)[self.stage], out.features(self.teacher)[self.stage]
        return {"ce": ce, "hint": self.loss(self.regressor(ours), theirs)}


def _convolution(ours: tuple[int, ...], theirs: tuple[int, ...]) -> nn.Module:
    """From maps (C, H, W) like `ours` to maps like `theirs`. Raises UserError if there is none."""
    (cin, *size), (cout, *wanted) = ours, theirs
    (H, W), (tall, wide) = size, wanted
    if all(a == 2 * b for a, b in zip(size, wanted, strict=True)):
        return nn.Conv2d(cin, cout, 3, 2, 1, bias=False)
    if all(2 * a == b for a, b in zip(size, wanted, strict=True)):
        return nn.ConvTranspose2d(cin, cout, 4, 2, 1, bias=False)
    if all(a >= b for a, b in zip(size, wanted, strict=True)):
        return nn.Conv2d(cin, cout, (1 + H - tall, 1 + W - wide), bias=False)
    raise UserError(
        f"FitNet cannot bring the student's map of {H} x {W} to the teacher's {tall} x {wide}: it can be "
        "equal, larger, or half as large; choose another --stage, or another pair"
    )
