"""The losses as modules: what other trainers import. `loss = KDLoss()(student_logits, teacher_logits, target)`.

Each gives a scalar in fp32 (fp64 for fp64 input) from inputs of any floating dtype and any row strides, on the CPU and
on CUDA, without a host sync, and compiles without a break. The gradient goes to the student's side only.
"""

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
from .logits import BridgeLoss, DISTLoss, DKDLoss, KDLoss, MutualLoss

__all__ = [
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
]
