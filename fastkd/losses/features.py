"""Losses from feature maps [N, C, H, W] (channels-last is the fast layout) and from pooled features [N, D]."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import cast

from torch import Tensor, nn

from .. import kernels
from ..kernels.check import check_tensors
from .base import Loss

Maps = Tensor | Sequence[Tensor]  # of one stage, or of every stage


@dataclass(eq=False, repr=False)
class FactorTransferLoss(Loss):
    """weight * ( mean |f^_s - f^_t|^p )^(1/p), f^ = the factor divided by its norm per sample; FT, arXiv:1802.04977.

    student_factor and teacher_factor: [N, C, H, W], the outputs of the translator and the paraphraser. p is 1 or 2.
    """

    p: int = 1
    weight: float = 500.0

    def forward(self, student_factor: Tensor, teacher_factor: Tensor) -> Tensor:
        return kernels.factor_distance([student_factor], teacher_factor, [self.weight], self.p).loss


@dataclass(eq=False, repr=False)
class InheritanceLoss(FactorTransferLoss):
    """( mean |f^_inh - f^_t|^p )^(1/p) over all elements: inherit from the teacher; IE-KD, arXiv:2107.00181.

    student_factor: the inheriting half of the student's channels, encoded. teacher_factor: the teacher's map, encoded.
    """

    weight: float = field(default=1.0, init=False)


@dataclass(eq=False, repr=False)
class ExplorationLoss(FactorTransferLoss):
    """-( mean |f^_exp - f^_t|^p )^(1/p): explore, away from the teacher; IE-KD, arXiv:2107.00181.

    student_factor and teacher_factor: as in InheritanceLoss, but from the exploring half of the channels. The value is
    negative, so that minimising it increases the distance.
    """

    weight: float = field(default=-1.0, init=False)


@dataclass(eq=False, repr=False)
class InheritanceExplorationLoss(Loss):
    """inheritance_weight * L_inh + exploration_weight * L_exp, both in one pass over the teacher's factor; IE-KD.

    inheritance, exploration, teacher: factors [N, C, H, W]. The weights 50 with p = 1 are reported to be best. A factor
    whose weight is 0 may be None.
    """

    p: int = 1
    inheritance_weight: float = 50.0
    exploration_weight: float = 50.0

    def terms(self, inheritance: Tensor | None, exploration: Tensor | None, teacher: Tensor) -> dict[str, Tensor]:
        """The weighted terms by name; their sum is the loss. A term of weight 0 is left out."""
        weights = {"inheritance": self.inheritance_weight, "exploration": -self.exploration_weight}
        factors = {"inheritance": inheritance, "exploration": exploration}
        used = {name: factors[name] for name, weight in weights.items() if weight}
        if not used:
            return {}
        check_tensors(**used, teacher=teacher)
        student_factors = cast(list[Tensor], [*used.values()])  # checked above
        fused = kernels.factor_distance(student_factors, teacher, [weights[name] for name in used], self.p)
        return dict(zip(used, fused.terms.unbind(), strict=True))

    def forward(self, inheritance: Tensor | None, exploration: Tensor | None, teacher: Tensor) -> Tensor:
        return sum(self.terms(inheritance, exploration, teacher).values(), teacher.new_zeros(()))


@dataclass(eq=False, repr=False)
class AttentionTransferLoss(Loss):
    """weight * sum over stages of mean (a_s - a_t)^2, a = l2norm(flatten(mean_c f^2)); AT, arXiv:1612.03928.

    student_maps [N, Cs, H, W] and teacher_maps [N, Ct, H, W]: the maps of one stage, or lists with one map per stage.
    """

    weight: float = 1000.0

    def forward(self, student_maps: Maps, teacher_maps: Maps) -> Tensor:
        return _sum_over_stages(kernels.attention_transfer, (student_maps, teacher_maps), self.weight)


@dataclass(eq=False, repr=False)
class OverhaulLoss(Loss):
    """weight * sum over L stages l of 2^-(L-l) partial-L2(f_s, max(f_t, margin)); OFD, arXiv:1904.01866.

    student_maps, teacher_maps: maps [N, C, H, W] before the ReLU; the student's have passed its connectors. margins:
    [C], from `OverhaulLoss.margins(batch_norms)`. Each is a tensor for one stage, or a list with one per stage. The
    loss is a sum over elements and a mean over the batch.
    """

    weight: float = 1e-3

    @staticmethod
    def margins(norms: Iterable[nn.Module]) -> list[Tensor]:
        """The margins [C] from the current weights and biases of the teacher's BatchNorms, one BatchNorm per map."""
        if isinstance(norms, nn.Module) and not isinstance(norms, Iterable):
            raise TypeError(f"margins needs a list of BatchNorms, one for each map, got one {type(norms).__name__}")
        return [kernels.bn_margin(cast(Tensor, norm.weight), cast(Tensor, norm.bias)) for norm in norms]

    def forward(self, student_maps: Maps, teacher_maps: Maps, margins: Maps) -> Tensor:
        return _sum_over_stages(kernels.overhaul_distance, (student_maps, teacher_maps, margins), self.weight, base=2)


