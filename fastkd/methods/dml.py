"""DML: networks that learn from the labels and from one another, without a teacher (arXiv:1706.00384).

    L_i = CE(z_i, y) + kl_weight / (M - 1) * sum_{j != i} KL(sg p_j || p_i),    M networks, T = 1

Defaults: all weights 1, as in the paper. The student is network 1; the peers follow.
Departures: all networks are updated at once by default, after one forward pass each. `alternate` is the original: run
all, update one, run all again, update the next. Then each batch makes M updates and BatchNorm sees it M times.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ..errors import check_number
from ..losses import MutualLoss
from .base import Method
from .forwards import ForwardCache


@dataclass(frozen=True)
class DMLOptions:
    """Deep mutual learning."""

    kl_weight: float = 1.0
    """Weight of the KL terms, by which the networks learn from one another."""
    alternate: bool = False
    """Update one network after another, each after new forward passes of all networks, instead of all at once."""

    def __post_init__(self) -> None:
        check_number("kl_weight", self.kl_weight, above_zero=True, hint="; to train on the labels alone use ce")


class DML(Method):
    """Networks that teach one another from scratch (Zhang et al. 2018)."""

    Options = DMLOptions
    options: DMLOptions
    paper = "arXiv:1706.00384"
    needs_teacher, needs_peers = False, True

    def build(self) -> None:
        self.loss = MutualLoss(kl_weight=self.options.kl_weight)
        self.find_unused_parameters = self.options.alternate

    def plans(self, step: int) -> Sequence[Hashable]:
        """The number of the network that each update trains, student 0; None: one update trains all."""
        return tuple(range(1 + len(self.peers))) if self.options.alternate else (None,)

    def learners(self, plan: Hashable) -> Sequence[nn.Module]:
        nets = (self.student, *self.peers)
        return nets if plan is None else (nets[cast(int, plan)],)

    def losses(self, out: ForwardCache, target: Tensor, plan: Hashable) -> dict[str, Tensor]:
        assert plan is None or isinstance(plan, int)
        heads = []
        for number, net in enumerate((self.student, *self.peers)):
            with torch.set_grad_enabled(torch.is_grad_enabled() and plan in (None, number)):
                heads.append([out(net)])
        terms = self.loss.terms(heads, target)
        trained = range(len(heads)) if plan is None else (plan,)
        return {f"{kind}_peer{n}" if n else kind: terms[f"{kind}{n + 1}"] for n in trained for kind in ("ce", "kl")}
