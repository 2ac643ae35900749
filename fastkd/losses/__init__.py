"""The losses as modules, for use in any trainer: `loss = KDLoss()(student_logits, teacher_logits, target)`.

Each returns a scalar in fp32, or in fp64 for fp64 input; with reduction="none", KDLoss returns that of each sample.
Inputs may have any floating dtype and any row strides, on the CPU or on CUDA. No loss synchronises with the host, and
each compiles without a graph break. Only the student's side gets a gradient. Wrong options and shapes raise ValueError,
wrong types TypeError.
"""

from ..kernels.logit_loss import UNLABELLED
from ..kernels.topk_loss import topk_of
from .features import (
    AttentionTransferLoss,
    ExplorationLoss,
    FactorTransferLoss,
    HintLoss,
    InheritanceExplorationLoss,
    InheritanceLoss,
    OverhaulLoss,
    RKDLoss,
    SPLoss,
)
from .logits import BridgeLoss, DISTLoss, DKDLoss, KDLoss, MutualLoss, TopKLoss

__all__ = [
    "UNLABELLED",
    "AttentionTransferLoss",
    "BridgeLoss",
    "DISTLoss",
    "DKDLoss",
    "ExplorationLoss",
    "FactorTransferLoss",
    "HintLoss",
    "InheritanceExplorationLoss",
    "InheritanceLoss",
    "KDLoss",
    "MutualLoss",
    "OverhaulLoss",
    "RKDLoss",
    "SPLoss",
    "TopKLoss",
    "topk_of",
]
