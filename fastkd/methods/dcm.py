"""DCM: two or more networks that learn from one another across layers (arXiv:2008.07816).

Each network has auxiliary classifiers after all stages but the last. With p_i the M heads of one network (auxiliary
heads and classifier) and q_j those of another:

    L = sum_i CE(p_i, y) + sum_j CE(q_j, y) + sum_ij [ same or cross ] ( KL(sg q_j || p_i) + KL(sg p_i || q_j) ),  T = 1

The heads for Wide ResNets and MobileNet and the weights (all 1) are those of the authors' code. The auxiliary heads are
dropped after training: each network is saved without them.
Ours: the heads of other networks (see fastkd/methods/parts/auxiliary.py). Two heads are at the same stage if their
stages have the same number, counted from the first; a classifier counts as the head of the last stage. With more than
two networks, the divergences are divided by the number of other networks.
Departures: none known.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from ..losses import MutualLoss
from .base import Method, check_weights
from .forwards import ForwardCache
from .parts.auxiliary import auxiliary_heads


@dataclass(frozen=True)
class DCMOptions:
    """Dense cross-layer mutual distillation."""

    ce_weight: float = 1.0
    """Weight of every head's cross-entropy with the labels."""
    kl_weight: float = 1.0
    """Weight of the KL terms, by which the heads learn from those of the other networks."""
    same_stage: float = 1.0
    """Factor on the KL terms between heads of the same stage; from 0."""
    cross_stage: float = 1.0
    """Factor on the KL terms between heads of different stages; from 0."""

    def __post_init__(self) -> None:
        check_weights(same_stage=self.same_stage, cross_stage=self.cross_stage)
        check_weights(ce_weight=self.ce_weight, kl_weight=self.kl_weight)

    def loss(self, heads: int) -> MutualLoss:
        """`heads`: the largest number of heads of a network."""
        pairs = [[self.same_stage if k == j else self.cross_stage for j in range(heads)] for k in range(heads)]
        dense = self.same_stage == self.cross_stage == 1
        return MutualLoss(ce_weight=self.ce_weight, kl_weight=self.kl_weight, pair_weights=None if dense else pairs)


class DCM(Method):
    """Every head of one network teaches every head of the others (Yao, Sun 2020)."""

    Options = DCMOptions
    paper = "arXiv:2008.07816"
    needs_teacher, needs_peers = False, True
    ce_option = ""
    needs_stages = "all staged"

    options: DCMOptions

    def build(self) -> None:
        nets = (self.student, *self.peers)
        heads = [auxiliary_heads(net) for net in nets]
        self.heads = nn.ModuleList(heads)
        self.loss = self.options.loss(1 + max(map(len, heads)))
        self.request_features(*nets)

    def losses(self, out: ForwardCache, target: Tensor, plan: Hashable) -> dict[str, Tensor]:
        nets = (self.student, *self.peers)
        heads = [self.logits(out, net, cast(nn.ModuleList, each)) for net, each in zip(nets, self.heads, strict=True)]
        tables = self.loss.fused(heads, target).terms.split([len(each) for each in heads])
        ends = ["", *(f"_peer{number}" for number in range(1, len(heads)))]
        networks = zip(ends, tables, strict=True)
        return {name + end: term for end, table in networks for name, term in _terms(table).items()}

    def logits(self, out: ForwardCache, net: nn.Module, heads: nn.ModuleList) -> list[Tensor]:
        """Logits [N, C] of the auxiliary heads of a network, the earliest first, and of its classifier."""
        return [*(head(maps) for head, maps in zip(heads, out.features(net)[:-1], strict=True)), out(net)]


def _terms(table: Tensor) -> dict[str, Tensor]:
    """The terms of one network from its rows [heads, 1 + all heads]: CE of the classifier, of the heads, and KL."""
    ce, kl = table[:, 0], table[:, 1:].sum()
    return {"ce": ce[-1]} | ({"ce_heads": ce[:-1].sum()} if len(ce) > 1 else {}) | {"kl": kl}