@dataclass(eq=False, repr=False)
class HintLoss(Loss):
    """weight * mean (f_s - f_t)^2 over all elements of one stage; FitNets, arXiv:1412.6550.

    student_map: the output of the student's regressor. teacher_map: the teacher's map. Both are [N, C, H, W].
    """

    weight: float = 100.0

    def forward(self, student_map: Tensor, teacher_map: Tensor) -> Tensor:
        return kernels.hint_distance(student_map, teacher_map, weight=self.weight)


@dataclass(eq=False, repr=False)
class RKDLoss(Loss):
    """distance_weight * mean_ij h(d_s, d_t) + angle_weight * mean_ijk h(a_s, a_t); Park et al. 2019, arXiv:1904.05068.

    d: distances of samples over their mean; a: cosines of the angles of triples; h: smooth L1. student_features [N, D]
    and teacher_features [N, D2] are pooled features.
    """

    distance_weight: float = 25.0
    angle_weight: float = 50.0

    def forward(self, student_features: Tensor, teacher_features: Tensor) -> Tensor:
        return kernels.rkd_loss(student_features, teacher_features, **self.settings())


@dataclass(eq=False, repr=False)
class SPLoss(Loss):
    """weight * |G_s - G_t|_F^2 / N^2, G the row-normalised Gram matrix of the batch; SP, arXiv:1907.09682.

    student_map, teacher_map: maps or features [N, ...]; only N must be equal.
    """

    weight: float = 3000.0

    def forward(self, student_map: Tensor, teacher_map: Tensor) -> Tensor:
        return self.weight * kernels.sp_loss(student_map, teacher_map)


def _sum_over_stages(distance: Callable[..., Tensor], maps: Iterable[Maps], weight: float, base: int = 1) -> Tensor:
    """The sum of weight * base^-(L-l) * distance over L stages l. An error names the stage, if there are several."""
    for stages in maps:
        if not isinstance(stages, Iterable):
            raise TypeError(f"maps and margins must be a tensor or a list of tensors, got {type(stages).__name__}")
    lists = [[stages] if isinstance(stages, Tensor) else list(stages) for stages in maps]
    L = len(lists[0])
    if not L or any(len(stages) != L for stages in lists):
        raise ValueError(f"give one or more maps, equally many of each: got {[len(stages) for stages in lists]}")
    values = []
    for number, tensors in enumerate(zip(*lists, strict=True), 1):
        try:
            values.append(distance(*tensors, weight=weight / base ** (L - number)))
        except (TypeError, ValueError) as error:
            raise type(error)(f"stage {number} of {L}: {error}" if L > 1 else str(error)) from None
    return sum(values[1:], values[0])
