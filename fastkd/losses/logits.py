"""Losses from logits [N, C]. Most of them are one call of the fused kernel in kernels/logit_loss.py."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from ..kernels import dist_loss, dkd_loss, kd_loss, logit_loss, topk_kd_loss
from ..kernels.check import check_tensors
from ..kernels.logit_loss import LogitLoss, standardized
from .base import Loss

SHARED = ("temperature", "label_smoothing", "ignore_index")  # options of every loss with a cross-entropy


@dataclass(eq=False, repr=False)
class KDLoss(Loss):
    """ce_weight * CE(z_s, y) + kd_weight * T^2 * KL(p_t^T || p_s^T); Hinton et al. 2015, arXiv:1503.02531.

    The defaults are the usual ones for CIFAR; for ImageNet temperature 1 and weights 0.5 / 0.5 are common.
    `standardize=True` is logit standardisation (arXiv:2403.01427), usually with temperature 2 and kd_weight 9.
    student_logits, teacher_logits: [N, C], not probabilities. target: class indices [N] int64, or probabilities [N, C]
    floating, or None if ce_weight is 0. Rows labelled `ignore_index` have no cross-entropy, but they keep the KD term;
    with `mask_kd=True` they have neither, and both means are over the other rows.
    `reduction` is "mean", "sum" or "none", which gives [N]: the loss of each sample. `class_weights` [C] are the
    `weight` of torch's cross_entropy: a weighted mean for labels. They follow the module to its device.
    A floating target is not normalised: the sum of a row scales its cross-entropy. `label_smoothing` is applied to it
    as well, even if mixup has smoothed it already; `ignore_index` has no effect.
    A label outside the classes is a ValueError on the CPU. Not checked on a GPU, since the check would synchronise: the
    loss and the gradient of that row are then NaN. FASTKD_DEBUG=1 in the environment enables the check there.
    """

    temperature: float = 4.0
    ce_weight: float = 0.1
    kd_weight: float = 0.9
    label_smoothing: float = 0.0
    standardize: bool = False
    ignore_index: int | None = None
    reduction: str = "mean"
    class_weights: Sequence[float] | Tensor | None = None
    mask_kd: bool = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "KDLoss":
        """`to`, `cuda` and their like move class_weights, an option and so no buffer."""
        super()._apply(fn, recurse)
        if self.class_weights is not None:
            self.class_weights = fn(cast(Tensor, self.class_weights))
        return self

    def terms(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None) -> dict[str, Tensor]:
        """The weighted terms by name; their sum is the loss."""
        fused = kd_loss(student_logits, teacher_logits, target, **self.settings())
        return {"ce": fused.ce, "kd": fused.kd}

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None) -> Tensor:
        return kd_loss(student_logits, teacher_logits, target, **self.settings()).loss


@dataclass(eq=False, repr=False)
class MutualLoss(Loss):
    """Networks that teach one another: DML (arXiv:1706.00384), or DCM with several heads each (arXiv:2008.07816).

    The loss is the sum over all heads p of ce_weight * CE(p), plus the sum over all pairs of a head p and a head q of
    another network of kl_weight * T^2 * KL(sg q || p), divided by the number of other networks.
    `pair_weights` [K][K], K = the largest number of heads of a network: entry [k][l] scales the KL term by which head k
    learns from head l (DCM's same-stage and cross-stage weights).
    heads[n][k]: logits [N, C] of classifier k of network n. target: class indices [N] int64, or probabilities [N, C]
    floating, or None if ce_weight is 0. Every head that requires a gradient gets one; as a target of other heads it is
    a constant.
    """

    temperature: float = 1.0
    ce_weight: float = 1.0
    kl_weight: float = 1.0
    pair_weights: Sequence[Sequence[float]] | Tensor | None = None
    label_smoothing: float = 0.0
    ignore_index: int | None = None

    def fused(self, heads: Sequence[Sequence[Tensor]], target: Tensor | None) -> LogitLoss:
        """`loss`, a scalar, and `terms` [H, 1 + H] of all H heads, those of the first network first."""
        counts = _counts(heads)
        K = max(counts)
        pairs = [[1.0] * K] * K if self.pair_weights is None else self.pair_weights
        if len(pairs) != K:
            raise ValueError(
                f"pair_weights is [{len(pairs)}, {len(pairs)}]; networks with {counts} heads need [{K}, {K}]"
            )
        places = [(n, k) for n, count in enumerate(counts) for k in range(count)]
        table = [
            [0.0 if n == m else self.kl_weight * float(pairs[k][j]) / (len(counts) - 1) for m, j in places]
            for n, k in places
        ]
        every = [z for net in heads for z in net]
        return logit_loss(every, target, [self.ce_weight] * len(every), table, **self.settings(*SHARED))

    def terms(self, heads: Sequence[Sequence[Tensor]], target: Tensor | None) -> dict[str, Tensor]:
        """ce1, kl1, ce2, kl2, ...: the weighted terms of each network, summed over its heads."""
        rows = self.fused(heads, target).terms.split([len(net) for net in heads])
        terms: dict[str, Tensor] = {}
        for n, mine in enumerate(rows, 1):
            terms |= {f"ce{n}": mine[:, 0].sum(), f"kl{n}": mine[:, 1:].sum()}
        return terms

    def forward(self, heads: Sequence[Sequence[Tensor]], target: Tensor | None) -> Tensor:
        return self.fused(heads, target).loss


def _counts(heads: Sequence[Sequence[Tensor]]) -> list[int]:
    """The number of heads of each network. TypeError or ValueError unless heads is a list of lists of logits."""
    if isinstance(heads, dict) or not hasattr(heads, "__len__"):
        raise TypeError(
            f"heads must be a list with the logits of each network, heads[n][k], got {type(heads).__name__}"
        )
    for net in heads:
        if isinstance(net, Tensor) and net.dim() < 3:
            shapes = [list(net.shape) if isinstance(net, Tensor) else type(net).__name__ for net in heads]
            raise ValueError(f"heads[n] must be a list of logits [N, C]; for one classifier write [z]; got {shapes}")
        if isinstance(net, dict) or not hasattr(net, "__len__"):
            raise TypeError(f"heads[n] must be a list of logits [N, C], got {[type(net).__name__ for net in heads]}")
    counts = [len(net) for net in heads]
    if len(counts) < 2 or not all(counts):
        raise ValueError(f"heads[n][k] needs two networks or more, got {counts} heads")
    return counts


@dataclass(eq=False, repr=False)
class BridgeLoss(Loss):
    """SOKD (arXiv:2111.11747): the student S learns from the bridge A, the bridge from the teacher T and the student.

    L_S = ce_s CE(z_S, y) + kd_sa KD(S <- A),   L_A = ce_a CE(z_A, y) + kd_at KD(A <- T) + kd_as KD(A <- S)
    with KD(a <- b) = T^2 KL(sg p_b || p_a). Temperature 4 and all weights 1 as in the authors' code.
    student, bridge, teacher: logits [N, C]. target: class indices [N] int64, or probabilities [N, C] floating, or None
    if ce_s and ce_a are 0. The student gets the gradient of L_S only, the bridge that of L_A only, the teacher none.
    """

    temperature: float = 4.0
    ce_s: float = 1.0
    kd_sa: float = 1.0
    ce_a: float = 1.0
    kd_at: float = 1.0
    kd_as: float = 1.0
    label_smoothing: float = 0.0
    ignore_index: int | None = None

    def fused(self, student: Tensor, bridge: Tensor, teacher: Tensor, target: Tensor | None) -> LogitLoss:
        """`loss`, a scalar, and `terms` [3, 4] of student, bridge and teacher."""
        check_tensors(student=student, bridge=bridge, teacher=teacher)
        table = [[0.0, self.kd_sa, 0.0], [self.kd_as, 0.0, self.kd_at], [0.0, 0.0, 0.0]]
        heads = [student, bridge, teacher.detach()]
        return logit_loss(heads, target, [self.ce_s, self.ce_a, 0.0], table, **self.settings(*SHARED))

    def terms(self, student: Tensor, bridge: Tensor, teacher: Tensor, target: Tensor | None) -> dict[str, Tensor]:
        """The five weighted terms by name."""
        (ce_s, _, kd_sa, _), (ce_a, kd_as, _, kd_at), _ = self.fused(student, bridge, teacher, target).terms.unbind()
        return {"ce_s": ce_s, "kd_sa": kd_sa, "ce_a": ce_a, "kd_at": kd_at, "kd_as": kd_as}

    def forward(self, student: Tensor, bridge: Tensor, teacher: Tensor, target: Tensor | None) -> Tensor:
        return self.fused(student, bridge, teacher, target).loss


@dataclass(eq=False, repr=False)
class DKDLoss(Loss):
    """T^2 (alpha TCKD + beta NCKD), decoupled distillation; Zhao et al. 2022, arXiv:2203.08679. No cross-entropy.

    student_logits, teacher_logits: [N, C], C >= 2. target: class indices [N] int64.
    The authors' code multiplies the loss by min(epoch / 20, 1), epochs counted from 1, and by 1 on ImageNet. Without
    this ramp, the first steps may diverge at beta 8 and a high learning rate.
    `standardize=True` is logit standardisation (arXiv:2403.01427): the logits are z-scored first, in torch.
    """

    alpha: float = 1.0
    beta: float = 8.0
    temperature: float = 4.0
    standardize: bool = False

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
        if self.standardize:
            student_logits, teacher_logits = _standardized(student_logits), _standardized(teacher_logits.detach())
        return dkd_loss(student_logits, teacher_logits, target, **self.settings("alpha", "beta", "temperature"))


@dataclass(eq=False, repr=False)
class TopKLoss(Loss):
    """weight * T^2 * KL over k + 1 outcomes: the teacher's k most probable classes, and all others together.

    `values, classes = topk_of(teacher_logits, k, T)`, at the same temperature T; student_logits: [N, C], values:
    [N, k + 1], classes: [N, k]. No cross-entropy. It lies below the whole KL, and its gradient differs only in the
    other classes, by at most weight * T / N * (the teacher's mass outside of the k classes).
    """

    temperature: float = 4.0
    weight: float = 1.0

    def forward(self, student_logits: Tensor, values: Tensor, classes: Tensor) -> Tensor:
        return topk_kd_loss(student_logits, values, classes, **self.settings())


@dataclass(eq=False, repr=False)
class DISTLoss(Loss):
    """T^2 [beta (1 - mean row correlation) + gamma (1 - mean column correlation)] of the softmaxes; arXiv:2205.10536.

    student_logits, teacher_logits: [N, C]. No cross-entropy. The defaults are those of the authors' code for CIFAR; for
    ImageNet it has temperature 1.
    """

    beta: float = 2.0
    gamma: float = 2.0
    temperature: float = 4.0

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        return dist_loss(student_logits, teacher_logits, **self.settings())


def _standardized(logits_NC: Tensor) -> Tensor:
    """The z-score of each row, but for its mean, in fp32 at least."""
    return standardized(logits_NC.to(torch.promote_types(logits_NC.dtype, torch.float32)))
