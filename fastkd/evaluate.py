"""Accuracy of a network, with each image counted exactly once over all processes, and its speed."""

import time
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import distributed
from .engine.precision import Precision
from .errors import UserError

Batches = Iterable[tuple[Tensor, Tensor]]
"""Batches of (images [N, 3, H, W], target [N] int64) on the device."""


@torch.no_grad()
def evaluate(net: nn.Module, loader: Batches, precision: Precision) -> dict[str, float]:
    """{"top1": %, "top5": %, "loss": mean cross-entropy, "images": count} in eval mode; one host sync at the end.

    With fewer than five classes, top-5 counts all of them. Every process of the run must call it.
    Raises UserError if no process has an image.
    """
    training = net.training
    net.eval()
    counts = torch.zeros(4, dtype=torch.float64, device=precision.device)
    for images, target in loader:
        with precision.autocast():
            logits = net(images)
        hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == target[:, None]
        loss_sum = F.cross_entropy(logits.float(), target, reduction="sum")
        counts += torch.stack([loss_sum, hits[:, 0].sum(), hits.sum(), loss_sum.new_full((), len(target))])
    net.train(training)
    loss, top1, top5, images = distributed.all_reduce_sum(counts).tolist()
    if not images:
        raise UserError("the evaluation loader gave no images; give one with at least one batch")
    return {"top1": 100 * top1 / images, "top5": 100 * top5 / images, "loss": loss / images, "images": int(images)}


def evaluate_networks(networks: Mapping[str, nn.Module], loader: Batches, precision: Precision) -> dict[str, float]:
    """top1, top5 (%) and val_loss of each network, for the history; "NAME_top1" for all but the student."""
    row = {}
    for name, net in networks.items():
        scores = evaluate(net, loader, precision)
        prefix = "" if name == "student" else f"{name}_"
        row[f"{prefix}top1"], row[f"{prefix}top5"] = scores["top1"], scores["top5"]
        row[f"{prefix}val_loss"] = scores["loss"]
    return row


@torch.no_grad()
def speed(net: nn.Module, loader: Batches, precision: Precision, seconds: float = 1.0) -> float:
    """Images/s of forward passes on this process: the best repeat of the loader's first batch within `seconds`.

    NaN if this process has no images to evaluate.
    """
    images = next((images for images, _ in loader), None)
    if images is None:
        return float("nan")
    training = net.training
    net.eval()
    wait = torch.get_device_module(precision.device).synchronize
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end or best == float("inf"):
        wait(precision.device)
        start = time.perf_counter()
        with precision.autocast():
            net(images)
        wait(precision.device)
        best = min(best, time.perf_counter() - start)
    net.train(training)
    return len(images) / best
