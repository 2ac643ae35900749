"""The protocol of a method: what a paper adds to training, and nothing of how a step is run.

A step is: images -> `out`, the cache of its forward passes -> `method.losses(out, target, plan)` -> backward.
The engine runs a method eagerly, compiled or as a CUDA graph; the method does not know which.
A subclass writes `losses`, and overrides the rest only as it needs. docs/method-protocol.md is the guide.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.base import Loader
from ..errors import UserError, check_number
from ..losses import UNLABELLED, BridgeLoss, KDLoss, MutualLoss
from ..models import tapped
from ..option_kinds import check_kinds
from .context import NoOptions, RunContext
from .embedding import ClassifierInput, classifier_input
from .forwards import ForwardCache, StagedView, Taught
from .frozen import FrozenTeacher
from .hooks import OptionalHooks

BCE_UNLABELLED = "--loss bce and --unlabelled: images without a label have no target; drop one of them"
NO_LABEL = -(2**31)  # ignored in place of torch's -100, which would pass without a word


class Method(OptionalHooks):
    """Base of all methods: METHODS[name](student, teacher, options, peers).

    `student` and `peers` are trained, `teacher` is frozen. Raises UserError when the networks do not fit the method.
    """

    Options: type = NoOptions  # a frozen dataclass that checks its values when it is made
    paper = ""
    needs_teacher = True  # a trained network, given as `teacher`
    needs_peers = False  # one or more networks that are trained beside the student, given as `peers`
    needs_stages = ""  # which networks must be divisible into stages, for `fastkd methods`
    ce_option: str | None = "ce_weight"  # option that scales the term `ce` alone; "": there is none; None: no such term
    uses_logits_alone = False  # of the teacher; they may then be given with a batch, from a teacher cache
    takes_topk = False  # `losses` can do with the teacher's k largest logits, `out.topk`
    takes_bce = False  # the term `ce` is `hard_loss`, and so may be a binary cross-entropy
    needs_labels = False  # a term other than the cross-entropy uses the label of every image
    find_unused_parameters = False  # a step may leave weights without a gradient; they are then not updated at all

    bce_threshold: float | None = None  # --loss bce, with its threshold (below 0: none); None: cross-entropy
    ignore_index: int | None = None  # the label of images without one; None: every image has one
    teacher: FrozenTeacher  # None in a method without a teacher

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None = None,
        options: Any = None,
        peers: Sequence[nn.Module] = (),
    ):
        super().__init__()
        self._check_networks(student, teacher, peers)
        self.options = options or self.Options()
        self._check_options(self.options)
        self.student = student
        frozen = teacher if teacher is None or isinstance(teacher, FrozenTeacher) else FrozenTeacher(teacher)
        self.teacher = cast(FrozenTeacher, frozen)
        self.peers = nn.ModuleList(peers)
        self.staged_views: dict[nn.Module, StagedView] = {}
        self.classifiers: dict[nn.Module, ClassifierInput] = {}
        self.build()

    def build(self) -> None:
        """Make the losses and the modules that the method adds, and request features. The networks are set by then."""

    def losses(self, out: ForwardCache, target: Tensor, plan: Hashable) -> dict[str, Tensor]:
        """Weighted loss terms, scalars on the device; their sum is the loss.

        target: class indices [N] int64, or probabilities [N, C] floating. `plan` is None unless the method overrides
        `plan`. The terms `ce`, `ce_peer1`, ... are the cross-entropy of a network's logits with the labels; in a sum
        of methods each of them is counted once.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define losses()")

    def request_features(self, *nets: nn.Module) -> None:
        """Make `out.features(net)` available to `losses` for each of `nets`, networks of the method."""
        for net in nets:
            self.staged_views[net] = tapped(net.net if isinstance(net, FrozenTeacher) else net)

    def request_embeddings(self, *nets: nn.Module) -> None:
        """Make `out.embedding(net)`, the classifier's input [N, D], available to `losses` for each of `nets`.

        The networks need no stages. Of two classifiers (distilled DeiT) the first counts: that of the class token.
        """
        for net in nets:
            self.classifiers[net] = classifier_input(net.net if isinstance(net, FrozenTeacher) else net)

    def allow_unlabelled(self) -> None:
        """From now on, images with the label UNLABELLED have no cross-entropy. UserError if the method needs labels.

        All other terms use such images as any others. Without this call, the label is an error.
        """
        if self.needs_labels:
            raise UserError(
                f"{self._get_name()} needs the label of every image: leave the unlabelled images out, or use kd"
            )
        if self.bce_threshold is not None:
            raise UserError(BCE_UNLABELLED)
        for module in self.modules():
            if isinstance(module, Method | KDLoss | MutualLoss | BridgeLoss):
                module.ignore_index = UNLABELLED

    def set_label_loss(self, loss: str, threshold: float = -1.0) -> None:
        """From now on, the term `ce` is the cross-entropy ("ce") or the binary cross-entropy of all classes ("bce").

        `threshold`: see `binary_cross_entropy`. Raises UserError for a method whose term is part of another loss.
        """
        if loss == "bce" and not self.takes_bce:
            raise UserError(
                f"--loss bce: the cross-entropy of {self._get_name()} is part of its own loss; use kd, dkd, dist, "
                "hardkd, fitnet, at, ft, ofd, rkd, sp, ce or a sum of them, or --loss ce"
            )
        if loss == "bce" and self.ignore_index is not None:
            raise UserError(BCE_UNLABELLED)
        for module in self.modules():
            if isinstance(module, Method):
                module.bce_threshold = threshold if loss == "bce" else None

    def hard_loss(self, logits_NC: Tensor, target: Tensor, weight: float = 1.0) -> Tensor:
        """weight * the loss of the labels, a scalar; what `set_label_loss` says. See `cross_entropy` for the shapes."""
        if self.bce_threshold is None:
            return cross_entropy(logits_NC, target, weight, self.ignore_index)
        return weight * binary_cross_entropy(logits_NC, target, self.bce_threshold)

    def check(self, run: RunContext) -> None:
        """Raise UserError if the options do not fit the run. Called before a teacher is trained for it."""

    def prepare(self, loader: Loader, run: RunContext = RunContext()) -> None:  # noqa: B008, frozen
        """Work before the first epoch, such as training an auto-encoder. Called again when a run is resumed."""

    def spread_over(self, before: int, now: int) -> list[str]:
        """For the log of a run that had `before` epochs and has `now`: what the method does at other epochs."""
        return []

    def param_groups(self, lr: float) -> list[dict[str, Any]]:
        """Parameter groups for the optimizer; a group may have its own `lr`."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "lr": lr}]

    def networks(self) -> dict[str, nn.Module]:
        """The networks that are evaluated and saved, the student first."""
        return {"student": self.student} | {f"peer{number}": net for number, net in enumerate(self.peers, 1)}

    @property
    def asks_teacher(self) -> bool:
        """True if `losses` uses the teacher's logits or feature maps through `out`."""
        return self.teacher is not None

    def learners(self, plan: Hashable) -> Sequence[nn.Module]:
        """The networks that are trained in a step with this plan, of the student and the peers."""
        return (self.student, *self.peers)

    def staged_views_for(self, plan: Hashable) -> Mapping[nn.Module, StagedView]:
        """By network, the view that runs in its place in a step with this plan."""
        return self.staged_views

    def forward(self, images: Tensor, target: Tensor, plan: Hashable = None, taught: Taught = ()) -> dict[str, Tensor]:
        """Images [N, 3, H, W] and their target -> the terms of `losses`. This is what the engine calls.

        `taught`: what the teacher says of the images, if it is known already; the teacher is not run then.
        """
        out = ForwardCache(images, self.staged_views_for(plan), self.classifiers)
        others = [self.teacher, *self.peers] if self.asks_teacher and not taught else [*self.peers]
        if taught:
            out.give(self.teacher, taught)
        out.start(self.student, others, self.learners(plan))
        terms = self.losses(out, target, plan)
        out.join_all()
        return terms

    def _check_options(self, options: object) -> None:
        is_made = is_dataclass(options) and not isinstance(options, type)
        if not is_made or any(not hasattr(options, each.name) for each in fields(self.Options)):
            name, kind = type(self).__name__, type(options).__name__
            raise UserError(f"options of {name} are made by {name}.Options(...), got a {kind}: {options!r:.60}")
        check_kinds(options)

    def _check_networks(self, student: nn.Module, teacher: nn.Module | None, peers: Sequence[nn.Module]) -> None:
        name = type(self).__name__
        if not isinstance(peers, Iterable):
            raise UserError(f"peers of {name} must be a list of networks, got a {type(peers).__name__}: [network]")
        if self.needs_teacher != (teacher is not None):
            raise UserError(f"{name} {'needs a' if self.needs_teacher else 'takes no'} teacher")
        if self.needs_peers and not peers:
            raise UserError(f"{name} needs one or more peers, networks that learn beside the student")
        if peers and not self.needs_peers:
            raise UserError(f"{name} takes no peers, got {len(peers)}")
        learners = {"student": student} | {f"peer {number}": net for number, net in enumerate(peers, 1)}
        for role, net in (learners | ({"teacher": teacher} if teacher is not None else {})).items():
            if not isinstance(net, nn.Module):
                raise UserError(
                    f"the {role} of {name} must be a network, a torch.nn.Module, got a {type(net).__name__}: "
                    f"{net!r:.60}; create_model(name, classes) makes one"
                )
        for role, net in learners.items():
            if isinstance(net, FrozenTeacher) or not any(p.requires_grad for p in net.parameters()):
                raise UserError(f"{name} trains the {role}, whose weights are frozen: give a network that can learn")
        frozen = [] if teacher is None else [getattr(teacher, "net", teacher)]
        nets = [*learners.values(), *frozen]
        if len({id(net) for net in nets}) < len(nets):
            raise UserError(f"{name} needs separate networks for student, teacher and peers; one is given twice")


