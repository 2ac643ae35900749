"""The losses as modules: what other trainers import. `loss = KDLoss()(student_logits, teacher_logits, target)`."""

import math

from torch import Tensor, nn

from .kernels import kd_loss


class KDLoss(nn.Module):
    """ce_weight * CE(z_s, y) + kd_weight * T^2 * KL(p_t^T || p_s^T); Hinton et al. 2015, arXiv:1503.02531.

    The defaults are the usual ones for CIFAR; for ImageNet temperature 1 and weights 0.5 / 0.5 are common.
    `standardize=True` is logit standardisation (arXiv:2403.01427), usually with temperature 2 and kd_weight 9.
    Called with student_logits [N, C], teacher_logits [N, C] (any floating dtype), target [N] int64 or [N, C] floating;
    gives a scalar in fp32 (fp64 for fp64 input). The gradient goes to the student's logits only.
    """

    def __init__(
        self,
        temperature: float = 4.0,
        ce_weight: float = 0.1,
        kd_weight: float = 0.9,
        label_smoothing: float = 0.0,
        standardize: bool = False,
    ):
        super().__init__()
        check_positive("temperature", temperature)
        check_weight("ce_weight", ce_weight)
        check_weight("kd_weight", kd_weight)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
        self.temperature, self.ce_weight, self.kd_weight = temperature, ce_weight, kd_weight
        self.label_smoothing, self.standardize = label_smoothing, standardize

    def terms(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The weighted terms by name; their sum is the loss."""
        ce, kd = kd_loss(
            student_logits,
            teacher_logits,
            target,
            temperature=self.temperature,
            ce_weight=self.ce_weight,
            kd_weight=self.kd_weight,
            label_smoothing=self.label_smoothing,
            standardize=self.standardize,
        )
        return {"ce": ce, "kd": kd}

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
        return sum(self.terms(student_logits, teacher_logits, target).values())


def check_positive(name: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be a positive number, got {value}")


def check_weight(name: str, value: float) -> None:
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be zero or a positive number, got {value}")
