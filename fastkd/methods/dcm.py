"""DCM: two or more networks that learn from one another across layers (arXiv:2008.07816).

Each network has auxiliary classifiers after all stages but the last. With p_i the M heads of one network (auxiliary
heads and classifier) and q_j those of another:

    L = sum_i CE(p_i, y) + sum_j CE(q_j, y) + sum_ij [ same or cross ] ( KL(sg q_j || p_i) + KL(sg p_i || q_j) ),  T = 1

The heads for Wide ResNets and MobileNet and the weights (all 1) are those of the authors' code. The auxiliary heads are
dropped after training: each network is saved without them. `--init dcm` draws the initial weights of that code.
Ours: the heads of other networks (see fastkd/methods/parts/auxiliary.py). Two heads are at the same stage if their
stages have the same number, counted from the first; a classifier counts as the head of the last stage. With more than
two networks, the divergences are divided by the number of other networks.
Departures: none known.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal, cast, get_args

from torch import Tensor, nn

from ..errors import UserError
from ..losses import MutualLoss
from ..models.nets.mobilenet import CifarMobileNet
from .base import Method, check_weights
from .forwards import ForwardCache
from .parts.auxiliary import auxiliary_heads

Init = Literal["default", "dcm"]


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
    init: Init = "default"
    """Initial weights: those of each network, or drawn anew for networks and heads as in the authors' code (dcm), where
    only the CIFAR MobileNet keeps torch's."""

    def __post_init__(self) -> None:
        if self.init not in get_args(Init):
            raise UserError(f"--init must be one of {', '.join(get_args(Init))}, got {self.init!r}")
        check_weights(same_stage=self.same_stage, cross_stage=self.cross_stage)
        check_weights(ce_weight=self.ce_weight, kl_weight=self.kl_weight)


class DCM(Method):
    """Every head of one network teaches every head of the others (Yao, Sun 2020)."""

    Options = DCMOptions
    options: DCMOptions
    paper = "arXiv:2008.07816"
    needs_teacher, needs_peers = False, True
    ce_option = ""
    needs_stages = "all staged"

    def build(self) -> None:
        o, nets = self.options, (self.student, *self.peers)
        self.request_features(*nets)
        heads = [auxiliary_heads(net) for net in nets]
        self.heads = nn.ModuleList(heads)
        if o.init == "dcm":
            for net, aux in zip(nets, heads, strict=True):
                if not isinstance(net, CifarMobileNet):  # it starts as torch has it, in their code too
                    draw_as_dcm(net)
                    draw_as_dcm(aux)
        K = 1 + max(map(len, heads))
        pairs = [[o.same_stage if k == j else o.cross_stage for j in range(K)] for k in range(K)]
        dense = o.same_stage == o.cross_stage == 1
        self.loss = MutualLoss(ce_weight=o.ce_weight, kl_weight=o.kl_weight, pair_weights=None if dense else pairs)

    def losses(self, out: ForwardCache, target: Tensor, plan: Hashable) -> dict[str, Tensor]:
        nets = (self.student, *self.peers)
        heads = [self.logits(out, net, cast(nn.ModuleList, each)) for net, each in zip(nets, self.heads, strict=True)]
        tables = self.loss.fused(heads, target).terms.split([len(each) for each in heads])
        terms = {}
        for end, table in zip(["", *(f"_peer{number}" for number in range(1, len(heads)))], tables, strict=True):
            terms[f"ce{end}"] = table[-1, 0]  # each row: the CE of a head, then its KL terms; the classifier is last
            if len(table) > 1:
                terms[f"ce_heads{end}"] = table[:-1, 0].sum()
            terms[f"kl{end}"] = table[:, 1:].sum()
        return terms

    def logits(self, out: ForwardCache, net: nn.Module, heads: nn.ModuleList) -> list[Tensor]:
        """Logits [N, C] of the auxiliary heads of a network, the earliest first, and of its classifier."""
        return [*(head(x) for head, x in zip(heads, out.outputs(net)[:-1], strict=True)), out(net)]


def draw_as_dcm(net: nn.Module) -> None:
    """New initial weights in place, as the authors' Wide ResNets have them. From torch's global generator.

    Convolutions and linear layers from N(0, 2 / fan_in), biases 0, BatchNorm weights from U(0, 1).
    """
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.BatchNorm2d) and layer.affine:
            nn.init.uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
