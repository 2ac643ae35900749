"""DKD: KD divided into a term for the true class and a term for the other classes (arXiv:2203.08679).

    L = ce_weight * CE(z_s, y) + r * T^2 * (alpha * TCKD + beta * NCKD),    r = min(epoch / ramp_epochs, 1)
    TCKD = KL((p_y, 1 - p_y) of teacher || of student),    NCKD = KL of the softmaxes over all classes but y

The ramp r counts epochs from 1, as the authors' code does.
Defaults: ce_weight 1, alpha 1, beta 8, T = 4, ramp_epochs 20, from that code for CIFAR-100, where beta depends on the
pair (`fastkd recipes`; ResNet-56 to ResNet-20: 2); for ImageNet T = 1, ramp_epochs 1 and beta
0.5 (ResNet-34 to ResNet-18) or 2 (ResNet-50 to MobileNets). `standardize` is logit standardisation (arXiv:2403.01427),
whose code has T = 2 and multiplies alpha and beta by 9.
Departures: in a run of fewer than 2 ramp_epochs the ramp takes half of the epochs; the log says so.
Ours: with soft labels (mixup, CutMix, smoothing), y is the class with the largest probability.
"""

import math
from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.base import Loader
from ..errors import check_number
from ..losses import DKDLoss
from .base import Method, check_weights
from .context import RunContext
from .forwards import ForwardCache


@dataclass(frozen=True)
class DKDOptions:
    """Decoupled distillation."""

    temperature: float = 4.0
    """Softens both networks' logits before they are compared; above 0."""
    ce_weight: float = 1.0
    """Weight of the cross-entropy with the labels; from 0."""
    alpha: float = 1.0
    """Weight of T^2 * TCKD, the true class against all others; from 0."""
    beta: float = 8.0
    """Weight of T^2 * NCKD, the other classes among themselves; from 0."""
    ramp_epochs: float = 20.0
    """Epochs over which both weights rise to their full value; 0: they have it from the first step."""
    standardize: bool = False
    """Z-score each row of logits before the softmax (logit standardisation)."""

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, above_zero=True)
        check_number("ramp_epochs", self.ramp_epochs)
        check_weights(ce_weight=self.ce_weight, alpha=self.alpha, beta=self.beta)


class DKD(Method):
    """Separate terms for the true class and the others (Zhao et al. 2022)."""

    Options = DKDOptions
    options: DKDOptions
    paper = "arXiv:2203.08679"
    uses_logits_alone = True
    needs_labels = True

    ramp: Tensor
    takes_bce = True

    def build(self) -> None:
        o = self.options
        self.loss = DKDLoss(o.alpha, o.beta, o.temperature, o.standardize)
        self.ramp_epochs = o.ramp_epochs
        self.register_buffer("ramp", torch.ones(()), persistent=False)  # a tensor, so that a captured step follows it

    def prepare(self, loader: Loader, run: RunContext = RunContext()) -> None:  # noqa: B008, frozen
        """A short run does not spend most of its epochs in the ramp."""
        self.ramp_epochs = min(self.options.ramp_epochs, run.epochs / 2)
        if self.ramp_epochs < self.options.ramp_epochs:
            run.log(
                f"--ramp-epochs {self.options.ramp_epochs:g} is more than half of --epochs {run.epochs}: the DKD term "
                f"has its full weight from epoch {math.ceil(self.ramp_epochs)} on"
            )

    def spread_over(self, before: int, now: int) -> list[str]:
        old, new = (min(self.options.ramp_epochs, epochs / 2) for epochs in (before, now))
        return (
            [f"the DKD term has its full weight from epoch {math.ceil(new)} on, not {math.ceil(old)}"]
            if old != new
            else []
        )

    def at_epoch(self, epoch: float) -> None:
        self.ramp.fill_(min(math.floor(epoch + 1) / self.ramp_epochs, 1.0) if self.ramp_epochs else 1.0)

    def losses(self, out: ForwardCache, target: Tensor, plan: Hashable) -> dict[str, Tensor]:
        ours, theirs = out(self.student), out(self.teacher)
        labels = target.argmax(1) if target.is_floating_point() else target
        return {
            "ce": self.hard_loss(ours, target, self.options.ce_weight),
            "dkd": self.ramp * self.loss(ours, theirs, labels),
        }
