"""IAKD: teacher blocks are swapped into the student at random while it learns (arXiv:2007.01476).

Student S and teacher T are divided into K gates. In each step, for the whole batch, a_i ~ Bernoulli(p_i), and

    y_{i+1} = S_i(y_i) if a_i else T_i(y_i),    loss = CE (+ KD with the teacher, where kd_weight > 0)

Stem and classifier are the student's. Teacher blocks are frozen and their BatchNorm is in eval mode; gradients flow
through them to the blocks before. On a GPU their BatchNorm is folded into the convolutions (engine/folded_gates.py). A
student block that is not drawn stays as it is in that step: no weight decay, no momentum, no statistics. The student
alone is evaluated and saved.

Source: no code was released and only the abstract could be read. From it: random swapping, no feature matching. The
rest is ours: what a gate is, the schedules of p and their defaults, and the optional KD term. With p = 0.9 all
blocks of the student run in 86 % of the steps that `linear` gives three gates; with 0.5 in 47 %. In short runs the
student gains with p, see docs/results.md.
Departures: unknown, see above. The draws depend on seed and step alone: all processes and resumed runs draw the same.
"""

import math
import random
from bisect import bisect_right
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from ..errors import UserError, check_number
from ..losses import KDLoss
from ..models import Staged, tapped
from ..models.own_input import plain_network
from .base import Method, cross_entropy
from .context import RunContext
from .forwards import ForwardCache, StagedView
from .parts.gates import Swapped, adapted, gates_of, with_adapters


@dataclass(frozen=True)
class IAKDOptions:
    """Interactive distillation."""

    gates: Literal["stage", "block"] = "stage"
    """What is swapped: whole stages, or single student blocks for groups of equally many teacher blocks."""
    schedule: Literal["uniform", "linear", "review"] = "linear"
    """uniform: p is constant; linear: p rises to 1 over the run; review: it does so after each drop of the learning
    rate."""
    p: tuple[float, ...] = (0.9,)
    """Probability of the student's block: the initial one (linear, review) or the constant one (uniform). Give one
    number for all gates, or one for each gate."""
    finish_epochs: float = 0.0
    """With --schedule uniform: number of last epochs in which only the student's blocks run (p = 1)."""
    teacher_bn: Literal["eval", "batch"] = "eval"
    """Statistics that BatchNorm uses in the teacher's blocks: the running ones (eval) or those of the batch."""
    kd_weight: float = 0.0
    """Weight of T^2 * KL(teacher || student) beside the cross-entropy."""
    temperature: float = 4.0
    """Temperature T of that term; above 0."""
    adapters: bool = False
    """Put a 1x1 convolution with BatchNorm before and after each teacher block whose channels differ."""

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, above_zero=True)
        check_number("kd_weight", self.kd_weight)
        if not self.p or not all(0 <= p <= 1 for p in self.p):
            raise UserError(f"--p must be one or more probabilities from 0 to 1, got {' '.join(map(str, self.p))}")
        check_number("finish_epochs", self.finish_epochs)
        if self.finish_epochs and self.schedule != "uniform":
            raise UserError(f"--finish-epochs is for --schedule uniform; {self.schedule} ends at p = 1 by itself")


