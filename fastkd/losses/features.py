"""Losses from feature maps [N, C, H, W] (channels-last is the fast layout) and from pooled features [N, D]."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from torch import Tensor, nn

from ..kernels import (
    attention_transfer,
    bn_margin,
    factor_distance,
    hint_distance,
    overhaul_distance,
    rkd_loss,
    sp_loss,
)
from ..kernels.check import check_tensors
from .base import Loss
from .checks import check_order, check_weight


class FactorTransferLoss(Loss):
    """weight * ( mean |f^_s - f^_t|^p )^(1/p), f^ = the factor over its norm per sample; FT, arXiv:1802.04977.

    Called with student_factor and teacher_factor [N, C, H, W], of translator and paraphraser. p is 1 or 2.
    """

    checks = {"p": check_order, "weight": check_weight}

    def __init__(self, p: int = 1, weight: float = 500.0):
        super().__init__()
        self.p, self.weight = p, weight

    def forward(self, student_factor: Tensor, teacher_factor: Tensor) -> Tensor:
        return factor_distance([student_factor], teacher_factor, [self.weight], self.p).loss


class InheritanceLoss(FactorTransferLoss):
    """( mean |f^_inh - f^_t|^p )^(1/p) over all elements: draws a part to the teacher; IE-KD, arXiv:2107.00181.

    Called with student_factor and teacher_factor [N, C, H, W]: the inheriting half of the student's channels through
    its translator, and the teacher's map through the paraphraser's encoder. Gradient to the student only. p is 1 or 2.
    """

    def __init__(self, p: int = 1):
        super().__init__(p, weight=1.0)


class ExplorationLoss(Loss):
    """-( mean |f^_exp - f^_t|^p )^(1/p): drives a part away from the teacher; IE-KD, arXiv:2107.00181.

    Called like InheritanceLoss, with the factor of the exploring half. Its value is negative: what is minimised is the
    resemblance.
    """

    checks = {"p": check_order}

    def __init__(self, p: int = 1):
        super().__init__()
        self.p = p

    def forward(self, student_factor: Tensor, teacher_factor: Tensor) -> Tensor:
        return factor_distance([student_factor], teacher_factor, [-1.0], self.p).loss


class InheritanceExplorationLoss(Loss):
    """inheritance_weight * L_inh + exploration_weight * L_exp, both in one pass over the teacher's factor; IE-KD.

    Called with the student's two factors, inheritance and exploration, and the teacher's, all [N, C, H, W]; 50 each
    with p = 1 is said to be best. A part of weight 0 may be None.
    """

    checks = {"p": check_order, "inheritance_weight": check_weight, "exploration_weight": check_weight}

    def __init__(self, p: int = 1, inheritance_weight: float = 50.0, exploration_weight: float = 50.0):
        super().__init__()
        self.p, self.inheritance_weight, self.exploration_weight = p, inheritance_weight, exploration_weight

    def terms(self, inheritance: Tensor | None, exploration: Tensor | None, teacher: Tensor) -> dict[str, Tensor]:
        """The weighted terms by name, those of weight 0 left out; their sum is the loss."""
        weights = {"inheritance": self.inheritance_weight, "exploration": -self.exploration_weight}
        parts = {"inheritance": inheritance, "exploration": exploration}
        used = {name: parts[name] for name, weight in weights.items() if weight}
        if not used:
            return {}
        check_tensors(**used, teacher=teacher)
        fused = factor_distance([*used.values()], teacher, [weights[name] for name in used], self.p)
        return dict(zip(used, fused.terms.unbind(), strict=True))

    def forward(self, inheritance: Tensor | None, exploration: Tensor | None, teacher: Tensor) -> Tensor:
        return sum(self.terms(inheritance, exploration, teacher).values(), teacher.new_zeros(()))


class AttentionTransferLoss(Loss):
    """weight * sum over stages of mean (a_s - a_t)^2, a = l2norm(flatten(mean_c f^2)); AT, arXiv:1612.03928.

    Called with the maps of one stage, or two lists of maps, stage by stage: [N, Cs, H, W] and [N, Ct, H, W].
    """

    checks = {"weight": check_weight}

    def __init__(self, weight: float = 1000.0):
        super().__init__()
        self.weight = weight

    def forward(self, student_maps: Tensor | Sequence[Tensor], teacher_maps: Tensor | Sequence[Tensor]) -> Tensor:
        stages = _stages(student_maps, teacher_maps)
        return sum(_at_stage(number, len(stages), attention_transfer, *maps, self.weight)
                   for number, maps in enumerate(stages, 1))  # fmt: skip


class OverhaulLoss(Loss):
    """weight * sum over L stages l of 2^-(L-l) partial-L2(f_s, max(f_t, margin)); OFD, arXiv:1904.01866.

    Called with maps before the ReLU, stage by stage, the student's through its connectors, and the teacher's margins
    [C], from `OverhaulLoss.margins(batch_norms)`: of one stage, or three lists. A sum over elements, a mean over the
    batch.
    """

    checks = {"weight": check_weight}

    def __init__(self, weight: float = 1e-3):
        super().__init__()
        self.weight = weight

    @staticmethod
    def margins(norms: Iterable[nn.Module]) -> list[Tensor]:
        """The margins [C] from the teacher's BatchNorms, of which each gives one map; as they are now."""
        if isinstance(norms, nn.Module) and not isinstance(norms, Iterable):
            raise TypeError(f"margins needs a list of BatchNorms, one for each map, got one {type(norms).__name__}")
        return [bn_margin(norm.weight, norm.bias) for norm in norms]

    def forward(
        self,
        student_maps: Tensor | Sequence[Tensor],
        teacher_maps: Tensor | Sequence[Tensor],
        margins: Tensor | Sequence[Tensor],
    ) -> Tensor:
        stages = _stages(student_maps, teacher_maps, margins)
        weights = [self.weight / 2 ** (len(stages) - number) for number in range(1, len(stages) + 1)]
        return sum(_at_stage(number, len(stages), partial(overhaul_distance, weight=weight), *maps)
                   for number, (maps, weight) in enumerate(zip(stages, weights, strict=True), 1))  # fmt: skip


