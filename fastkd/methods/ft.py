"""FT: the student's factors match the teacher's (arXiv:1802.04977).

    L = ce_weight * CE(z_s, y) + factor_weight * ( sum |F^_s - F^_t|^p / N_el )^(1/p)
    x^ = flatten(x) / ||flatten(x)||_2 per sample;   N_el: the number of elements of the whole batch

F_t and F_s are factors of the last stage's maps, with half of the teacher's channels. F_t: the output of the
paraphraser, the encoder of an auto-encoder that is trained on the teacher's maps before the first epoch and then
frozen. F_s: the output of the translator, which is trained with the student and not saved with it.
If the factors differ in height or width, the larger one is average-pooled to the smaller one first (RepDistiller).

From a copy of the authors' code: factor_weight 500, p = 1, half of the channels, the auto-encoder's mean absolute
error, learning rate 0.1 and weight decay. Ours: IE-KD's encoder for both, with its 30 epochs and Nesterov momentum.
RepDistiller has other factors: attention maps of the two encoders (the mean over channels of the squares), with
factor_weight 200, a paraphraser with biases and without BatchNorm, its mean squared error, and learning rate 0.01 for
ResNets.
Departures: student and translator share one optimizer, with one momentum and weight decay. The map of a Wide ResNet
is taken after the final norm and activation (docs/taps.md); in RepDistiller it is the sum before them.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..data.base import Loader
from ..errors import UserError
from ..losses import FactorTransferLoss
from ..models import stage_shapes
from ..models.sizes import image_size_of
from .base import Method, check_weights
from .context import RunContext
from .forwards import ForwardCache, pooled
from .parts.autoencoder import Coder, TeacherEncoder, check_auto_encoder, factor_channels


@dataclass(frozen=True)
class FTOptions:
    """Factor transfer."""

    ce_weight: float = 1.0
    """Weight of the cross-entropy with the labels; from 0."""
    factor_weight: float = 500.0
    """Weight of the distance between the factors, a mean over their elements; above 0."""
    p: int = 1
    """Norm of the distance between factors: 1 or 2."""
    factor_channels: int = 0
    """Channels of the factors; 0: half of the teacher's."""
    ae_epochs: int = 30
    """Epochs of training for the auto-encoder, whose first half is the paraphraser."""
    ae_lr: float = 0.1
    """Learning rate of the auto-encoder; constant."""
    ae_error: Literal["l1", "l2"] = "l1"
    """Loss of the auto-encoder: mean absolute (l1) or mean squared error (l2)."""

    def __post_init__(self) -> None:
        check_weights(ce_weight=self.ce_weight, factor_weight=self.factor_weight)
        if not self.factor_weight:
            raise UserError("--factor-weight is 0: the teacher is not used; to train on the labels alone use ce")
        if self.p not in (1, 2):
            raise UserError(f"--p must be 1 or 2, got {self.p}")
        check_auto_encoder(self)


class FT(Method):
    """Factors of the last stage's maps (Kim et al. 2018)."""

    Options = FTOptions
    options: FTOptions
    paper = "arXiv:1802.04977"
    needs_stages = "both staged"
    takes_bce = True

    def build(self) -> None:
        size = image_size_of(self.student, self.teacher.net)
        mine, theirs = (stage_shapes(net, size)[-1][0] for net in (self.student, self.teacher.net))
        if theirs < 2:
            raise UserError(f"FT halves the teacher's channels; its last stage has {theirs}")
        self.request_features(self.student, self.teacher)
        factors = factor_channels(self.options, theirs)
        self.translator = Coder(mine, factors)
        self.paraphraser = TeacherEncoder(theirs, factors)
        self.loss = FactorTransferLoss(self.options.p, self.options.factor_weight)

    def prepare(self, loader: Loader, run: RunContext = RunContext()) -> None:  # noqa: B008, frozen
        self.paraphraser.fit(self, loader, "paraphraser.safetensors", run)

    def losses(self, out: ForwardCache, target: Tensor, plan: Hashable) -> dict[str, Tensor]:
        mine = self.translator(out.features(self.student)[-1])
        theirs = self.paraphraser(out.features(self.teacher)[-1])
        return {
            "ce": self.hard_loss(out(self.student), target, self.options.ce_weight),
            "ft": self.loss(*pooled(mine, theirs)),
        }
