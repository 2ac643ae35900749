"""The protocol of a method: what a paper adds to plain training, and nothing of how it is run.

A step is: images -> `out`, the memo of this step's forward passes -> `method.losses(out, target, plan)` -> backward.
The engine calls the method eagerly, compiled or captured; the method does not know which.
"""

import functools
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import UserError, check_number
from ..models import staged


class FrozenTeacher(nn.Module):
    """The teacher: always in eval mode, without gradients, and outside of the module tree that holds it.

    The holder's `train()`, `parameters()`, `state_dict()` and DDP do not reach `net`; `to()` does. So its BatchNorm
    statistics cannot move, the optimizer cannot see it and no checkpoint of the student contains it.

    `batch_statistics`: while the holder trains, BatchNorm normalises with the batch, and still writes nothing.
    """

    def __init__(self, net: nn.Module, batch_statistics: bool = False):
        super().__init__()
        self.batch_statistics = batch_statistics
        self.__dict__["net"] = net.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "FrozenTeacher":
        super().train(mode)
        self.net.eval()
        for norm in (module for module in self.net.modules() if isinstance(module, _BatchNorm)):
            norm.training = mode and self.batch_statistics
            norm.track_running_stats = not norm.training  # torch then passes no running statistics to be written
        return self

    def _apply(self, fn, recurse=True):
        self.net._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return self.net(images)


class ForwardCache:
    """This step's forward passes: `out(net)` is its logits [N, C], `out.features(net)` its stage outputs.

    A network runs once, however many terms ask. Features exist for the networks that the method has tapped.
    """

    def __init__(self, images: Tensor, views: dict[nn.Module, nn.Module]):
        self.images, self._views, self._memo, self._beside = images, views, {}, {}

    def __call__(self, net: nn.Module) -> Tensor:
        return self._run(net)[0]

    def features(self, net: nn.Module) -> list[Tensor]:
        if net not in self._views:
            raise ValueError(f"features of {type(net).__name__} were asked for, but the method has not tapped it")
        return self._run(net)[1]

    def start(self, net: nn.Module) -> None:
        """In a step that is being captured: run `net` on a stream of its own, beside the others, until it is asked."""
        if torch.compiler.is_compiling():  # it would compile anew within the capture
            return
        if self.images.is_cuda and torch.cuda.is_current_stream_capturing():
            beside = _stream_beside(self.images.device)
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside):
                self._run(net)
            self._beside[net] = beside

    def join(self, net: nn.Module) -> None:
        if net in self._beside:
            torch.cuda.current_stream().wait_stream(self._beside.pop(net))

    def _run(self, net: nn.Module) -> tuple[Tensor, list[Tensor]]:
        self.join(net)
        if net not in self._memo:
            with torch.no_grad() if isinstance(net, FrozenTeacher) else nullcontext():
                view = self._views.get(net)
                self._memo[net] = view.features(self.images) if view else (_logits(net, self.images), [])
        return self._memo[net]


@functools.cache
def _stream_beside(device: torch.device) -> torch.cuda.Stream:
    """One for all captures: memory that was freed is used again within a stream."""
    return torch.cuda.Stream(device)


def _logits(net: nn.Module, images: Tensor) -> Tensor:
    logits = net(images)
    if not isinstance(logits, Tensor):
        kind = type(logits).__name__
        raise UserError(
            f"{type(net).__name__} gives {kind} where logits [N, C] are needed; switch off its extra outputs"
        )
    return logits


@dataclass(frozen=True)
class RunContext:
    """What a method may know of the run it is in."""

    epochs: int = 1
    steps_per_epoch: int = 1
    drops: tuple[float, ...] = ()
    """Epochs at which the learning rate drops; none where it falls steadily."""
    seed: int = 0
    device: torch.device = torch.device("cpu")
    folder: Path | None = None
    """Where `prepare` may keep what it made; the same folder when the run is resumed."""
    autocast: Callable[[], AbstractContextManager] = nullcontext
    parallel: Callable[[nn.Module], nn.Module] = lambda net: net
    """DDP around a network that `prepare` trains."""
    track: Callable[[Sequence, str], Iterable] = lambda steps, title: steps
    """A progress bar around the steps of `prepare`."""
    log: Callable[[str], None] = lambda line: None
    """Shows a line to who started the run."""


@dataclass(frozen=True)
class NoOptions:
    """This method has no options."""


