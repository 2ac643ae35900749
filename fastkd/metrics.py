"""Counters that stay on the device: adding to them needs no host sync, reading them for the report needs one."""

from collections import defaultdict

import torch
import torch.nn.functional as F
from torch import Tensor

from . import distributed


class Meter:
    """Weighted means of named scalars. A set of values is left out of the means if one of them is not finite."""

    def __init__(self) -> None:
        self.sums: dict[tuple[str, ...], Tensor] = {}  # by set of names: weighted sum of each, then the weight

    def reset(self) -> None:
        """Start again from 0, in place: a captured step goes on adding to the same tensors."""
        for sums in self.sums.values():
            sums.zero_()

    def add(self, values: dict[str, Tensor], weight: float) -> None:
        """Count these scalars, all of one step, with this weight, such as the number of images."""
        row = torch.stack([*(value.detach().double() for value in values.values())])
        row = torch.cat([row, row.new_ones(1)])
        sums = self.sums.setdefault(tuple(values), torch.zeros_like(row))
        sums += torch.where(row.isfinite().all(), row * weight, 0.0)

    def read(self, everywhere: bool = True) -> dict[str, float]:
        """The means over all processes, which must all call it, or over this one alone. One host sync."""
        if not self.sums:
            return {}
        every = torch.cat(list(self.sums.values()))
        numbers = iter((distributed.all_reduce_sum(every) if everywhere else every).tolist())
        totals: dict[str, float] = defaultdict(float)  # by name: a name may be in several sets
        weights: dict[str, float] = defaultdict(float)
        for names in self.sums:
            *of_set, weight = (next(numbers) for _ in range(len(names) + 1))
            for name, value in zip(names, of_set, strict=True):
                totals[name] += value
                weights[name] += weight
        return {name: totals[name] / weights[name] if weights[name] else float("nan") for name in totals}


def read_and_reset(counter: Tensor) -> int:
    """The value of a counter on the device, which starts again from 0. One host sync."""
    value = int(counter.item())
    counter.zero_()
    return value


def topk_correct(logits: Tensor, target: Tensor) -> Tensor:
    """[sum of cross-entropies, top-1 correct, top-5 correct, images] of a batch, [4] float64 on its device.

    logits: [N, C]; target: [N] int64. With fewer than five classes, top-5 counts all of them.
    """
    top = logits.topk(min(5, logits.shape[1]), dim=1).indices == target[:, None]
    loss = F.cross_entropy(logits.float(), target, reduction="sum")
    images = loss.new_full((), len(target))
    return torch.stack([loss, top[:, 0].sum().float(), top.sum().float(), images]).double()
