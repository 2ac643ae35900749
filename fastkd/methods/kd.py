"""KD: the student learns from the labels and from the teacher's softened logits (arXiv:1503.02531).

    L = ce_weight * CE(z_s, y) + kd_weight * T^2 * KL(p_t^T || p_s^T)

Defaults: T = 4, 0.1 / 0.9, usual for CIFAR since the CRD comparison; for ImageNet T = 1, 0.5 / 0.5.
Departures: none. `standardize` is arXiv:2403.01427's logit standardisation (its own defaults: T = 2, kd_weight = 9).
"""

from collections.abc import Hashable
from dataclasses import dataclass

from torch import Tensor

from ..errors import check_number
from ..kernels import kd_loss, topk_kd_loss
from .base import Method, check_weights
from .forwards import ForwardCache


@dataclass(frozen=True)
class KDOptions:
    """Knowledge distillation."""

    temperature: float = 4.0
    """Softens both networks' logits before they are compared; above 0."""
    ce_weight: float = 0.1
    """Weight of the cross-entropy with the labels."""
    kd_weight: float = 0.9
    """Weight of T^2 * KL(teacher || student)."""
    standardize: bool = False
    """Z-score each row of logits before the softmax (logit standardisation)."""

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, above_zero=True)
        check_weights(ce_weight=self.ce_weight, kd_weight=self.kd_weight)


class KD(Method):
    """Softened logits of a trained teacher (Hinton et al. 2015)."""

    Options = KDOptions
    options: KDOptions
    paper = "arXiv:1503.02531"
    uses_logits_alone = True
    takes_topk = True
    takes_bce = True

    def losses(self, out: ForwardCache, target: Tensor, plan: Hashable) -> dict[str, Tensor]:
        o = self.options
        if top := out.topk(self.teacher):
            ce = self.hard_loss(out(self.student), target, o.ce_weight)
            values, classes = top
            kd = topk_kd_loss(out(self.student), values, classes, o.temperature, o.kd_weight)
            return {"ce": ce, "kd": kd}
        if self.bce_threshold is not None:
            kd = kd_loss(
                out(self.student),
                out(self.teacher),
                None,
                temperature=o.temperature,
                ce_weight=0.0,
                kd_weight=o.kd_weight,
                standardize=o.standardize,
            ).kd
            return {"ce": self.hard_loss(out(self.student), target, o.ce_weight), "kd": kd}
        fused = kd_loss(
            out(self.student),
            out(self.teacher),
            target,
            temperature=o.temperature,
            ce_weight=o.ce_weight,
            kd_weight=o.kd_weight,
            ignore_index=self.ignore_index,
            standardize=o.standardize,
        )
        return {"ce": fused.ce, "kd": fused.kd}
