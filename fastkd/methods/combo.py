"""Combo: the weighted sum of several methods on one student, with one teacher and one forward pass of each network.

    L = sum_m weight_m * L_m,    --method iekd+kd --iekd-weight 1 --kd-weight 0.5

The cross-entropy of each network with the labels is counted once: of `ce`, `ce_peer1`, ... only the first method's term
is used. Every option of a method has the method's name in front: `--kd-temperature`, `--iekd-inheritance-weight`. All
methods share one teacher, so `--iakd-teacher-bn batch` changes the teacher of the others too.

Source: ours.
"""

import itertools
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import field, fields, make_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..data.base import Loader
from ..errors import UserError, check_number
from ..models import PreActivation
from .base import Method
from .context import RunContext
from .embedding import keeps_input
from .forwards import ForwardCache, StagedView
from .frozen import FrozenTeacher


class Combo(Method):
    """The sum of several methods, such as iekd+kd."""

    kinds: dict[str, type[Method]] = {}  # by name; `combine` makes a subclass that has some

    def build(self) -> None:
        self.methods: dict[str, Method] = {}
        for name, kind in self.kinds.items():
            teacher = self.teacher if kind.needs_teacher else None
            peers = list(self.peers) if kind.needs_peers else ()
            self.methods[name] = kind(self.student, teacher, _options_of(self.options, name, kind), peers)
            if len(self.methods[name].plans(0)) > 1:
                raise UserError(f"--{name}-alternate makes several updates with a batch: that cannot be summed")
        self.parts = nn.ModuleDict(self.methods)
        self.classifiers = {net: kept for method in self.methods.values() for net, kept in method.classifiers.items()}
        self.weights = {name: getattr(self.options, f"{name}_weight") for name in self.methods}
        self.find_unused_parameters = any(method.find_unused_parameters for method in self.methods.values())
        options = {name: method.options for name, method in self.methods.items()}
        norms = {name: o.teacher_bn for name, o in options.items() if hasattr(o, "teacher_bn")}
        if len(set(norms.values())) > 1:
            given = " and ".join(f"--{name}-teacher-bn {norm}" for name, norm in norms.items())
            raise UserError(f"{given}: there is one teacher in a sum; give both the same")
        for net in {net for method in self.methods.values() for net in method.staged_views}:
            self._check_views(net)

    def _check_views(self, net: nn.Module) -> None:
        """One forward pass gives a network's feature maps either before the activation or after it."""
        before, after = [], []
        for name, method in self.methods.items():
            chooses_views = type(method).staged_views_for is not Method.staged_views_for
            if isinstance(method.staged_views.get(net), PreActivation):
                before.append(name)
            elif net in method.staged_views or net is self.student and chooses_views:
                after.append(name)
        if before and after:
            kind = type(net.net if isinstance(net, FrozenTeacher) else net).__name__
            raise UserError(
                f"{before[0]} looks at maps of {kind} before the activation, {after[0]} at those after it: they cannot "
                "be summed; leave one of them out"
            )

    def losses(self, out: ForwardCache, target: Tensor, plan: Hashable) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = {}
        for (name, weight), (method, its_plan) in zip(self.weights.items(), self._with_plans(plan), strict=True):
            for term, value in method.losses(out, target, its_plan).items():
                if term not in terms or not (term == "ce" or term.startswith("ce_peer")):
                    terms[f"{name}_{term}" if term in terms else term] = weight * value
        return terms

    @property
    def asks_teacher(self) -> bool:
        return any(method.asks_teacher for method in self.methods.values())

    def check(self, run: RunContext) -> None:
        for name, method in self.methods.items():
            with _errors_name_the_sum(name):
                method.check(run)

    def prepare(self, loader: Loader, run: RunContext = RunContext()) -> None:  # noqa: B008, frozen
        """Each method is prepared as if it were alone: from the same random state, on the same batches."""
        random = torch.get_rng_state()
        for method in self.methods.values():
            position = loader.state_dict()
            torch.set_rng_state(random)
            method.prepare(loader, run)
            loader.load_state_dict(position)

    def spread_over(self, before: int, now: int) -> list[str]:
        return [line for method in self.methods.values() for line in method.spread_over(before, now)]

    def at_epoch(self, epoch: float) -> None:
        for method in self.methods.values():
            method.at_epoch(epoch)

    def param_groups(self, lr: float) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = []
        seen: set[Tensor] = set()
        for group in itertools.chain(*(method.param_groups(lr) for method in self.methods.values())):
            groups.append({**group, "params": [p for p in group["params"] if p not in seen]})
            seen.update(group["params"])
        return [group for group in groups if group["params"]]

    def networks(self) -> dict[str, nn.Module]:
        return {name: net for method in self.methods.values() for name, net in method.networks().items()}

    def plan(self, step: int) -> tuple[Hashable, ...]:
        """The plan of each method, in the order of the sum."""
        return tuple(method.plan(step) for method in self.methods.values())

    def staged_views_for(self, plan: Hashable) -> Mapping[nn.Module, StagedView]:
        """The views of all methods. A view that a method makes for its plan, such as a path, takes precedence."""
        methods = self._with_plans(plan)
        views = {net: view for method, _ in methods for net, view in method.staged_views.items()}
        for method, its_plan in methods:
            chosen = method.staged_views_for(its_plan)
            views |= {net: view for net, view in chosen.items() if view is not method.staged_views.get(net)}
        return views

    def graph_groups(self) -> list[list[nn.Module]]:
        """Those of all methods. A classifier whose input is kept stays outside: a replay would not keep it."""
        groups = [group for method in self.methods.values() for group in method.graph_groups()]
        return [group for group in groups if not any(keeps_input(module) for module in group)]

    def selection_rates(self, steps: range) -> dict[str, float]:
        return {name: rate for method in self.methods.values() for name, rate in method.selection_rates(steps).items()}

    def _with_plans(self, plan: Hashable) -> list[tuple[Method, Hashable]]:
        plans = plan if isinstance(plan, tuple) and plan else [None] * len(self.parts)
        return list(zip(self.methods.values(), plans, strict=True))


