"""Checks of what the operations are given: what costs no question to the GPU."""

import os

import torch
from torch import Tensor


def check_logits(heads: list[Tensor], target: Tensor) -> None:
    """Raises ValueError unless heads are [N, C] alike and the target fits them."""
    if not heads:
        raise ValueError("no logits given")
    shape, device = heads[0].shape, heads[0].device
    for head in heads:
        if head.dim() != 2 or head.shape != shape:
            raise ValueError(f"logits must all be [N, C] of one size, got {[list(h.shape) for h in heads]}")
        if not head.is_floating_point():
            raise ValueError(f"logits must be floating point, got {head.dtype} {list(head.shape)}")
    if shape[1] < 2:
        raise ValueError(f"logits of {shape[1]} class(es), {list(shape)}: a softmax needs 2 or more")
    if any(tensor.device != device for tensor in (*heads, target)):
        raise ValueError(f"logits and target must be on one device, got {[str(t.device) for t in (*heads, target)]}")
    soft = target.is_floating_point()
    if target.shape != (shape if soft else shape[:1]) or not (soft or target.dtype == torch.int64):
        raise ValueError(
            f"target must be int64 [N] or floating [N, C] for logits {list(shape)}, "
            f"got {target.dtype} {list(target.shape)}"
        )
    if target.requires_grad:
        raise ValueError(f"the target {list(target.shape)} requires a gradient, which no loss here gives it; detach it")


def check_settings(temperature: float, label_smoothing: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be from 0 to 1, got {label_smoothing}")


def check_labels(target: Tensor, classes: int, ignore_index: int | None) -> None:
    """ValueError if a label is no class; on the CPU, elsewhere if FASTKD_DEBUG=1: there such a label makes NaN."""
    if target.is_floating_point() or not (target.device.type == "cpu" or os.environ.get("FASTKD_DEBUG") == "1"):
        return
    if not target.numel():
        return
    lowest, highest = target.aminmax()
    if lowest >= 0 and highest < classes:
        return
    wrong = (target < 0) | (target >= classes)
    if ignore_index is not None:
        wrong &= target != ignore_index
    if wrong.any():
        rows = wrong.nonzero()[:, 0].tolist()
        raise ValueError(
            f"{len(rows)} label(s) are not from 0 to {classes - 1}, first in row {rows[0]}: {target[rows[0]].item()}; "
            "pass ignore_index for rows without a label"
        )
