"""Accuracy of a network, with each image counted exactly once over all processes, and its speed."""

import time
from collections.abc import Callable, Iterable, Mapping, Sized

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import distributed
from .engine.precision import Precision, wrong_dtype
from .errors import UserError

Batches = Iterable[tuple[Tensor, Tensor]]
"""Batches of (images [N, 3, H, W], target [N] int64) on the device."""


@torch.no_grad()
def evaluate(
    net: nn.Module, loader: Batches, precision: Precision, stop: Callable[[], bool] = lambda: False
) -> dict[str, float]:
    """{"top1": %, "top5": %, "loss": mean cross-entropy, "images": count} in eval mode; one host sync at the end.

    `stop` is asked after each batch: if it is true in any process, the result is empty in all. "nonfinite" counts the
    images with a logit that is NaN or infinite; they count as wrong. With fewer than five classes, top-5 counts all of
    them. Every process of the run must call it. Raises UserError if no process has an image, if the loader gives fewer
    batches than its length, if a label is none of the classes, or if the shapes of logits and labels do not fit.
    """
    training = net.training
    net.train()  # LeViT keeps attention biases computed in eval mode; those of an average have changed since
    net.eval()
    counts = torch.zeros(6, dtype=torch.float64, device=precision.device)
    batches, stopped = 0, False
    for images, target in loader:
        with precision.autocast():
            logits = _logits(net, images)
        _check_shapes(net, logits, target, getattr(loader, "classes", None))
        counts += _count(logits, target)
        batches += 1
        if stopped := stop():
            break
    net.train(training)
    if any(distributed.gather(stopped)):
        return {}
    expected = max(batches, len(loader) if isinstance(loader, Sized) else 0)
    counts = torch.cat([counts, counts.new_tensor([batches, expected])])
    sums = distributed.all_reduce_sum(counts).tolist()
    loss, top1, top5, images, labelled, finite, given, promised = sums
    _check_counts(images, labelled, given, promised)
    scores = {"top1": 100 * top1 / images, "top5": 100 * top5 / images, "loss": loss / images, "images": int(images)}
    return scores | {"nonfinite": int(images - finite)}


def _logits(net: nn.Module, images: Tensor) -> Tensor:
    try:
        return net(images)
    except RuntimeError as error:
        if problem := wrong_dtype(net, images):
            raise UserError(f"{type(net).__name__} fails in evaluation ({error}): {problem}") from error
        raise


def _count(logits_NC: Tensor, target_N: Tensor) -> Tensor:
    """[6] on the device: sum of the losses, hits of top-1 and of top-5, images, labels that are one of the classes,
    images whose logits are finite.

    Another label is replaced by class 0: on CUDA, torch's loss would end the process, and it skips -100 without a word.
    """
    classes = logits_NC.shape[1]
    is_class = (target_N >= 0) & (target_N < classes)
    target_N = target_N.masked_fill(~is_class, 0)
    is_finite = logits_NC.isfinite().all(1)
    hits = logits_NC.topk(min(5, classes), dim=1).indices == target_N[:, None]
    hits &= is_finite[:, None]  # topk takes NaN for the largest
    # one image at a time: the sum does not depend on the batches, and so not on the number of processes
    loss_sum = F.cross_entropy(logits_NC.float(), target_N, reduction="none").double().sum()
    images = loss_sum.new_full((), len(target_N))
    return torch.stack([loss_sum, hits[:, 0].sum(), hits.sum(), images, is_class.sum(), is_finite.sum()])


def _check_shapes(net: nn.Module, logits: Tensor, target: Tensor, classes: Iterable[str] | None) -> None:
    """Raise UserError unless the batch can be evaluated. Values are not read: nothing waits for the device."""
    name = type(net).__name__
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UserError(f"{name} returns {found} in evaluation, but logits [images, classes] are needed")
    if target.dim() != 1 or target.dtype != torch.int64:
        raise UserError(
            f"the evaluation loader gives labels of shape {list(target.shape)} and {target.dtype}; accuracy needs one "
            "class index per image, [images] int64: give mixed or soft labels to the training loader alone"
        )
    if len(logits) != len(target):
        raise UserError(f"the evaluation loader gives {len(target)} labels for {len(logits)} images in one batch")
    count = None if classes is None else len(list(classes))
    if count is not None and count != logits.shape[1]:
        raise UserError(
            f"{name} has {logits.shape[1]} outputs and the evaluation loader {count} classes; take a network, or "
            "weights, for the classes of this data"
        )


def _check_counts(images: float, labelled: float, given: float, promised: float) -> None:
    """Raise UserError if the sums over all processes show that the accuracy would be wrong."""
    if not images:
        raise UserError("the evaluation loader gave no images; give one with at least one batch")
    if labelled < images:
        raise UserError(
            f"{images - labelled:.0f} of the {images:.0f} evaluation labels are none of the classes (below 0, such as "
            "-100 for an unlabelled image, or too large); evaluate on labelled images alone"
        )
    if given < promised:
        raise UserError(
            f"the evaluation loader gave {given:.0f} batches, but its length is {promised:.0f}; the accuracy would be "
            "that of a part of the images: let len() be the number of batches"
        )


def evaluate_networks(
    networks: Mapping[str, nn.Module],
    loader: Batches,
    precision: Precision,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """top1, top5 (%) and val_loss of each network, for the history; "NAME_top1" for all but the student.

    `stop` is asked after each batch, see `evaluate`.
    """
    row = {}
    for name, net in networks.items():
        if not (scores := evaluate(net, loader, precision, stop)):
            return {}
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
