"""DML: networks that learn from the labels and from one another, without a teacher (arXiv:1706.00384).

    L_i = CE(z_i, y) + kl_weight / (M - 1) * sum_{j != i} KL(sg p_j || p_i),    M networks, T = 1

Defaults: all weights 1, as in the paper. The student is network 1; the peers follow.
Departures: simultaneous updates by default, one forward pass for all; `alternate` is the original: forward all, step
one, forward all again, step the next. Then each batch makes M updates, and BatchNorm sees it M times.
"""

from dataclasses import dataclass

import torch

from ..errors import check_number
from ..losses import MutualLoss
from .base import Method


@dataclass(frozen=True)
class DMLOptions:
    """Deep mutual learning."""

    kl_weight: float = 1.0
    """Weight of what the networks learn from one another."""
    alternate: bool = False
    """Update one network after the other, each on fresh forward passes of all, instead of all at once."""

    def __post_init__(self):
        check_number("kl_weight", self.kl_weight, above_zero=True, hint="; to train on the labels alone use ce")


class DML(Method):
    """Networks that teach one another from scratch (Zhang et al. 2018)."""

    Options = DMLOptions
    paper = "arXiv:1706.00384"
    needs_teacher, needs_peers = False, True

    def __init__(self, student, teacher=None, options=None, peers=()):
        super().__init__(student, teacher, options, peers)
        self.loss = MutualLoss(kl_weight=self.options.kl_weight)
        self.find_unused_parameters = self.options.alternate

    def plans(self, step):
        """Which network learns; None: all at once."""
        return tuple(range(1 + len(self.peers))) if self.options.alternate else (None,)

    def losses(self, out, target, plan):
        heads = []
        for number, net in enumerate((self.student, *self.peers)):
            with torch.set_grad_enabled(torch.is_grad_enabled() and plan in (None, number)):
                heads.append([out(net)])
        terms = self.loss.terms(heads, target)
        learning = range(len(heads)) if plan is None else (plan,)
        return {f"{kind}_peer{n}" if n else kind: terms[f"{kind}{n + 1}"] for n in learning for kind in ("ce", "kl")}