class Method(nn.Module):
    """Base of all methods: METHODS[name](student, teacher, options, peers). A subclass writes `losses`."""

    Options = NoOptions  # a frozen dataclass, validated on construction
    paper = ""
    needs_teacher = True  # a trained network, given as `teacher`
    needs_peers = False  # one or more networks that are trained beside the student, given as `peers`
    needs_stages = ""  # which networks must be divisible into stages, for `fastkd methods`
    ce_option = "ce_weight"  # what weighs the term `ce` alone; "": nothing does; None: there is no such term
    find_unused_parameters = False  # a step may leave some weights without a gradient: they are then not touched at all

    def __init__(
        self,
        student: nn.Module,
        teacher: "nn.Module | FrozenTeacher | None" = None,
        options=None,
        peers: Sequence[nn.Module] = (),
    ):
        super().__init__()
        self._check_networks(student, teacher, peers)
        self.student = student
        self.teacher = teacher if teacher is None or isinstance(teacher, FrozenTeacher) else FrozenTeacher(teacher)
        self.peers = nn.ModuleList(peers)
        self.options = options or self.Options()
        self.__dict__["staged_views"] = {}  # outside of the module tree: a view shares its network's parameters

    def _check_networks(self, student: nn.Module, teacher: nn.Module | None, peers: Sequence[nn.Module]) -> None:
        name = type(self).__name__
        if self.needs_teacher != (teacher is not None):
            raise UserError(f"{name} {'needs a' if self.needs_teacher else 'takes no'} teacher")
        if self.needs_peers != bool(peers):
            wanted = "needs one or more peers, networks that learn beside the student" if self.needs_peers else ""
            raise UserError(f"{name} {wanted or f'takes no peers, got {len(peers)}'}")
        learners = {"student": student} | {f"peer {number}": net for number, net in enumerate(peers, 1)}
        for role, net in learners.items():
            if isinstance(net, FrozenTeacher) or not any(p.requires_grad for p in net.parameters()):
                raise UserError(f"{name} trains the {role}, whose weights are frozen: give a network that can learn")
        nets = [*learners.values(), *([getattr(teacher, "net", teacher)] if teacher is not None else [])]
        if len({id(net) for net in nets}) < len(nets):
            raise UserError(f"{name} needs networks of their own for student, teacher and peers; one is there twice")

    def request_features(self, net: nn.Module) -> None:
        """Ask for `out.features(net)`; `net` is one of the method's networks."""
        self.staged_views[net] = staged(net.net if isinstance(net, FrozenTeacher) else net)

    def staged_views_for(self, plan: Hashable) -> dict[nn.Module, nn.Module]:
        """How the networks run in a step: what has `features(images)` -> (logits, maps), by network."""
        return self.staged_views

    def check(self, run: RunContext) -> None:
        """UserError where the options do not fit the run; asked before a teacher is trained for it."""

    def prepare(self, loader, run: RunContext = RunContext()) -> None:  # noqa: B008, frozen
        """Work before the first epoch, such as training a teacher's auto-encoder; also when a run is resumed."""

    def plan(self, step: int) -> Hashable:
        """What the host decides for this step, such as a random path; one captured graph per value."""
        return None

    def plans(self, step: int) -> Sequence[Hashable]:
        """One plan for each update that is made with this step's batch."""
        return (self.plan(step),)

    def losses(self, out: ForwardCache, target: Tensor, plan: Hashable) -> dict[str, Tensor]:
        """Weighted terms, scalars on the device; their sum is the loss. target: [N] int64 or [N, C] floating.

        `ce`, `ce_peer1`, ...: the cross-entropy of a network's own logits with the labels, which sums count once.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define losses()")

    @property
    def asks_teacher(self) -> bool:
        """Whether `losses` asks `out` for the teacher."""
        return self.teacher is not None

    def param_groups(self, lr: float) -> list[dict]:
        """Groups for the optimizer; a group may have a learning rate of its own."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "lr": lr}]

    def networks(self) -> dict[str, nn.Module]:
        """What is evaluated and saved, the student first; with the keys of the plain networks."""
        return {"student": self.student} | {f"peer{number}": net for number, net in enumerate(self.peers, 1)}

    def graph_groups(self) -> list[list[nn.Module]]:
        """Where plans are paths: of every group a step runs one module, group after group. Else nothing."""
        return []

    def selection_rates(self, steps: range) -> dict[str, float]:
        """Shares between 0 and 1 for the history: how often something was chosen in these steps."""
        return {}

    def forward(self, images: Tensor, target: Tensor, plan: Hashable = None) -> dict[str, Tensor]:
        out = ForwardCache(images, self.staged_views_for(plan))
        if self.asks_teacher:
            out.start(self.teacher)
        terms = self.losses(out, target, plan)
        if self.asks_teacher:
            out.join(self.teacher)
        return terms


def cross_entropy(logits_NC: Tensor, target: Tensor, weight: float = 1.0) -> Tensor:
    """weight * mean cross-entropy, in fp32, or fp64 where the logits are; target: [N] int64 or [N, C] floating."""
    return weight * F.cross_entropy(logits_NC.to(torch.promote_types(logits_NC.dtype, torch.float32)), target)


def check_weights(**weights: float) -> None:
    """Raise UserError unless every option is a finite number of 0 or more and at least one is above 0."""
    for name, weight in weights.items():
        check_number(name, weight)
    if not any(weights.values()):
        names = ", ".join(f"--{name.replace('_', '-')}" for name in weights)
        raise UserError(f"{names} are all 0: nothing is learnt; give one of them above 0")


def check_temperature(temperature: float) -> None:
    """Raise UserError unless the temperature is a finite number above 0."""
    check_number("temperature", temperature, above_zero=True)
