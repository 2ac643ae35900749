"""What happens to a batch between the loader and the networks: mixup, CutMix, label smoothing.

mixup (arXiv:1710.09412) adds each image to another of the batch, CutMix (arXiv:1905.04899) pastes a box of it; the
labels are mixed in the same proportion. Every network sees the same mixed image. The random numbers are drawn on the
host and depend on (seed, rank, step) alone: nothing is synchronised, and nothing needs to be in the checkpoint.
Ours instead of torchvision's, which leaves channels-last on CUDA and draws from the global generator.
"""

import random

import torch
from torch import Tensor


class Mixup:
    """(images [N, 3, H, W], target [N] int64, step) -> (images, target [N] int64 or [N, C] float32).

    `mixup` and `cutmix` are the alphas of Beta(alpha, alpha); 0 is off; with both, each batch draws one of them.
    `smoothing` s: the target becomes (1 - s) * target + s / C.
    """

    def __init__(self, mixup: float, cutmix: float, smoothing: float, num_classes: int, seed: int = 0, rank: int = 0):
        self.alphas = [(name, alpha) for name, alpha in (("mixup", mixup), ("cutmix", cutmix)) if alpha > 0]
        self.smoothing, self.num_classes, self.key = smoothing, num_classes, f"{seed}/{rank}"

    def __call__(self, images: Tensor, target: Tensor, step: int) -> tuple[Tensor, Tensor]:
        if not self.alphas and self.smoothing == 0:
            return images, target
        off = self.smoothing / self.num_classes
        soft = torch.full((len(target), self.num_classes), off, device=target.device)
        soft.scatter_(1, target[:, None], 1 - self.smoothing + off)
        if not self.alphas:
            return images, soft
        rng = random.Random(f"{self.key}/{step}")
        name, alpha = rng.choice(self.alphas)
        share = rng.betavariate(alpha, alpha)  # of the image itself; the rest comes from the images in reverse order
        if name == "mixup":
            images = images.lerp(images.flip(0), 1 - share)
        else:
            images, share = _cutmix(images, share, rng)
        return images, soft.lerp(soft.flip(0), 1 - share)


def _cutmix(images: Tensor, share: float, rng: random.Random) -> tuple[Tensor, float]:
    """Images with a box from the images in reverse order, and the fraction of their own area that is left.

    The box has an area of (1 - share) around a uniform centre, and is cut off at the border.
    """
    height, width = images.shape[-2:]
    y, x, half = rng.randrange(height), rng.randrange(width), (1 - share) ** 0.5 / 2
    top, bottom = max(0, round(y - half * height)), min(height, round(y + half * height))
    left, right = max(0, round(x - half * width)), min(width, round(x + half * width))
    mixed = images.clone()
    mixed[..., top:bottom, left:right] = images.flip(0)[..., top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)
