"""Combo: the weighted sum of several methods on one student, with one teacher and one forward pass of each network.

    L = sum_m weight_m * L_m,    --method iekd+kd --iekd-weight 1 --kd-weight 0.5

The plain cross-entropy is the first method's: the term `ce` of the others is left out. Every option of a method is
there with its name in front: `--kd-temperature`, `--iekd-inheritance-weight`. All of this is ours.
"""

import itertools
import math
from collections.abc import Hashable
from dataclasses import field, fields, make_dataclass

from torch import nn

from ..errors import UserError
from .base import Method


class Combo(Method):
    """The sum of several methods, such as iekd+kd."""

    kinds: dict[str, type[Method]] = {}  # by name; `combine` makes a subclass that has some

    def __init__(self, student, teacher=None, options=None, peers=()):
        super().__init__(student, teacher, options, peers)
        self.parts = nn.ModuleDict({name: self._part(name, kind) for name, kind in self.kinds.items()})
        self.weights = {name: getattr(self.options, f"{name}_weight") for name in self.parts}
        for name, weight in self.weights.items():
            if not 0 < weight < math.inf:
                raise UserError(f"--{name}-weight must be a number above 0, got {weight}; or leave {name} out")
        self.partial = any(part.partial for part in self.parts.values())
        for name, part in self.parts.items():
            if len(part.plans(0)) > 1:
                raise UserError(f"--{name}-alternate makes several updates with a batch: that cannot be summed")

    def _part(self, name: str, kind: type[Method]) -> Method:
        own = {option.name: getattr(self.options, f"{name}_{option.name}") for option in fields(kind.Options)}
        teacher, peers = self.teacher if kind.needs_teacher else None, self.peers if kind.needs_peers else ()
        return kind(self.student, teacher, kind.Options(**own), peers)

    def prepare(self, loader, run):
        for part in self.parts.values():
            position = loader.state_dict()
            part.prepare(loader, run)
            loader.load_state_dict(position)

    def plan(self, step):
        return tuple(part.plan(step) for part in self.parts.values())

    def views_for(self, plan):
        parts = self._with(plan)
        views = {net: view for part, _ in parts for net, view in part.views.items()}
        for part, own in parts:  # what a method itself makes of a network, such as a path through it, comes first
            views |= {net: view for net, view in part.views_for(own).items() if view is not part.views.get(net)}
        return views

    def losses(self, out, target, plan):
        terms = {}
        for number, (part, own) in enumerate(self._with(plan)):
            name = list(self.parts)[number]
            for term, value in part.losses(out, target, own).items():
                if number and term == "ce":
                    continue
                terms[f"{name}_{term}" if term in terms else term] = self.weights[name] * value
        return terms

    def param_groups(self, lr):
        groups, seen = [], set()
        for group in itertools.chain(*(part.param_groups(lr) for part in self.parts.values())):
            groups.append({**group, "params": [p for p in group["params"] if p not in seen]})
            seen.update(group["params"])
        return [group for group in groups if group["params"]]

    def networks(self):
        return {name: net for part in self.parts.values() for name, net in part.networks().items()}

    def shares(self, steps):
        return {name: share for part in self.parts.values() for name, share in part.shares(steps).items()}

    def _with(self, plan: Hashable) -> list[tuple[Method, Hashable]]:
        return list(zip(self.parts.values(), plan or [None] * len(self.parts), strict=True))


def combine(kinds: dict[str, type[Method]], name: str) -> type[Combo]:
    """The class of the sum. UserError for a method given twice."""
    if name.count("+") + 1 != len(kinds):
        raise UserError(f"method {name}: each part can be there once")
    options = [(f"{part}_{o.name}", o.type, field(default=o.default))
               for part, kind in kinds.items() for o in fields(kind.Options)]  # fmt: skip
    weights = [(f"{part}_weight", float, field(default=1.0)) for part in kinds]
    Options = make_dataclass("ComboOptions", [*options, *weights], frozen=True)
    needs = {flag: any(getattr(kind, flag) for kind in kinds.values()) for flag in ("needs_teacher", "needs_peers")}
    return type(name, (Combo,), {"kinds": kinds, "Options": Options, "__doc__": f"The sum of {name}.", **needs})
