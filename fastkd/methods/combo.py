"""Combo: the weighted sum of several methods on one student, with one teacher and one forward pass of each network.

    L = sum_m weight_m * L_m,    --method iekd+kd --iekd-weight 1 --kd-weight 0.5

The cross-entropy of each network with the labels is counted once: the terms `ce` and `ce_peer1`, ... are those of the
first method that has them. Every option of a method is there with its name in front: `--kd-temperature`,
`--iekd-inheritance-weight`. There is one teacher: what `--iakd-teacher-bn batch` makes of it is what all see. All of
this is ours.
"""

import ast
import inspect
import itertools
from collections.abc import Hashable
from contextlib import contextmanager
from dataclasses import field, fields, make_dataclass
from textwrap import dedent

import torch
from torch import nn

from ..errors import UserError, check_number
from ..models import PreActivation
from .base import FrozenTeacher, Method, RunContext


class Combo(Method):
    """The sum of several methods, such as iekd+kd."""

    kinds: dict[str, type[Method]] = {}  # by name; `combine` makes a subclass that has some

    def __init__(self, student, teacher=None, options=None, peers=()):
        super().__init__(student, teacher, options, peers)
        self.parts = nn.ModuleDict({name: self._part(name, kind) for name, kind in self.kinds.items()})
        self.weights = {name: getattr(self.options, f"{name}_weight") for name in self.parts}
        self.find_unused_parameters = any(part.find_unused_parameters for part in self.parts.values())
        self._check_options()
        for net in {net for part in self.parts.values() for net in part.staged_views}:
            self._check_views(net)

    def _check_options(self) -> None:
        parts = self.parts.items()
        for name, part in parts:
            if len(part.plans(0)) > 1:
                raise UserError(f"--{name}-alternate makes several updates with a batch: that cannot be summed")
        norms = {name: part.options.teacher_bn for name, part in parts if hasattr(part.options, "teacher_bn")}
        if len(set(norms.values())) > 1:
            given = " and ".join(f"--{name}-teacher-bn {norm}" for name, norm in norms.items())
            raise UserError(f"{given}: there is one teacher in a sum; give both the same")

    def _check_views(self, net: nn.Module) -> None:
        """One forward pass gives a network's maps before the activation or after it."""
        parts = self.parts.items()
        before = [name for name, part in parts if isinstance(part.staged_views.get(net), PreActivation)]
        paths = [
            name
            for name, part in parts
            if net is self.student and type(part).staged_views_for is not Method.staged_views_for
        ]
        after = [name for name, part in parts if name not in before and (name in paths or net in part.staged_views)]
        if before and after:
            kind = type(net.net if isinstance(net, FrozenTeacher) else net).__name__
            raise UserError(
                f"{before[0]} looks at maps of {kind} before the activation, {after[0]} at those after it: they cannot "
                "be summed; leave one of them out"
            )

    def _part(self, name: str, kind: type[Method]) -> Method:
        teacher, peers = self.teacher if kind.needs_teacher else None, self.peers if kind.needs_peers else ()
        return kind(self.student, teacher, _own_options(self.options, name, kind), peers)

    def check(self, run):
        for name, part in self.parts.items():
            with _named(name):
                part.check(run)

    def prepare(self, loader, run=RunContext()):  # noqa: B008, frozen
        random = torch.get_rng_state()
        for part in self.parts.values():  # each as if alone, whether or not another found its work done before
            position = loader.state_dict()
            torch.set_rng_state(random)
            part.prepare(loader, run)
            loader.load_state_dict(position)

    def plan(self, step):
        return tuple(part.plan(step) for part in self.parts.values())

    def staged_views_for(self, plan):
        parts = self._with(plan)
        views = {net: view for part, _ in parts for net, view in part.staged_views.items()}
        for part, own in parts:  # what a method itself makes of a network, such as a path through it, comes first
            views |= {
                net: view for net, view in part.staged_views_for(own).items() if view is not part.staged_views.get(net)
            }
        return views

    def losses(self, out, target, plan):
        terms = {}
        for (name, weight), (part, own) in zip(self.weights.items(), self._with(plan), strict=True):
            for term, value in part.losses(out, target, own).items():
                if term not in terms or not (term == "ce" or term.startswith("ce_peer")):
                    terms[f"{name}_{term}" if term in terms else term] = weight * value
        return terms

    @property
    def asks_teacher(self):
        return any(part.asks_teacher for part in self.parts.values())

    def param_groups(self, lr):
        groups, seen = [], set()
        for group in itertools.chain(*(part.param_groups(lr) for part in self.parts.values())):
            groups.append({**group, "params": [p for p in group["params"] if p not in seen]})
            seen.update(group["params"])
        return [group for group in groups if group["params"]]

    def networks(self):
        return {name: net for part in self.parts.values() for name, net in part.networks().items()}

    def graph_groups(self):
        return [group for part in self.parts.values() for group in part.graph_groups()]

    def selection_rates(self, steps):
        return {name: share for part in self.parts.values() for name, share in part.selection_rates(steps).items()}

    def _with(self, plan: Hashable) -> list[tuple[Method, Hashable]]:
        return list(zip(self.parts.values(), plan or [None] * len(self.parts), strict=True))


