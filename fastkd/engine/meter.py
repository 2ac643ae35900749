"""The means of the loss terms over an epoch, added up on the device."""

from collections import defaultdict

import torch
from torch import Tensor

from .. import distributed
from ..kernels.step_end import KEPT, add_to_sums
from .bad_steps import BadSteps


class Meter:
    """Weighted means of named scalars. A set of values is left out of the means if one of them is not finite.

    `bad`: it is told of such a set, and `recent` holds the values of the last steps.
    """

    def __init__(self, bad: BadSteps | None = None) -> None:
        self.sums: dict[tuple[str, ...], Tensor] = {}  # by set of names: weighted sum of each, then the weight
        self.recent: dict[tuple[str, ...], Tensor] = {}  # by set of names: rows of values, then the number of the step
        self.bad = bad

    def reset(self) -> None:
        """Start again from 0, in place: a captured step goes on adding to the same tensors."""
        for sums in self.sums.values():
            sums.zero_()

    def add(self, values: dict[str, Tensor], weight: int, share: float = 1.0, is_first: bool = True) -> None:
        """Count these scalars, all of one step, with this weight, such as the number of images. One launch.

        share: the part of the step's images that they belong to; is_first: nothing was added in this step yet.
        """
        names, device = tuple(values), next(iter(values.values())).device
        self.bad = self.bad or BadSteps(0, 1, device)
        if names not in self.sums:
            self.sums[names] = torch.zeros(len(names) + 1, dtype=torch.float64, device=device)
        if names not in self.recent:
            self.recent[names] = torch.full((KEPT + 1, len(names) + 1), -1.0, dtype=torch.float64, device=device)
        scalars, state = [value.detach() for value in values.values()], self.bad.state
        add_to_sums(self.sums[names], scalars, weight, share, is_first, state, self.recent[names])

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
