"""A method with other losses: as people write them in torch, or none at all. Networks and options stay the same.

The losses of fastkd call the functions of fastkd.kernels by the names that they imported; here those names are given
other functions for the time of a `with`.
"""

from contextlib import contextmanager
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd.losses.features as features
import fastkd.losses.logits as logits
from fastkd.bench import eager
from fastkd.kernels.factor_distance import FactorDistance, factor_distance_reference
from fastkd.kernels.kd_loss import KDTerms, kd_loss_reference
from fastkd.kernels.logit_loss import LogitLoss

LOGITS = ("kd_loss", "logit_loss", "dkd_loss", "dist_loss")
FEATURES = ("attention_transfer", "factor_distance", "hint_distance", "overhaul_distance", "rkd_loss", "sp_loss")


def _kd(student, teacher, target, *, temperature, ce_weight, kd_weight, standardize, **_) -> KDTerms:
    if standardize:
        weights = {"ce_weight": ce_weight, "kd_weight": kd_weight}
        return kd_loss_reference(student, teacher, target, temperature=temperature, **weights, standardize=True)
    ce, kd = ce_weight * F.cross_entropy(student, target), kd_weight * eager.kl(student, teacher, temperature)
    return KDTerms(ce + kd, ce, kd)


def _heads(heads, target, ce_weights, table, *, temperature=1.0, **_) -> LogitLoss:
    """Each divergence from the logits, as the codes of DML, DCM and SOKD do."""
    none = torch.zeros((), device=heads[0].device)
    rows = []
    for z, weight, row in zip(heads, ce_weights, table, strict=True):
        ce = weight * F.cross_entropy(z, target) if weight else none
        kl = [w * eager.kl(z, q, temperature) if w else none for w, q in zip(row, heads, strict=True)]
        rows.append(torch.stack([ce.float(), *(term.float() for term in kl)]))
    terms = torch.stack(rows)
    return LogitLoss(terms.sum(), terms, none)


def _factors(parts, teacher, weights, p=1) -> FactorDistance:
    if p != 1:
        return factor_distance_reference(parts, teacher, weights, p)
    unit = [F.normalize(x.flatten(1)) for x in (*parts, teacher.detach())]
    terms = torch.stack([w * (x - unit[-1]).abs().mean() for w, x in zip(weights, unit[:-1], strict=True)])
    return FactorDistance(terms.sum(), terms)


OFFICIAL = {
    "kd_loss": _kd,
    "logit_loss": _heads,
    "dkd_loss": lambda student, teacher, target, **_: eager.dkd(student, teacher, target),
    "dist_loss": lambda student, teacher, **_: eager.dist(student, teacher),
    "attention_transfer": lambda student, teacher, weight: weight * eager.attention_transfer(student, teacher),
    "factor_distance": _factors,
    "hint_distance": lambda student, teacher, weight: weight * eager.hint(student, teacher),
    "overhaul_distance": lambda student, teacher, margin, weight: weight * eager.overhaul(student, teacher, margin),
}
"""Of the papers' codes, at the default options; rkd_loss and sp_loss are plain torch as they are."""


PUBLISHED = [
    (logits, {name: OFFICIAL[name] for name in LOGITS}),
    (features, {name: OFFICIAL[name] for name in FEATURES if name in OFFICIAL}),
]


@contextmanager
def swapped(homes: list[tuple[ModuleType, dict]]):
    """In here each module has these names; quick, for it is part of a step that is timed."""
    before = [{name: vars(home)[name] for name in names} for home, names in homes]
    for home, names in homes:
        vars(home).update(names)
    try:
        yield
    finally:
        for (home, _), names in zip(homes, before, strict=True):
            vars(home).update(names)


@contextmanager
def official():
    """In here the losses are those of the papers' codes, differentiated by autograd."""
    with swapped(PUBLISHED):
        yield


class NoLoss:
    """`with no_loss: method(...)` computes no loss; `backward()` then sends fixed gradients into what had one."""

    def __init__(self):
        self.learners: dict[int, Tensor] = {}
        self.gradients: dict[tuple, Tensor] = {}
        self.zeros: dict[tuple, Tensor] = {}
        homes = ((logits, LOGITS), (features, FEATURES), (F, ("cross_entropy",)))
        self.homes = [(home, {name: getattr(self, name, self.scalar) for name in names}) for home, names in homes]

    def __enter__(self) -> None:
        self.learners.clear()
        self.swap = swapped(self.homes)
        self.swap.__enter__()

    def __exit__(self, *problem) -> None:
        self.swap.__exit__(*problem)

    def backward(self) -> None:
        tensors = list(self.learners.values())
        torch.autograd.backward(tensors, [self._gradient(x) for x in tensors])
        self.learners.clear()

    def scalar(self, student: Tensor, *_, **__) -> Tensor:
        return self._take([student])

    def kd_loss(self, student, *_, **__) -> KDTerms:
        none = self._take([student])
        return KDTerms(none, none, none)

    def logit_loss(self, heads, target, ce_weights, table, **_) -> LogitLoss:
        learning = [any((c, *row)) for c, row in zip(ce_weights, table, strict=True)]
        heads = [z for z, learns in zip(heads, learning, strict=True) if learns]
        return LogitLoss(*(self._take(heads, shape) for shape in ((), (len(table), 1 + len(table)), ())))

    def factor_distance(self, parts, teacher, weights, p=1) -> FactorDistance:
        return FactorDistance(*(self._take(parts, shape) for shape in ((), (len(parts),))))

    def _take(self, tensors: list[Tensor], shape: tuple = ()) -> Tensor:
        self.learners |= {id(x): x for x in tensors if x.requires_grad}
        key = (shape, tensors[0].device)
        if key not in self.zeros:
            self.zeros[key] = torch.zeros(shape, device=tensors[0].device)
        return self.zeros[key]

    def _gradient(self, x: Tensor) -> Tensor:
        """Noise of the size that a mean over the batch has, made once."""
        key = (x.shape, x.dtype, x.device)
        if key not in self.gradients:
            self.gradients[key] = torch.randn_like(x) / x.numel()
        return self.gradients[key]