def combine(kinds: dict[str, type[Method]], name: str) -> type[Combo]:
    """The class of the sum. UserError for a method given twice."""
    if name.count("+") + 1 != len(kinds):
        raise UserError(f"method {name}: each part can be there once; its share is --NAME-weight")
    needs = {flag: any(getattr(kind, flag) for kind in kinds.values()) for flag in ("needs_teacher", "needs_peers")}
    stages = "; ".join(f"{part}: {kind.needs_stages}" for part, kind in kinds.items() if kind.needs_stages)
    about = {
        "kinds": kinds,
        "Options": _sum_of_options(kinds),
        "__doc__": f"The sum of {name}.",
        "needs_stages": stages,
    }
    return type(name, (Combo,), about | needs)


def _sum_of_options(kinds: dict[str, type[Method]]) -> type:
    """A dataclass with the options of all, checked as theirs are; its docstring explains them to `--help`."""
    options, about = [], ["The parts.", "", "Args:"]
    for part, kind in kinds.items():
        helps = explained(kind.Options)
        for o in fields(kind.Options):
            default = field(default=o.default, default_factory=o.default_factory)
            options.append((f"{part}_{o.name}", o.type, default))
            about.append(f"    {part}_{o.name}: {helps.get(o.name, '')}")
        options.append((f"{part}_weight", float, field(default=1.0)))
        about.append(f"    {part}_weight: Factor on all terms of {part}; above 0.")

    def check(self):
        for part, kind in kinds.items():
            weight = f"{part}_weight"
            check_number(weight, getattr(self, weight), above_zero=True, hint=f"; or leave {part} out")
            _own_options(self, part, kind)
        _check_labels(self, kinds)

    return make_dataclass(
        "ComboOptions", options, frozen=True, namespace={"__post_init__": check, "__doc__": "\n".join(about)}
    )


def _check_labels(options, kinds: dict[str, type[Method]]) -> None:
    """UserError for the weight of a cross-entropy that is not counted."""
    first, *others = [part for part, kind in kinds.items() if kind.ce_option is not None] or [""]
    for part in others:
        name = kinds[part].ce_option
        default = {o.name: o.default for o in fields(kinds[part].Options)}.get(name)
        if default is not None and getattr(options, f"{part}_{name}") != default:
            raise UserError(
                f"--{part}-{name.replace('_', '-')} has no effect: in a sum the student's cross-entropy is counted "
                f"once, as {first} has it; leave the option out, or put {part} first"
            )


def _own_options(options, part: str, kind: type[Method]):
    values = {o.name: getattr(options, f"{part}_{o.name}") for o in fields(kind.Options)}
    with _named(part):
        return kind.Options(**values)


@contextmanager
def _named(part: str):
    """Errors about a part's options say how they are called in the sum."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{part} (here its options begin with --{part}-): {error}") from None


def explained(options: type) -> dict[str, str]:
    """The line below each option in the source of its dataclass."""
    try:
        body = ast.parse(dedent(inspect.getsource(options))).body[0].body
    except OSError:  # typed into an interpreter
        return {}
    return {
        option.target.id: " ".join(line.value.value.split())
        for option, line in itertools.pairwise(body)
        if isinstance(option, ast.AnnAssign) and isinstance(line, ast.Expr)
    }
