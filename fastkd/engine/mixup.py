"""What happens to a batch between the loader and the networks: mixup, CutMix, label smoothing.

mixup adds to each image its partner in the batch, CutMix pastes a box of it; the labels are mixed in the same
proportion. Every network sees the same mixed image. What is drawn (data/augment.py) depends on the seed, the view and
the image alone: nothing is synchronised, and nothing needs to be in the checkpoint. Ours instead of torchvision's,
which draws once for a whole batch, from the global generator, and leaves channels-last on CUDA.
"""

import torch
from torch import Tensor

from ..data.augment import mixtures


class Mixup:
    """(images [N, 3, H, W], target [N] int64, view, samples [N] int64) -> (images, target [N] or [N, C] float32).

    `mixup` and `cutmix` are the alphas of Beta(alpha, alpha); 0 is off; with both, each image draws one of them.
    `smoothing` s: the target becomes (1 - s) * target + s / C. Images 2k and 2k + 1 of the batch are partners. The last
    image of an odd batch is its own: it stays as it is.
    """

    def __init__(self, mixup: float, cutmix: float, smoothing: float, num_classes: int, seed: int = 0):
        self.alphas, self.smoothing, self.num_classes, self.seed = (mixup, cutmix), smoothing, num_classes, seed

    @property
    def mixes(self) -> bool:
        return any(self.alphas)

    def __call__(self, images: Tensor, target: Tensor, view: int, samples: Tensor) -> tuple[Tensor, Tensor]:
        if not self.mixes and self.smoothing == 0:
            return images, target
        off = self.smoothing / self.num_classes
        soft = torch.full((len(target), self.num_classes), off, device=target.device)
        soft.scatter_(1, target[:, None], 1 - self.smoothing + off)
        if not self.mixes:
            return images, soft
        height, width = images.shape[2:]
        drawn = mixtures(self.seed, view, samples, (height, width), *self.alphas)
        drawn = drawn.pin_memory().to(images.device, non_blocking=True) if images.is_cuda else drawn
        share = drawn[:, 1:2].to(soft.dtype)
        return images.lerp(partners(images), 1 - _weights(drawn, images)), soft.lerp(partners(soft), 1 - share)


def partners(batch: Tensor) -> Tensor:
    """The batch with images 2k and 2k + 1 exchanged, in the same memory format."""
    even = len(batch) // 2 * 2
    swapped = batch[:even].unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    return torch.cat([swapped, batch[even:]]) if even < len(batch) else swapped


def _weights(drawn: Tensor, images: Tensor) -> Tensor:
    """What is left of each pixel, [N, 1, H, W]: 0 in the box, the weight outside."""
    weight, _, top, left, bottom, right = drawn[:, :, None].unbind(1)  # [N, 1] each
    y, x = (torch.arange(size, device=images.device) for size in images.shape[2:])
    inside = ((y >= top) & (y < bottom))[:, :, None] & ((x >= left) & (x < right))[:, None]
    return torch.where(inside, 0.0, weight[:, :, None])[:, None].to(images.dtype)