class IAKD(Method):
    """Teacher blocks are swapped into the student at random while it learns (2020)."""

    Options = IAKDOptions
    options: IAKDOptions
    paper = "arXiv:2007.01476"
    needs_stages = "both staged, equal shapes at the gates (or --adapters)"
    find_unused_parameters = True
    swaps_blocks = True

    view: Staged

    def build(self) -> None:
        o = self.options
        self.teacher.batch_statistics |= o.teacher_bn == "batch"
        teacher = plain_network(self.teacher.net)  # its blocks get the student's features, whatever images it takes
        gates = gates_of(self.student, teacher, o.gates)
        if len(o.p) not in (1, len(gates)):
            raise UserError(f"--p has {len(o.p)} probabilities for {len(gates)} gates; give 1 or {len(gates)}")
        gates, self.adapters = adapted(self.student, teacher, gates, allowed=o.adapters)
        self.gates, self.run = gates, RunContext()
        self.__dict__["view"] = tapped(self.student)  # not registered: its modules are the student's
        self.first = o.p * (len(gates) // len(o.p))
        self.kd = KDLoss(o.temperature, ce_weight=1.0, kd_weight=o.kd_weight)

    def swap_in(self, teacher: nn.Module) -> None:
        self.gates = with_adapters(gates_of(self.student, teacher, self.options.gates), self.adapters)

    def losses(self, out: ForwardCache, target: Tensor, plan: Hashable) -> dict[str, Tensor]:
        if not self.options.kd_weight:
            return {"ce": cross_entropy(out(self.student), target, ignore_index=self.ignore_index)}
        return self.kd.terms(out(self.student), out(self.teacher), target)

    @property
    def asks_teacher(self) -> bool:
        return bool(self.options.kd_weight)

    def check(self, run: RunContext) -> None:
        o = self.options
        if o.schedule == "review" and not run.drops:
            raise UserError(
                "--schedule review restarts at each drop of the learning rate, and --sched has none here: "
                "use --sched multistep or step, or --schedule linear"
            )
        if o.finish_epochs >= run.epochs and o.finish_epochs:
            raise UserError(f"--finish-epochs {o.finish_epochs:g} leaves nothing of --epochs {run.epochs}; lower it")

    def prepare(self, loader: object, run: RunContext = RunContext()) -> None:  # noqa: B008, frozen
        self.check(run)
        self.run = run

    def spread_over(self, before: int, now: int) -> list[str]:
        o = self.options
        if o.schedule == "uniform" and not o.finish_epochs:
            return []
        ends = [f"{epochs - o.finish_epochs:g}" for epochs in (now, before)]
        return [f"--schedule {o.schedule} ends after epoch {ends[0]}, not {ends[1]}"]

    def plan(self, step: int) -> tuple[bool, ...]:
        """For every gate, True if the student's block runs in this step."""
        draw = random.Random(f"{self.run.seed} {step}")  # a generator per step: nothing to save, equal everywhere
        return tuple(draw.random() < p for p in self.probabilities(step))

    def probabilities(self, step: int) -> list[float]:
        """p_i of every gate in this step."""
        o, steps_per_epoch = self.options, self.run.steps_per_epoch
        ends = [0.0, *(self.run.drops if o.schedule == "review" else ()), float(self.run.epochs)]
        place = min(bisect_right(ends, step / steps_per_epoch), len(ends) - 1)
        ends[-1] -= o.finish_epochs
        start, end = (math.ceil(epoch * steps_per_epoch) for epoch in ends[place - 1 : place + 1])
        if o.schedule == "uniform":
            return [1.0] * len(self.gates) if step >= end else list(self.first)
        done = min(1.0, (step - start) / max(1, end - start - 1))  # 0 at the first step of the period, 1 at its last
        return [p + (1 - p) * done for p in self.first]

    def staged_views_for(self, plan: Hashable) -> Mapping[nn.Module, StagedView]:
        """The student runs along the path `plan`: tuple[bool, ...], one for each gate; None: its own blocks alone."""
        path = plan if isinstance(plan, tuple) else (True,) * len(self.gates)
        return self.staged_views | {self.student: Swapped(self.view, self.gates, path)}

    def graph_groups(self) -> list[list[nn.Module]]:
        """The stem, the two alternatives of every gate, and the head, whose final norm is apart if a map ends there."""
        swapped = [[gate.student, gate.teacher] for gate in self.gates]
        final: list[list[nn.Module]] = [[self.view.final]] if len(self.view.final) else []
        return [[self.view.stem], *swapped, *final, [self.view.head]]

    def selection_rates(self, steps: range) -> dict[str, float]:
        """How often the student's block ran at each gate."""
        paths = [self.plan(step) for step in steps]
        return {f"gate{i}_share": sum(own) / len(paths) for i, own in enumerate(zip(*paths, strict=True), 1)}
