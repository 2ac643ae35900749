"""Accuracy of a network, each image counted exactly once over all processes, and its speed."""

import time

import torch
from torch import nn

from . import distributed
from .engine.precision import Precision
from .metrics import hits


@torch.no_grad()
def evaluate(net: nn.Module, loader, precision: Precision) -> dict[str, float]:
    """{"top1": %, "top5": %, "loss": mean cross-entropy, "images": count}; one host sync at the end."""
    training = net.training
    net.eval()
    counts = torch.zeros(4, dtype=torch.float64, device=precision.device)
    for images, target in loader:
        with precision.autocast():
            logits = net(images)
        counts += hits(logits, target)
    net.train(training)
    loss, top1, top5, images = distributed.all_reduce_sum(counts).tolist()
    if not images:
        raise ValueError("the evaluation loader gave no images")
    return {"top1": 100 * top1 / images, "top5": 100 * top5 / images, "loss": loss / images, "images": int(images)}


@torch.no_grad()
def speed(net: nn.Module, loader, precision: Precision, seconds: float = 1.0) -> float:
    """Forward passes in images/s on this process: the loader's first batch again and again, best of the repeats.

    NaN where this process has no images to evaluate.
    """
    images, _ = next(iter(loader), (None, None))
    if images is None:
        return float("nan")
    training = net.training
    net.eval()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end or best == float("inf"):
        _wait(precision.device)
        start = time.perf_counter()
        with precision.autocast():
            net(images)
        _wait(precision.device)
        best = min(best, time.perf_counter() - start)
    net.train(training)
    return len(images) / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
