"""IE-DML: two networks learn from scratch; in each, half of the channels inherits from the other and half explores.

    L_i = CE(z_i, y) + kl_weight * KL(sg p_j || p_i) + inheritance_weight * L_inh,i + exploration_weight * L_exp,i
    L_inh,i = ( sum |F^_inh,i - F^_j|^p / N_el )^(1/p),   L_exp,i = -( sum |F^_exp,i - F^_j|^p / N_el )^(1/p)

F_j: the last stage's map of the other network, a constant. F_inh,i and F_exp,i: the first half of network i's channels
at its last stage and the rest, each encoded to as many channels as F_j by a separate encoder. x^, N_el: as in IE-KD.

From second-hand notes on IE-KD's paper (arXiv:2107.00181): each of two networks has both halves, compared with the
other's factor, together with DML's KL. Weights 50 and p = 1 are those of IE-KD. The rest is ours. There is no
auto-encoder: the other network changes with every step, so its map itself is the factor.
Departures: none known. A distance of weight 0 is left out.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from ..errors import UserError
from ..losses import InheritanceExplorationLoss, MutualLoss
from ..models import stage_shapes
from ..models.sizes import image_size_of
from .base import Method, WeightOptions
from .forwards import ForwardCache
from .parts.autoencoder import Coder


@dataclass(frozen=True)
class IEDMLOptions(WeightOptions):
    """Inheritance and exploration of two networks that learn together."""

    inheritance_weight: float = 50.0
    """Weight of the distance that the inheriting half of each network minimises; from 0."""
    exploration_weight: float = 50.0
    """Weight of the distance that the exploring half of each network maximises; from 0."""
    kl_weight: float = 1.0
    """Weight of the KL terms, by which the logits learn from one another; from 0."""
    p: int = 1
    """Norm of the distance between factors: 1 or 2."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.p not in (1, 2):
            raise UserError(f"--p must be 1 or 2, got {self.p}")


class IEDML(Method):
    """DML whose halves inherit from the other network or explore (after Huang et al. 2021)."""

    Options = IEDMLOptions
    options: IEDMLOptions
    paper = "arXiv:2107.00181"
    needs_teacher, needs_peers = False, True
    needs_stages = "two networks, both staged, equal last H x W"

    def build(self) -> None:
        if len(self.peers) != 1:
            raise UserError(f"IE-DML needs exactly two networks, the student and one peer; got {len(self.peers)} peers")
        pixels = image_size_of(self.student, self.peers[0])
        one, other = (stage_shapes(net, pixels)[-1] for net in (self.student, self.peers[0]))
        if one[1:] != other[1:] or min(one[0], other[0]) < 2:
            names = [type(net).__name__ for net in (self.student, self.peers[0])]
            raise UserError(
                f"IE-DML compares the last stage's maps of both networks, which need equal height and width and 2 "
                f"channels or more; for images of {pixels} pixels (C, H, W) is {one} in the "
                f"student {names[0]} and {other} in the peer {names[1]}: use networks with equal resolutions, or dml"
            )
        self.mutual = MutualLoss(kl_weight=self.options.kl_weight)
        weights = (self.options.inheritance_weight, self.options.exploration_weight)
        self.loss = InheritanceExplorationLoss(self.options.p, *weights)
        self.request_features(self.student, self.peers[0])
        self.encoders = nn.ModuleList()
        for channels, wanted in ((one[0], other[0]), (other[0], one[0])):
            halves = zip((channels // 2, channels - channels // 2), weights, strict=True)
            self.encoders.append(nn.ModuleList(Coder(cin, wanted) if w else nn.Identity() for cin, w in halves))

    def losses(self, out: ForwardCache, target: Tensor, plan: Hashable) -> dict[str, Tensor]:
        nets = (self.student, self.peers[0])
        mutual = self.mutual.terms([[out(net)] for net in nets], target)
        terms = {"ce": mutual["ce1"], "kl": mutual["kl1"], "ce_peer1": mutual["ce2"], "kl_peer1": mutual["kl2"]}
        for end, net, other, encoders in zip(("", "_peer1"), nets, nets[::-1], self.encoders, strict=True):
            maps, wanted = out.features(net)[-1], out.features(other)[-1].detach()
            halves = maps.tensor_split([maps.shape[1] // 2], dim=1)
            both = zip(cast(nn.ModuleList, encoders), halves, strict=True)
            inheritance, exploration = (encode(half) for encode, half in both)
            terms |= {f"{name}{end}": t for name, t in self.loss.terms(inheritance, exploration, wanted).items()}
        return terms
