"""DCM: two or more networks that learn from one another across layers (arXiv:2008.07816).

Auxiliary classifiers sit after the hidden stages of each network. With p_i the M heads of one network (hidden ones and
its own classifier) and q_j those of another:

    L = sum_i CE(p_i, y) + sum_j CE(q_j, y) + sum_ij [ same or cross ] ( KL(sg q_j || p_i) + KL(sg p_i || q_j) ),  T = 1

Heads and weights (all 1) are the authors' code's for Wide ResNets and its MobileNet. The heads are dropped after
training: each network is saved with the keys of the plain one.
Ours: the heads of other networks (see fastkd/models/auxiliary.py). Where networks have unequal numbers of stages, pairs
are of the same stage by their number from the first; a network's own classifier has that of its last stage. With more
than two networks the divergences are divided by the number of the others.
Departures: none known.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from ..errors import UserError
from ..losses import MutualLoss
from .base import Method
from .parts.auxiliary import auxiliary_heads


@dataclass(frozen=True)
class DCMOptions:
    """Dense cross-layer mutual distillation."""

    ce_weight: float = 1.0
    """Weight of every head's cross-entropy with the labels."""
    kl_weight: float = 1.0
    """Weight of what the heads learn from those of the other networks."""
    same_stage: float = 1.0
    """Factor on it between heads after the same stage; 0 leaves the cross-stage pairs alone."""
    cross_stage: float = 1.0
    """Factor on it between heads after different stages; 0 leaves the same-stage pairs alone."""

    def __post_init__(self):
        for name in ("same_stage", "cross_stage"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise UserError(f"--{name.replace('_', '-')} must be a number from 0, got {value}")
        if not self.same_stage + self.cross_stage:
            raise UserError("--same-stage and --cross-stage are both 0: no head learns from another; give one above 0")
        self.loss(heads=2)
        if not self.ce_weight + self.kl_weight * (self.same_stage + self.cross_stage):
            raise UserError("--ce-weight and --kl-weight (or both of its factors) are 0: nothing is learnt")

    def loss(self, heads: int) -> MutualLoss:
        """`heads`: the most that a network has."""
        pairs = [[self.same_stage if k == j else self.cross_stage for j in range(heads)] for k in range(heads)]
        dense = self.same_stage == self.cross_stage == 1
        return MutualLoss(ce_weight=self.ce_weight, kl_weight=self.kl_weight, pair_weights=None if dense else pairs)


class DCM(Method):
    """Every classifier of one network teaches every one of the others, hidden stages included (Yao, Sun 2020)."""

    Options = DCMOptions
    paper = "arXiv:2008.07816"
    needs_teacher, needs_peers = False, True
    ce_option = ""
    needs_stages = "all staged"

    def __init__(self, student, teacher=None, options=None, peers=()):
        super().__init__(student, teacher, options, peers)
        nets = (self.student, *self.peers)
        self.heads = nn.ModuleList(auxiliary_heads(net) for net in nets)
        self.loss = self.options.loss(1 + max(len(heads) for heads in self.heads))
        for net in nets:
            self.request_features(net)

    def losses(self, out, target, plan):
        heads = [self.logits(out, *both) for both in zip(self._nets(), self.heads, strict=True)]
        tables = self.loss.fused(heads, target).terms.split([len(own) for own in heads])
        ends = ["", *(f"_peer{number}" for number in range(1, len(heads)))]
        networks = zip(ends, tables, strict=True)
        return {name + end: term for end, table in networks for name, term in _terms(table).items()}

    def logits(self, out, net: nn.Module, heads: nn.ModuleList) -> list:
        """[N, C] of each head of a network, the earliest first; the last is the network's own."""
        return [*(head(maps) for head, maps in zip(heads, out.features(net)[:-1], strict=True)), out(net)]

    def _nets(self) -> tuple[nn.Module, ...]:
        return self.student, *self.peers


def _terms(table: Tensor) -> dict[str, Tensor]:
    """Of a network, from [heads, 1 + all heads]: the cross-entropy of its own logits, of the others; divergences."""
    ce, kl = table[:, 0], table[:, 1:].sum()
    return {"ce": ce[-1]} | ({"ce_heads": ce[:-1].sum()} if len(ce) > 1 else {}) | {"kl": kl}