class HintLoss(Loss):
    """weight * mean (f_s - f_t)^2 over all elements of one stage; FitNets, arXiv:1412.6550.

    Called with the student's map through its regressor and the teacher's, both [N, C, H, W].
    """

    checks = {"weight": check_weight}

    def __init__(self, weight: float = 100.0):
        super().__init__()
        self.weight = weight

    def forward(self, student_map: Tensor, teacher_map: Tensor) -> Tensor:
        return hint_distance(student_map, teacher_map, weight=self.weight)


class RKDLoss(Loss):
    """Relations between samples, distances and angles; Park et al. 2019, arXiv:1904.05068.

    Called with pooled features [N, D] and [N, D2].
    """

    checks = {"distance_weight": check_weight, "angle_weight": check_weight}

    def __init__(self, distance_weight: float = 25.0, angle_weight: float = 50.0):
        super().__init__()
        self.distance_weight, self.angle_weight = distance_weight, angle_weight

    def forward(self, student_features: Tensor, teacher_features: Tensor) -> Tensor:
        weights = {"distance_weight": self.distance_weight, "angle_weight": self.angle_weight}
        return rkd_loss(student_features, teacher_features, **weights)


class SPLoss(Loss):
    """weight * |G_s - G_t|_F^2 / N^2, G the row-normalised Gram matrix of the batch; SP, arXiv:1907.09682.

    Called with maps or features [N, ...]; only N must agree.
    """

    checks = {"weight": check_weight}

    def __init__(self, weight: float = 3000.0):
        super().__init__()
        self.weight = weight

    def forward(self, student_map: Tensor, teacher_map: Tensor) -> Tensor:
        return self.weight * sp_loss(student_map, teacher_map)


def _stages(*maps: Tensor | Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    for stages in maps:
        if not isinstance(stages, Iterable):
            raise TypeError(f"maps and margins must be a tensor of one stage or a list, got {type(stages).__name__}")
    lists = [[stages] if isinstance(stages, Tensor) else list(stages) for stages in maps]
    if not lists[0] or len({len(stages) for stages in lists}) > 1:
        raise ValueError(f"as many maps are needed of each, one or more: got {[len(stages) for stages in lists]}")
    return list(zip(*lists, strict=True))


def _at_stage(number: int, stages: int, distance: Callable[..., Tensor], *arguments) -> Tensor:
    """The distance; what does not fit is reported with the stage."""
    if stages == 1:
        return distance(*arguments)
    try:
        return distance(*arguments)
    except (TypeError, ValueError) as error:
        raise type(error)(f"stage {number} of {stages}: {error}") from None
