"""How processes average their gradients: by DDP, or in flat blocks between CUDA graphs.

The average is that of all images. In the last batch of an epoch one process may have fewer than another, so each loss
is divided by the usual number of images, and the averaged gradients by the mean fraction of it that the processes had.
"""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import distributed

ALIGNMENT = 64  # elements: each part of a block starts at a multiple of 256 bytes, as a separate tensor would


class DdpExchange:
    """DDP has averaged the gradients over the processes during the backward pass. A step calls these in order."""

    def __init__(self, device: torch.device):
        self.full_batch, self.batch_fraction = 0, torch.ones((), device=device)

    def agree(self, images: int) -> None:
        """In the first step: a full batch has the largest number of images of a process. Waits for the others."""
        self.full_batch = self.full_batch or max(distributed.gather(images))

    def start(self, images: int) -> int:
        """Images in this process's batch -> those by which the sum of their losses is divided."""
        self.batch_fraction.fill_(images / self.full_batch / distributed.world_size())
        return self.full_batch

    def flatten(self, parameters: Sequence[Tensor]) -> None:
        """After the backward passes: get the gradients ready to be sent."""

    def all_reduce(self) -> None:
        """The communication alone: it is not part of a graph."""
        distributed.all_reduce_(self.batch_fraction)

    def average(self, parameters: Sequence[Tensor]) -> None:
        """Before the update: make the gradients the means over all images."""
        torch._foreach_div_([grad for p in parameters if (grad := p.grad) is not None], self.batch_fraction)


class FlatGradients(DdpExchange):
    """All gradients in one block per dtype, whose last element is the fraction of a full batch: one all-reduce of each.

    Weights that a step leaves out keep no gradient. Every process must leave out the same ones.
    """

    def __init__(self, parameters: Sequence[Tensor], device: torch.device):
        super().__init__(device)
        groups: dict[torch.dtype, list[Tensor]] = defaultdict(list)
        for p in parameters:
            groups[p.dtype].append(p)
        self.views: dict[Tensor, Tensor] = {}
        self.blocks = []
        for dtype, group in groups.items():
            sizes = [-(-p.numel() // ALIGNMENT) * ALIGNMENT for p in group]
            block = torch.zeros(sum(sizes) + 1, dtype=dtype, device=device)
            self.blocks.append(block)
            for p, part in zip(group, block.split([*sizes, 1])[:-1], strict=True):  # in the order of p's memory
                self.views[p] = part.as_strided(p.shape, p.stride())

    def flatten(self, parameters: Sequence[Tensor]) -> None:
        used = [p for p in parameters if p.grad is not None]
        torch._foreach_copy_([self.views[p] for p in used], [p.grad for p in used if p.grad is not None])
        for p in used:
            p.grad = self.views[p]
        for block in self.blocks:
            block[:-1].mul_(1 / distributed.world_size())
            block[-1].copy_(self.batch_fraction)

    def all_reduce(self) -> None:
        for block in self.blocks:
            distributed.all_reduce_(block)

    def average(self, parameters: Sequence[Tensor]) -> None:
        for block in self.blocks:
            block[:-1].div_(block[-1])
