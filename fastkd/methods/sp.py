"""SP: samples that are similar in the teacher are similar in the student (arXiv:1907.09682).

    L = ce_weight * CE(z_s, y) + similarity_weight * |G_s - G_t|_F^2 / N^2
    G: the Gram matrix [N, N] of features [N, D], each row divided by its norm

The features are the inputs of the classifiers. Networks need no stages, and D may differ.
Defaults: ce_weight 1 and similarity_weight 3000, as in the code of DKD's comparison.
Departures: the paper and that code take the last stage's maps, flattened. `--features maps` does this. It needs
networks that divide into stages. In most networks the classifier gets the mean of these maps.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from ..errors import UserError
from ..losses import SPLoss
from .base import Method, WeightOptions
from .forwards import ForwardCache


@dataclass(frozen=True)
class SPOptions(WeightOptions):
    """Similarities of samples."""

    ce_weight: float = 1.0
    """Weight of the cross-entropy with the labels; from 0."""
    similarity_weight: float = 3000.0
    """Weight of the squared distance of the similarity matrices, a mean over all pairs of samples; from 0."""
    features: Literal["embedding", "maps"] = "embedding"
    """What is compared: the classifier's input (embedding), or the last stage's maps, as in the paper."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.features not in ("embedding", "maps"):
            raise UserError(f"--features must be embedding or maps, got {self.features!r}")


class SP(Method):
    """Similarities between samples (Tung and Mori 2019)."""

    Options = SPOptions
    options: SPOptions
    paper = "arXiv:1907.09682"
    needs_stages = "maps: both staged, any shapes"
    takes_bce = True

    def build(self) -> None:
        if self.options.features == "maps":
            self.request_features(self.student, self.teacher)
        else:
            self.request_embeddings(self.student, self.teacher)
        self.loss = SPLoss(self.options.similarity_weight)

    def losses(self, out: ForwardCache, target: Tensor, plan: Hashable) -> dict[str, Tensor]:
        ours, theirs = (self._features(out, net) for net in (self.student, self.teacher))
        return {
            "ce": self.hard_loss(out(self.student), target, self.options.ce_weight),
            "sp": self.loss(ours, theirs),
        }

    def _features(self, out: ForwardCache, net: nn.Module) -> Tensor:
        return out.features(net)[-1] if self.options.features == "maps" else out.embedding(net)
