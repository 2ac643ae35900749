"""Counters that stay on the device: adding to them asks the GPU nothing, reading them is one sync for the report."""

from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor

from . import distributed


class Meter:
    """Weighted means of named scalars. A set of values with one that is not finite is left out of the means."""

    def __init__(self):
        self.sums: dict[tuple[str, ...], Tensor] = {}  # by set of names: weighted sum of each, then the weight

    def reset(self) -> None:
        """In place: a captured step goes on adding to the same tensors."""
        for sums in self.sums.values():
            sums.zero_()

    def add(self, values: dict[str, Tensor], weight: float) -> None:
        row = torch.stack([*(value.detach().double() for value in values.values())])
        row = torch.cat([row, row.new_ones(1)])
        sums = self.sums.setdefault(tuple(values), torch.zeros_like(row))
        sums += torch.where(row.isfinite().all(), row * weight, 0.0)

    def read(self, everywhere: bool = True) -> dict[str, float]:
        """The means, over all processes (which must all call it) or over this one's own; one host sync."""
        if not self.sums:
            return {}
        every = torch.cat(list(self.sums.values()))
        numbers = iter((distributed.all_reduce_sum(every) if everywhere else every).tolist())
        sums, weights = Counter(), Counter()  # by name: a name may be in several sets
        for names in self.sums:
            *of_set, weight = (next(numbers) for _ in range(len(names) + 1))
            sums.update(dict(zip(names, of_set, strict=True)))
            weights.update(dict.fromkeys(names, weight))
        return {name: sums[name] / weights[name] if weights[name] else float("nan") for name in sums}


def hits(logits: Tensor, target: Tensor) -> Tensor:
    """[cross-entropy sum, top-1 hits, top-5 hits, images] of a batch, float64 on its device."""
    top = logits.topk(min(5, logits.shape[1]), dim=1).indices == target[:, None]
    loss = F.cross_entropy(logits.float(), target, reduction="sum")
    images = loss.new_full((), len(target))
    return torch.stack([loss, top[:, 0].sum().float(), top.sum().float(), images]).double()
