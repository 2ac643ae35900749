"""IE-KD: one half of the student's channels inherits the teacher's knowledge, the other explores (arXiv:2107.00181).

    L = ce_weight * CE(z_s, y) + inheritance_weight * L_inh + exploration_weight * L_exp   (+ kd_weight * KD)
    L_inh = ( sum |F^_inh - F^_t|^p / N_el )^(1/p),   L_exp = -( sum |F^_exp - F^_t|^p / N_el )^(1/p)
    x^ = flatten(x) / ||flatten(x)||_2 per sample;   N_el: the elements of the whole batch

The last stage's maps are compared. F_t: the teacher's, through the encoder of an auto-encoder that is trained on them
before the first epoch and then frozen. F_inh, F_exp: the first half of the student's channels and the rest, each
through an encoder of its own, which learns with the student and is no part of it.

From the authors' code: the tap, the encoders, the auto-encoder and its training (30 epochs, rate 0.1, mean absolute
error), the split, the two losses. From second-hand notes on the paper: weights 50, halves and p = 1 are best.
Ours: the exact formulas of the variants `attention` (IE-AT: AT's distance of each half) and `overhaul` (IE-OD: OFD's
partial squared error of each half through a 1x1 convolution and BatchNorm, against the teacher's map before its ReLU),
same two signs. Their distances are scaled so that the weight 50 gives AT's 1000 and OFD's 1e-3. The exploring half's
BatchNorm in IE-OD has no scale and shift: with them the negative distance would have no lower bound.
Departures: the code swaps the names of teacher and student, sends gradients into the frozen net and runs decoders
that nothing trains; none of that here. In Wide ResNets the last stage's map is not activated. A term of weight 0 is
left out.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..losses import AttentionTransferLoss, InheritanceExplorationLoss, KDLoss, OverhaulLoss
from ..models import PreActivation
from ..models.nets.init import he_init
from ..models.stages.shapes import check_stage_shapes
from .base import FrozenTeacher, Method, RunContext, check_temperature, check_weights, cross_entropy
from .parts.autoencoder import Coder
from .parts.teacher_autoencoder import check_auto_encoder, fingerprint, fit_encoder, teacher_maps

Variant = Literal["factor", "attention", "overhaul"]
Split = Literal["natural", "random"]
ATTENTION_SCALE, OVERHAUL_SCALE = 1000 / 50, 1e-3 / 50
FILE = "autoencoder.safetensors"


@dataclass(frozen=True)
class IEKDOptions:
    """Inheritance and exploration."""

    variant: Variant = "factor"
    """What is compared: factors of an auto-encoder (IE-FT), attention maps (IE-AT), maps before the ReLU (IE-OD)."""
    inheritance_weight: float = 50.0
    """Weight of the distance that the inheriting half makes small; from 0."""
    exploration_weight: float = 50.0
    """Weight of the distance that the exploring half makes great; from 0."""
    ce_weight: float = 1.0
    """Weight of the cross-entropy with the labels; from 0."""
    kd_weight: float = 0.0
    """Weight of T^2 * KL(teacher || student) of the logits; from 0, which leaves it out."""
    temperature: float = 4.0
    """Of that KL; above 0."""
    p: int = 1
    """Norm in which factors are compared: 1 or 2."""
    split: Split = "natural"
    """Which channels inherit: the first half, or a random one drawn from --seed."""
    ae_epochs: int = 30
    """Passes over the training images for the teacher's auto-encoder (variant factor)."""
    ae_lr: float = 0.1
    """Its constant learning rate."""
    ae_error: Literal["l1", "l2"] = "l1"
    """Its error: mean absolute (l1) or mean squared (l2)."""

    def __post_init__(self):
        for name, choices in (("variant", get_args(Variant)), ("split", get_args(Split))):
            if getattr(self, name) not in choices:
                raise UserError(f"--{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.p not in (1, 2):
            raise UserError(f"--p must be 1 or 2, got {self.p}")
        names = ("ce_weight", "kd_weight", "inheritance_weight", "exploration_weight")
        check_weights(**{name: getattr(self, name) for name in names})
        check_temperature(self.temperature)
        check_auto_encoder(self)

    @property
    def weights(self) -> tuple[float, float]:
        return self.inheritance_weight, self.exploration_weight


class IEKD(Method):
    """Half of the student inherits from the teacher, half explores (Huang et al. 2021)."""

    Options = IEKDOptions
    paper = "arXiv:2107.00181"
    needs_stages = "both staged, equal last H x W; overhaul: a teacher that OFD can use"

    def __init__(self, student, teacher, options=None, peers=()):
        super().__init__(student, teacher, options, peers)
        self.kd = KDLoss(self.options.temperature, self.options.ce_weight, self.options.kd_weight)
        self.halves = None
        if any(self.options.weights):
            self._compare()

    def _compare(self) -> None:
        mine, theirs = (shapes[-1][0] for shapes in check_stage_shapes(self.student, self.teacher.net, "IE-KD", -1))
        if min(mine, theirs) < 2:
            raise UserError(f"IE-KD halves channels; the last stages of student and teacher have {mine} and {theirs}")
        self.request_features(self.student)
        self.request_features(self.teacher)
        self.half = mine // 2
        if self.options.split == "random":
            self.register_buffer("order", _permutation(mine, seed=0))
        sizes = (self.half, mine - self.half, theirs)
        if self.options.variant == "overhaul":
            self.staged_views[self.teacher] = PreActivation(self.teacher.net)
            self.halves = Overhaul(*sizes, self.options, self.staged_views[self.teacher].norms[-1])
        else:
            self.halves = (Factors if self.options.variant == "factor" else Attention)(*sizes, self.options)

    def prepare(self, loader, run=RunContext()):  # noqa: B008, frozen
        if self.halves is not None and self.options.split == "random":
            self.order.copy_(_permutation(len(self.order), run.seed))  # a checkpoint that is resumed has the same one
        if isinstance(self.halves, Factors):
            about = {"teacher": fingerprint(self.teacher.net), "batches": len(loader)}
            maps = teacher_maps(self.staged_views[self.teacher], loader, run)
            fit_encoder(self.halves.teacher.net, maps, self.options, about, FILE, run)
            self.halves.ready = True

    def split(self, maps_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        """The channels that inherit, and those that explore."""
        if self.options.split == "random":
            maps_NCHW = maps_NCHW.index_select(1, self.order)
        return maps_NCHW[:, : self.half], maps_NCHW[:, self.half :]

    def losses(self, out, target, plan):
        if self.options.kd_weight:
            terms = self.kd.terms(out(self.student), out(self.teacher), target)
        else:
            terms = {"ce": cross_entropy(out(self.student), target, self.options.ce_weight)}
        if self.halves is None:
            return terms
        inheritance, exploration = self.split(out.features(self.student)[-1])
        return terms | self.halves(inheritance, exploration, out.features(self.teacher)[-1])


class Factors(nn.Module):
    """IE-FT: each half through an encoder of its own, the teacher's map through a frozen one."""

    def __init__(self, inheriting: int, exploring: int, teacher: int, options: IEKDOptions):
        super().__init__()
        inheritance_weight, exploration_weight = options.weights
        self.inheritance = Coder(inheriting, teacher // 2) if inheritance_weight else None
        self.exploration = Coder(exploring, teacher // 2) if exploration_weight else None
        self.teacher = FrozenTeacher(Coder(teacher, teacher // 2))
        self.loss = InheritanceExplorationLoss(options.p, inheritance_weight, exploration_weight)
        self.ready = False

    def forward(self, inheritance: Tensor, exploration: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        if not self.ready:
            raise UserError("the teacher's auto-encoder is not trained yet: call prepare(loader) before the first step")
        mine = self.inheritance(inheritance) if self.inheritance else None
        new = self.exploration(exploration) if self.exploration else None
        return self.loss.terms(mine, new, self.teacher(teacher))


class Attention(nn.Module):
    """IE-AT: the attention map of each half against the teacher's."""

    def __init__(self, inheriting: int, exploring: int, teacher: int, options: IEKDOptions):
        super().__init__()
        self.losses = [AttentionTransferLoss(ATTENTION_SCALE * weight) for weight in options.weights]

    def forward(self, inheritance: Tensor, exploration: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        near, far = self.losses
        terms = {"inheritance": near(inheritance, teacher)} if near.weight else {}
        return terms | ({"exploration": -far(exploration, teacher)} if far.weight else {})


class Overhaul(nn.Module):
    """IE-OD: each half, connected to the teacher's channels, against the teacher's map before its last ReLU."""

    def __init__(self, inheriting: int, exploring: int, teacher: int, options: IEKDOptions, norm: nn.Module):
        super().__init__()
        self.losses = [OverhaulLoss(OVERHAUL_SCALE * weight) for weight in options.weights]
        near, far = options.weights
        self.inheritance = _connector(inheriting, teacher, affine=True) if near else None
        self.exploration = _connector(exploring, teacher, affine=False) if far else None
        self.register_buffer("margin", OverhaulLoss.margins([norm])[0], persistent=False)

    def forward(self, inheritance: Tensor, exploration: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        near, far, terms = *self.losses, {}
        if self.inheritance:
            terms["inheritance"] = near(self.inheritance(inheritance), teacher, self.margin)
        if self.exploration:
            terms["exploration"] = -far(self.exploration(exploration), teacher, self.margin)
        return terms


def _connector(channels: int, wanted: int, affine: bool) -> nn.Module:
    connector = nn.Sequential(nn.Conv2d(channels, wanted, 1, bias=False), nn.BatchNorm2d(wanted, affine=affine))
    he_init(connector)
    return connector


def _permutation(channels: int, seed: int) -> Tensor:
    """The same on every process."""
    return torch.randperm(channels, generator=torch.Generator().manual_seed(seed))
