"""IE-KD: half of the student's channels inherits the teacher's knowledge, the other half explores (arXiv:2107.00181).

    L = ce_weight * CE(z_s, y) + inheritance_weight * L_inh + exploration_weight * L_exp   (+ kd_weight * KD)
    L_inh = ( sum |F^_inh - F^_t|^p / N_el )^(1/p),   L_exp = -( sum |F^_exp - F^_t|^p / N_el )^(1/p)
    x^ = flatten(x) / ||flatten(x)||_2 per sample;   N_el: the number of elements of the whole batch

The last stage's maps are compared. F_t: the teacher's maps, encoded by an auto-encoder that is trained on them before
the first epoch and then frozen. F_inh, F_exp: the first half of the student's channels and the rest, each encoded by a
separate encoder, which is trained with the student and not saved with it.

From the authors' code: the stage, the encoders, the auto-encoder and its training (30 epochs, learning rate 0.1, mean
absolute error), the split, the two losses. From second-hand notes on the paper: weights 50, halves and p = 1 are best.
Ours: the formulas of two variants, with the same two signs. `attention` (IE-AT): AT's distance of each half. `overhaul`
(IE-OD): each half passes a 1x1 convolution and BatchNorm, then OFD's partial squared error from the teacher's pre-ReLU
map. Both distances are scaled so that the weight 50 gives AT's 1000 and OFD's 1e-3. In IE-OD the exploring half's
BatchNorm has no scale and shift, because with them the negative distance would have no lower bound.
Departures: we do not swap the names of teacher and student, send gradients into the frozen network or run untrained
decoders, as the code does. A term of weight 0 is left out.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ..data.base import Loader
from ..errors import UserError, check_number
from ..losses import AttentionTransferLoss, InheritanceExplorationLoss, KDLoss, OverhaulLoss
from ..models import PreActivation
from ..models.nets.resnet import he_init
from ..models.stages.staged import check_stage_shapes, map_shapes, staged
from .base import Method, check_weights, cross_entropy
from .context import RunContext
from .forwards import ForwardCache
from .parts.autoencoder import Coder, TeacherEncoder, check_auto_encoder, factor_channels

Variant = Literal["factor", "attention", "overhaul"]
Split = Literal["natural", "random"]
ATTENTION_SCALE, OVERHAUL_SCALE = 1000 / 50, 1e-3 / 50


@dataclass(frozen=True)
class IEKDOptions:
    """Inheritance and exploration."""

    variant: Variant = "factor"
    """What is compared: factors of an auto-encoder (IE-FT), attention maps (IE-AT) or pre-ReLU maps (IE-OD)."""
    inheritance_weight: float = 50.0
    """Weight of the distance that the inheriting half minimises; from 0. 50 is reported to be best; the authors'
    released configuration has 1."""
    exploration_weight: float = 50.0
    """Weight of the distance that the exploring half maximises; from 0. As above: 50, and 1 in the released code."""
    ce_weight: float = 1.0
    """Weight of the cross-entropy with the labels; from 0."""
    kd_weight: float = 0.0
    """Weight of T^2 * KL(teacher || student) of the logits; from 0."""
    temperature: float = 4.0
    """Temperature T of that term; above 0."""
    p: int = 1
    """Norm of the distance between factors: 1 or 2."""
    split: Split = "natural"
    """Which channels inherit: the first half (natural), or a half drawn from --seed (random)."""
    factor_channels: int = 0
    """Channels of the factors; 0: half of the teacher's. The authors' configurations have 32 for every network."""
    ae_epochs: int = 30
    """Epochs of training for the teacher's auto-encoder (variant factor)."""
    ae_lr: float = 0.1
    """Learning rate of the auto-encoder; constant."""
    ae_error: Literal["l1", "l2"] = "l1"
    """Loss of the auto-encoder: mean absolute (l1) or mean squared error (l2)."""

    def __post_init__(self) -> None:
        for name, choices in (("variant", get_args(Variant)), ("split", get_args(Split))):
            if getattr(self, name) not in choices:
                raise UserError(f"--{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.p not in (1, 2):
            raise UserError(f"--p must be 1 or 2, got {self.p}")
        names = ("ce_weight", "kd_weight", "inheritance_weight", "exploration_weight")
        check_weights(**{name: getattr(self, name) for name in names})
        check_number("temperature", self.temperature, above_zero=True)
        check_auto_encoder(self)

    @property
    def weights(self) -> tuple[float, float]:
        """Those of inheritance and exploration."""
        return self.inheritance_weight, self.exploration_weight


class IEKD(Method):
    """Half of the student inherits from the teacher, half explores (Huang et al. 2021)."""

    Options = IEKDOptions
    options: IEKDOptions
    paper = "arXiv:2107.00181"
    needs_stages = "both staged, equal last H x W; overhaul: a teacher that OFD can use"

    halves: "Factors | Maps | None"
    order: Tensor  # the channels, those that inherit first; with --split random

    def build(self) -> None:
        o = self.options
        self.kd = KDLoss(o.temperature, o.ce_weight, o.kd_weight)
        self.halves = None
        if not any(o.weights):
            return
        mine, theirs = (shapes[-1][0] for shapes in check_stage_shapes(self.student, self.teacher.net, "IE-KD", -1))
        if o.variant == "overhaul":  # the map before the activation, at the end of the stage
            theirs = map_shapes(staged(self.teacher.net))[-1][0]
        if min(mine, theirs) < 2:
            raise UserError(f"IE-KD halves channels; the last stages of student and teacher have {mine} and {theirs}")
        self.request_features(self.student, self.teacher)
        self.inheriting = mine // 2
        if o.split == "random":
            self.register_buffer("order", _permutation(mine, seed=0))
        channels = (self.inheriting, mine - self.inheriting)
        if o.variant == "overhaul":
            view = PreActivation(self.teacher.net)
            self.staged_views[self.teacher] = view
            self.halves = Maps(channels, theirs, o, view.norms[-1])
        else:
            self.halves = Factors(channels, theirs, o) if o.variant == "factor" else Maps(channels, theirs, o)

    def prepare(self, loader: Loader, run: RunContext = RunContext()) -> None:  # noqa: B008, frozen
        if self.halves is not None and self.options.split == "random":
            self.order.copy_(_permutation(len(self.order), run.seed))  # the same again when a run is resumed
        if isinstance(self.halves, Factors):
            self.halves.teacher.fit(self, loader, "autoencoder.safetensors", run)

    def split(self, maps_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        """The channels that inherit and those that explore."""
        if self.options.split == "random":
            maps_NCHW = maps_NCHW.index_select(1, self.order)
        return maps_NCHW[:, : self.inheriting], maps_NCHW[:, self.inheriting :]

    def losses(self, out: ForwardCache, target: Tensor, plan: Hashable) -> dict[str, Tensor]:
        if self.options.kd_weight:
            terms = self.kd.terms(out(self.student), out(self.teacher), target)
        else:
            terms = {"ce": cross_entropy(out(self.student), target, self.options.ce_weight, self.ignore_index)}
        if self.halves is None:
            return terms
        inheritance, exploration = self.split(out.features(self.student)[-1])
        return terms | self.halves(inheritance, exploration, out.features(self.teacher)[-1])


class Factors(nn.Module):
    """IE-FT: each half is encoded by its encoder, the teacher's map by a frozen one."""

    def __init__(self, channels: tuple[int, int], teacher: int, options: IEKDOptions):
        super().__init__()
        inheritance_weight, exploration_weight = options.weights
        factors = factor_channels(options, teacher)
        self.inheritance = Coder(channels[0], factors) if inheritance_weight else nn.Identity()
        self.exploration = Coder(channels[1], factors) if exploration_weight else nn.Identity()
        self.teacher = TeacherEncoder(teacher, factors)
        self.loss = InheritanceExplorationLoss(options.p, inheritance_weight, exploration_weight)

    def forward(self, inheritance: Tensor, exploration: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        return self.loss.terms(self.inheritance(inheritance), self.exploration(exploration), self.teacher(teacher))


class Maps(nn.Module):
    """IE-AT: the attention map of each half is compared with the teacher's.

    IE-OD, with `norm`: each half passes a connector and is compared with the teacher's pre-ReLU map.
    """

    margin: Tensor | None

    def __init__(self, channels: tuple[int, int], teacher: int, options: IEKDOptions, norm: nn.Module | None = None):
        super().__init__()
        loss, scale = (OverhaulLoss, OVERHAUL_SCALE) if norm else (AttentionTransferLoss, ATTENTION_SCALE)
        self.register_buffer("margin", OverhaulLoss.margins([norm])[0] if norm else None, persistent=False)
        self.losses = {}
        for name, cin, weight in zip(("inheritance", "exploration"), channels, options.weights, strict=True):
            if weight:
                self.losses[name] = loss(scale * weight)
                connector = nn.Sequential()
                if norm:
                    connector.append(nn.Conv2d(cin, teacher, 1, bias=False))
                    connector.append(nn.BatchNorm2d(teacher, affine=name == "inheritance"))
                    he_init(connector)
                self.add_module(name, connector)

    def forward(self, inheritance: Tensor, exploration: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        maps = {"inheritance": inheritance, "exploration": exploration}
        wanted = [teacher] if self.margin is None else [teacher, self.margin]
        terms = {name: loss(getattr(self, name)(maps[name]), *wanted) for name, loss in self.losses.items()}
        return {name: -term if name == "exploration" else term for name, term in terms.items()}


def _permutation(channels: int, seed: int) -> Tensor:
    """The same permutation on every process."""
    return torch.randperm(channels, generator=torch.Generator().manual_seed(seed))