def cross_entropy(logits_NC: Tensor, target: Tensor, weight: float = 1.0, ignore_index: int | None = None) -> Tensor:
    """weight * mean cross-entropy, a scalar in fp32, or in fp64 if the logits are.

    target: class indices [N] int64, or probabilities [N, C] floating. Rows labelled `ignore_index` have no part in the
    mean, which is 0 if there is no other row. With None, a label outside the classes is an error, -100 included.
    """
    logits_NC = logits_NC.to(torch.promote_types(logits_NC.dtype, torch.float32))
    if ignore_index is None or target.is_floating_point():
        return weight * F.cross_entropy(logits_NC, target, ignore_index=NO_LABEL)
    total = F.cross_entropy(logits_NC, target, ignore_index=ignore_index, reduction="sum")
    return weight * total / (target != ignore_index).sum().clamp(min=1)


def binary_cross_entropy(logits_NC: Tensor, target: Tensor, threshold: float = -1.0) -> Tensor:
    """The mean binary cross-entropy of all classes and images, a scalar in fp32, or in fp64 if the logits are.

    Wightman et al. 2021 (arXiv:2110.00476) and timm's BinaryCrossEntropy: each class is a yes-or-no question. target:
    class indices [N] int64, or probabilities [N, C] floating. With a `threshold` of 0 or more, targets above it become
    1 and all others 0.
    """
    logits_NC = logits_NC.to(torch.promote_types(logits_NC.dtype, torch.float32))
    if not target.is_floating_point():
        target = torch.zeros_like(logits_NC).scatter_(1, target[:, None], 1.0)
    if threshold >= 0:
        target = target > threshold
    return F.binary_cross_entropy_with_logits(logits_NC, target.to(logits_NC.dtype))


def check_weights(**weights: float) -> None:
    """Raise UserError unless every option is a finite number of 0 or more and at least one is above 0."""
    for name, weight in weights.items():
        check_number(name, weight)
    if not any(weights.values()):
        names = ", ".join(f"--{name.replace('_', '-')}" for name in weights)
        raise UserError(f"{names} are all 0: nothing is learnt; give one of them above 0")


@dataclass(frozen=True)
class WeightOptions:
    """Base of options whose numbers are weights, of which one is above 0, and perhaps a temperature."""

    def __post_init__(self) -> None:
        numbers = {option.name: getattr(self, option.name) for option in fields(self) if option.type is float}
        check_number("temperature", numbers.pop("temperature", 1.0), above_zero=True)
        check_weights(**numbers)