def combine(kinds: dict[str, type[Method]], name: str) -> type[Combo]:
    """The class of the sum of `kinds`, called `name`. Raises UserError if a method is given twice."""
    if name.count("+") + 1 != len(kinds):
        raise UserError(f"method {name}: give each method once; --NAME-weight sets its weight")
    about = {
        "kinds": kinds,
        "Options": _sum_of_options(kinds),
        "__doc__": f"The sum of {name}.",
        "needs_stages": "; ".join(f"{each}: {kind.needs_stages}" for each, kind in kinds.items() if kind.needs_stages),
        "needs_teacher": any(kind.needs_teacher for kind in kinds.values()),
        "needs_peers": any(kind.needs_peers for kind in kinds.values()),
        "uses_logits_alone": all(kind.uses_logits_alone or not kind.needs_teacher for kind in kinds.values()),
        "takes_topk": all(kind.takes_topk or not kind.needs_teacher for kind in kinds.values()),
        "takes_bce": all(kind.takes_bce for kind in kinds.values()),
        "needs_labels": any(kind.needs_labels for kind in kinds.values()),
    }
    return type(name, (Combo,), about)


def _sum_of_options(kinds: dict[str, type[Method]]) -> type:
    """A dataclass with the options of all methods and their checks; its docstring explains them to `--help`."""
    options: list[tuple[str, Any, Any]] = []
    about = ["The methods of the sum.", "", "Args:"]
    for name, kind in kinds.items():
        helps = _explained(kind.Options)
        for o in fields(kind.Options):
            default = field(default=o.default, default_factory=o.default_factory)
            options.append((f"{name}_{o.name}", o.type, default))
            about.append(f"    {name}_{o.name}: {helps.get(o.name, '')}")
        options.append((f"{name}_weight", float, field(default=1.0)))
        about.append(f"    {name}_weight: Factor on all terms of {name}; above 0.")

    def check(self: Any) -> None:
        for name, kind in kinds.items():
            weight = getattr(self, f"{name}_weight")
            check_number(f"{name}_weight", weight, above_zero=True, hint=f"; or leave {name} out")
            _options_of(self, name, kind)
        _check_ce_options(self, kinds)

    return make_dataclass(
        "ComboOptions", options, frozen=True, namespace={"__post_init__": check, "__doc__": "\n".join(about)}
    )


def _check_ce_options(options: Any, kinds: dict[str, type[Method]]) -> None:
    """Raise UserError if the weight of a cross-entropy that is not counted was changed."""
    first, *others = [name for name, kind in kinds.items() if kind.ce_option is not None] or [""]
    for name in others:
        option = kinds[name].ce_option or ""
        default = {o.name: o.default for o in fields(kinds[name].Options)}.get(option)
        if default is not None and getattr(options, f"{name}_{option}") != default:
            raise UserError(
                f"--{name}-{option.replace('_', '-')} has no effect: in a sum the student's cross-entropy is counted "
                f"once, as {first} has it; leave the option out, or put {name} first"
            )


def _options_of(options: Any, name: str, kind: type[Method]) -> Any:
    """The options of one method out of those of the sum."""
    values = {o.name: getattr(options, f"{name}_{o.name}") for o in fields(kind.Options)}
    with _errors_name_the_sum(name):
        return kind.Options(**values)


@contextmanager
def _errors_name_the_sum(name: str) -> Iterator[None]:
    """Errors about a method's options say what the options are called in the sum."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{name} (here its options begin with --{name}-): {error}") from None


def _explained(options: type) -> dict[str, str]:
    """By option, the docstring below it in the source of a dataclass; empty without docstring_parser, tyro's own."""
    try:
        from docstring_parser import parse_from_object
    except ImportError:
        return {}
    return {o.arg_name: " ".join((o.description or "").split()) for o in parse_from_object(options).params}
