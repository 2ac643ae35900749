"""FT: the student's factors follow those of the teacher (arXiv:1802.04977).

    L = ce_weight * CE(z_s, y) + factor_weight * ( sum |F^_s - F^_t|^p / N_el )^(1/p)
    x^ = flatten(x) / ||flatten(x)||_2 per sample;   N_el: the elements of the whole batch

The last stage's maps are compared: the teacher's through the paraphraser, the encoder of an auto-encoder that is
trained on them before the first epoch and then frozen; the student's through the translator, which learns with the
student and is no part of it. Factors have half of the teacher's channels.

From a copy of the authors' code: factor_weight 500, p = 1, half of the channels, the auto-encoder's mean absolute
error, rate 0.1 and weight decay. Ours: the coder of IE-KD for both, with its 30 epochs and Nesterov momentum.
Departures: student and translator share one optimizer, with one momentum and weight decay.
"""

from dataclasses import dataclass
from typing import Literal

from ..errors import UserError
from ..losses import FactorTransferLoss
from ..models.stages.shapes import check_stage_shapes
from .base import FrozenTeacher, Method, RunContext, check_weights, cross_entropy
from .parts.autoencoder import Coder
from .parts.teacher_autoencoder import check_auto_encoder, fingerprint, fit_encoder, teacher_maps

FILE = "paraphraser.safetensors"


@dataclass(frozen=True)
class FTOptions:
    """Factor transfer."""

    ce_weight: float = 1.0
    """Weight of the cross-entropy with the labels; from 0."""
    factor_weight: float = 500.0
    """Weight of the distance of the factors, a mean over their elements; above 0."""
    p: int = 1
    """Norm in which factors are compared: 1 or 2."""
    ae_epochs: int = 30
    """Passes over the training images for the teacher's auto-encoder, whose first half is the paraphraser."""
    ae_lr: float = 0.1
    """Its constant learning rate."""
    ae_error: Literal["l1", "l2"] = "l1"
    """Its error: mean absolute (l1) or mean squared (l2)."""

    def __post_init__(self):
        check_weights(ce_weight=self.ce_weight, factor_weight=self.factor_weight)
        if not self.factor_weight:
            raise UserError("--factor-weight is 0: nothing of the teacher is learnt; for plain training use ce")
        if self.p not in (1, 2):
            raise UserError(f"--p must be 1 or 2, got {self.p}")
        check_auto_encoder(self)


class FT(Method):
    """Factors of the teacher's last maps, translated (Kim et al. 2018)."""

    Options = FTOptions
    paper = "arXiv:1802.04977"
    needs_stages = "both staged, equal last H x W"

    def __init__(self, student, teacher, options=None, peers=()):
        super().__init__(student, teacher, options, peers)
        mine, theirs = (shapes[-1][0] for shapes in check_stage_shapes(self.student, self.teacher.net, "FT", -1))
        if theirs < 2:
            raise UserError(f"FT halves the teacher's channels; its last stage has {theirs}")
        self.request_features(self.student)
        self.request_features(self.teacher)
        self.translator = Coder(mine, theirs // 2)
        self.paraphraser = FrozenTeacher(Coder(theirs, theirs // 2))
        self.loss = FactorTransferLoss(self.options.p, self.options.factor_weight)
        self.ready = False

    def prepare(self, loader, run=RunContext()):  # noqa: B008, frozen
        about = {"teacher": fingerprint(self.teacher.net), "batches": len(loader)}
        maps = teacher_maps(self.staged_views[self.teacher], loader, run)
        fit_encoder(self.paraphraser.net, maps, self.options, about, FILE, run)
        self.ready = True

    def losses(self, out, target, plan):
        if not self.ready:
            raise UserError("the teacher's auto-encoder is not trained yet: call prepare(loader) before the first step")
        mine = self.translator(out.features(self.student)[-1])
        theirs = self.paraphraser(out.features(self.teacher)[-1])
        return {"ce": cross_entropy(out(self.student), target, self.options.ce_weight), "ft": self.loss(mine, theirs)}
