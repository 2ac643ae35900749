"""One pass over the validation images: what the student and its teacher predict, and where they differ most.

Two networks with probabilities p and q differ on an image by their total variation, sum_c |p_c - q_c| / 2: 0 if they
agree in all classes, 1 if they share none. Without a second network, an image counts by 1 - p of its true class.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import distributed
from ..engine.precision import Precision
from ..evaluate import Batches

IMAGES = 12  # that are shown
SIDE = 128  # pixels; larger images are shown reduced
TOP = 3  # classes of a network that are shown


class Shown(NamedTuple):
    """Images to show, the one with the largest difference first. All on one device."""

    difference: Tensor  # [K] in [0, 1]
    target: Tensor  # [K] int64
    pixels: Tensor  # [K, 3, H, W] fp32, normalised
    probabilities: Tensor  # [K, M, T] of the T most likely classes of each of M networks
    classes: Tensor  # [K, M, T] int64


class Comparison(NamedTuple):
    """What the pass found, on the CPU. `names`: of the networks, the student first."""

    names: list[str]
    target: Tensor  # [N] int64
    predictions: Tensor  # [M, N] int64
    shown: Shown

    def top1(self, network: int) -> float:
        """Accuracy in %."""
        return 100 * (self.predictions[network] == self.target).double().mean().item()

    @property
    def agreement(self) -> float:
        """The images in % for which the first two networks predict the same class."""
        return 100 * (self.predictions[0] == self.predictions[1]).double().mean().item()


def compare(
    nets: Mapping[str, nn.Module], loader: Batches, precision: Precision, stop: Callable[[], bool] = lambda: False
) -> Comparison | str:
    """Evaluate `nets`, the student first and at most one other; or the reason why that was not possible.

    Every process must call it. The host waits for the device once, at the end. `stop` is asked after each batch.
    """
    try:
        mine: Comparison | str | None = _pass(nets, loader, precision, stop)
    except Exception as error:  # the others wait for this process
        mine = f"{type(error).__name__}: {error}".splitlines()[0]
    parts = distributed.gather(mine)
    if problem := next((part for part in parts if isinstance(part, str)), ""):
        return problem
    found = [part for part in parts if isinstance(part, Comparison)]
    if len({part.shown.pixels.shape[1:] for part in found}) > 1:
        return "the processes have images of different sizes"
    return _joined(found) if found else "there are no validation images"


@torch.no_grad()
def _pass(
    nets: Mapping[str, nn.Module], loader: Batches, precision: Precision, stop: Callable[[], bool]
) -> Comparison | str | None:
    """What `compare` finds on the images of this process; None if it has none."""
    shown: Shown | None = None
    targets, predictions = [], []
    with ExitStack() as modes:
        for net in nets.values():
            modes.enter_context(_evaluating(net))
        for images, target in loader:
            with precision.autocast():
                logits = [net(images) for net in nets.values()]
            p_MNC = torch.stack([each.float() for each in logits]).softmax(2)
            targets.append(target)
            predictions.append(p_MNC.argmax(2))
            new = _candidates(images, target, p_MNC)
            shown = new if shown is None else _largest(_cat(shown, new))
            if stop():
                return "a signal ended the pass over the validation images"
    if shown is None:
        return None
    on_cpu = Shown(*(each.cpu() for each in shown))
    return Comparison([*nets], torch.cat(targets).cpu(), torch.cat(predictions, 1).cpu(), on_cpu)


@contextmanager
def _evaluating(net: nn.Module) -> Iterator[None]:
    """Inside, the network is in eval mode."""
    training = net.training
    net.train()  # see `evaluate`
    net.eval()
    try:
        yield
    finally:
        net.train(training)


def _candidates(images: Tensor, target_N: Tensor, p_MNC: Tensor) -> Shown:
    """The images of a batch that may be shown."""
    if len(p_MNC) > 1:
        difference = (p_MNC[0] - p_MNC[1]).abs().sum(1) / 2
    else:
        difference = 1 - p_MNC[0].gather(1, target_N[:, None])[:, 0]
    best = difference.nan_to_num(0).topk(min(IMAGES, len(target_N)))
    top = p_MNC[:, best.indices].topk(min(TOP, p_MNC.shape[2]), dim=2)
    pixels = _reduced(images[best.indices].float())
    return Shown(best.values, target_N[best.indices], pixels, *(each.transpose(0, 1) for each in top))


def _reduced(images: Tensor) -> Tensor:
    """Images [K, 3, H, W] with sides of SIDE pixels at most."""
    height, width = images.shape[2:]
    if max(height, width) <= SIDE:
        return images
    size = [max(1, round(side * SIDE / max(height, width))) for side in (height, width)]
    return F.interpolate(images, size, mode="bilinear", antialias=True)


def _cat(one: Shown, two: Shown) -> Shown:
    return Shown(*(torch.cat(pair) for pair in zip(one, two, strict=True)))


def _largest(shown: Shown) -> Shown:
    order = shown.difference.topk(min(IMAGES, len(shown.difference))).indices
    return Shown(*(each[order] for each in shown))


def _joined(parts: list[Comparison]) -> Comparison:
    """The parts of all processes as one."""
    shown = parts[0].shown
    for part in parts[1:]:
        shown = _cat(shown, part.shown)
    target = torch.cat([part.target for part in parts])
    return Comparison(parts[0].names, target, torch.cat([part.predictions for part in parts], 1), _largest(shown))
