"""SOKD: a trainable bridge between a frozen teacher and the student (arXiv:2111.11747).

The bridge A has the architecture of the teacher's top (last stage, norm, pooling, classifier). Its input is the output
of the teacher's penultimate stage, detached. With KD(a <- b) = T^2 KL(sg p_b || p_a):

    L_S = ce_s CE(z_S, y) + kd_sa KD(S <- A)
    L_A = ce_a CE(z_A, y) + kd_at KD(A <- T) + kd_as KD(A <- S)

There is one backward pass and one optimizer, in which the bridge has its own learning rate. The student learns from
the bridge and the labels only; the teacher is frozen. Its bottom and the bridge form an improved teacher, saved too.

From the authors' code: T = 4, weights 1, bridge_lr 0.1, the random initialisation of the bridge.
Departures: the teacher's BatchNorm stays in eval mode. `--teacher-bn batch` normalises with the batch as the code does,
but does not update the running statistics. Ours: the feature losses, which the abstract claims and the code lacks.
"""

import copy
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from ..errors import UserError, check_number
from ..losses import AttentionTransferLoss, BridgeLoss, FactorTransferLoss, HintLoss
from ..models import stage_shapes, tapped
from ..models.sizes import image_size_of
from .base import Method
from .forwards import ForwardCache
from .parts.autoencoder import Coder
from .parts.reinit import reinit

FEATURE_LOSSES = {"at": AttentionTransferLoss, "ft": FactorTransferLoss, "hint": HintLoss}


@dataclass(frozen=True)
class SOKDOptions:
    """Semi-online distillation."""

    temperature: float = 4.0
    """Softens all logits before they are compared; above 0."""
    ce_s: float = 1.0
    """Weight of the student's cross-entropy with the labels."""
    kd_sa: float = 1.0
    """Weight of the KD term by which the student learns from the bridge."""
    ce_a: float = 1.0
    """Weight of the bridge's cross-entropy with the labels."""
    kd_at: float = 1.0
    """Weight of the KD term by which the bridge learns from the teacher."""
    kd_as: float = 1.0
    """Weight of the KD term by which the bridge learns from the student."""
    bridge_lr: float = 0.1
    """Initial learning rate of the bridge; it follows the schedule of --lr."""
    bridge_init: Literal["random", "teacher"] = "random"
    """Initial weights of the bridge: random, or those of the teacher's top."""
    teacher_bn: Literal["eval", "batch"] = "eval"
    """Statistics of the teacher's BatchNorm: the running ones (eval), or those of the batch."""
    feature: Literal["none", "at", "ft", "hint"] = "none"
    """Loss between last-stage maps, student with bridge and bridge with teacher: AT, FT or FitNet's."""
    feature_weight: float = 1.0
    """Factor on that loss, in addition to its usual weight (at 1000, ft 500, hint 100)."""
    export_teacher: bool = True
    """Also evaluate and save the improved teacher."""

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, above_zero=True)
        for name in ("ce_s", "kd_sa", "ce_a", "kd_at", "kd_as", "bridge_lr", "feature_weight"):
            check_number(name, getattr(self, name))
        if not (self.ce_s or self.kd_sa or (self.feature != "none" and self.feature_weight)):
            raise UserError("--ce-s and --kd-sa are both 0: the student learns nothing; give one of them above 0")

    def loss(self) -> BridgeLoss:
        return BridgeLoss(self.temperature, self.ce_s, self.kd_sa, self.ce_a, self.kd_at, self.kd_as)


class SOKD(Method):
    """A bridge learns from the frozen teacher and the student, the student from the bridge (2021)."""

    Options = SOKDOptions
    options: SOKDOptions
    paper = "arXiv:2111.11747"
    ce_option = "ce_s"
    needs_stages = "teacher staged; for feature losses the student too, with equal last H x W"

    improved: nn.Module  # the teacher with the bridge as its top; not registered: it shares modules with both

    def build(self) -> None:
        self.loss = self.options.loss()
        self.teacher.batch_statistics |= self.options.teacher_bn == "batch"
        self.request_features(self.teacher)
        net, view = self.teacher.net, tapped(self.teacher.net)
        self.layout = view.layout
        if len(view.stages) < 2:
            raise UserError(f"SOKD needs a teacher of two stages or more, {type(net).__name__} has {len(view.stages)}")
        bottom = [module for shared in (view.stem, *list(view.stages)[:-1]) for module in shared.modules()]
        self.__dict__["improved"] = copy.deepcopy(net, {id(module): module for module in bottom})
        view = tapped(self.improved)
        self.bridge = nn.ModuleDict({"stage": view.stages[-1], "head": view.head}).requires_grad_(True)
        if self.options.bridge_init == "random":
            self.bridge.load_state_dict(reinit(self.bridge).state_dict())
            for layer in self.bridge.modules():
                if isinstance(layer, nn.Linear) and layer.bias is not None:
                    nn.init.zeros_(layer.bias)  # as in the authors' code
        if self.options.feature != "none":
            self._add_feature_loss()

    def _add_feature_loss(self) -> None:
        nets = self.student, self.teacher.net
        pixels = image_size_of(*nets)
        (mine, *size), (theirs, *wanted) = (stage_shapes(net, pixels)[-1] for net in nets)
        if size != wanted:
            raise UserError(
                f"--feature {self.options.feature} compares last-stage maps, {size} in the student and {wanted} in "
                f"the teacher for images of {pixels} pixels: choose networks of equal resolution "
                "there, or --feature none"
            )
        self.request_features(self.student)
        self.feature_loss = FEATURE_LOSSES[self.options.feature]()
        regressor = nn.Sequential(nn.Conv2d(mine, theirs, 1, bias=False), nn.BatchNorm2d(theirs))
        translators: dict[str, nn.Module] = {"at": nn.Identity(), "ft": Coder(mine, theirs), "hint": regressor}
        self.translator = translators[self.options.feature]

    def losses(self, out: ForwardCache, target: Tensor, plan: Hashable) -> dict[str, Tensor]:
        top = self.bridge["stage"](out.outputs(self.teacher)[-2].detach())
        terms = self.loss.terms(out(self.student), self.bridge["head"](top), out(self.teacher), target)
        terms = {"ce": terms.pop("ce_s")} | terms
        if self.options.feature != "none":
            mine, maps = self.translator(out.features(self.student)[-1]), self.layout.map(top)
            terms["feature_s"] = self.options.feature_weight * self.feature_loss(mine, maps.detach())
            terms["feature_a"] = self.options.feature_weight * self.feature_loss(maps, out.features(self.teacher)[-1])
        return terms

    def param_groups(self, lr: float) -> list[dict[str, Any]]:
        bridge = set(self.bridge.parameters())
        rest = [p for p in self.parameters() if p.requires_grad and p not in bridge]
        return [{"params": rest, "lr": lr}, {"params": [*self.bridge.parameters()], "lr": self.options.bridge_lr}]

    def networks(self) -> dict[str, nn.Module]:
        return super().networks() | ({"improved_teacher": self.improved} if self.options.export_teacher else {})
