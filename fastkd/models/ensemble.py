"""Several frozen teachers as one network: the weighted mean of their predictions.

With logits z_k [N, C], weights w_k (sum 1) and a temperature T the output is

    logits         sum_k w_k z_k
    probabilities  T * log(sum_k w_k softmax(z_k / T))

The second has softmax(output / T) = sum_k w_k softmax(z_k / T). A method that softens the output by the same T learns
from the mean of the teachers' softened probabilities. Hinton et al. 2015 (arXiv:1503.02531) name both means: the
arithmetic mean of the distributions, and their geometric mean, which is the mean of the logits.
"""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, fx, nn

from ..errors import UserError, check_number

Mean = Literal["probabilities", "logits"]


class Ensemble(nn.Module):
    """One network that stands for several: images [N, 3, H, W] -> logits [N, C].

    The logits are fp32, or float64 if a network gives float64. `weights`: one number above 0 per network, scaled to a
    sum of 1; equal by default. `temperature`: the T of the probabilities' mean; give the one of the method. The logits'
    mean is the same for every T. Raises UserError for a wrong number or value of the weights, and at the first images
    if the networks have different numbers of classes.
    """

    def __init__(
        self,
        nets: Sequence[nn.Module],
        weights: Sequence[float] | None = None,
        mean: Mean = "probabilities",
        temperature: float = 1.0,
    ):
        super().__init__()
        if not nets:
            raise UserError("an ensemble needs at least one network")
        if mean not in get_args(Mean):
            raise UserError(f"the mean of several teachers is one of {', '.join(get_args(Mean))}, got {mean!r}")
        check_number("temperature", temperature, above_zero=True)
        self.nets = nn.ModuleList(nets)
        self.weights = _normalised(weights, len(nets))
        self.mean, self.temperature = mean, float(temperature)

    def forward(self, images: Tensor) -> Tensor:
        logits = [net(images) for net in self.nets]
        if self.mean == "logits":
            return mean_of_logits(logits, self.weights)
        return mean_of_probabilities(logits, self.weights, self.temperature)


@fx.wrap  # torch.fx keeps the call as it is: it cannot follow the check of the shapes
def mean_of_logits(logits: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_k w_k z_k of logits z_k [N, C]."""
    return sum(weight * z for weight, z in zip(weights, _alike(logits), strict=True))  # type: ignore[return-value]


@fx.wrap
def mean_of_probabilities(logits: Sequence[Tensor], weights: Sequence[float], temperature: float) -> Tensor:
    """T * log(sum_k w_k softmax(z_k / T)) of logits z_k [N, C]; a class that no network allows (-inf) stays -inf."""
    terms = [
        math.log(weight) + (z / temperature).log_softmax(1) for weight, z in zip(weights, _alike(logits), strict=True)
    ]
    return temperature * torch.stack(terms).logsumexp(0)


def _alike(logits: Sequence[Tensor]) -> list[Tensor]:
    """The logits in fp32 or float64. Raises UserError if their shapes differ, which the host knows without a sync."""
    shapes = [tuple(z.shape) for z in logits]
    if len(set(shapes)) > 1:
        classes = ", ".join(str(shape[-1]) for shape in shapes)
        raise UserError(f"the teachers have {classes} classes: all teachers need the same classes")
    return [z if z.dtype == torch.float64 else z.float() for z in logits]


def _normalised(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    """`count` weights with a sum of 1."""
    weights = [1.0] * count if weights is None else list(weights)
    if len(weights) != count:
        raise UserError(f"{count} teachers have {len(weights)} weights: give one weight per teacher")
    normalised = tuple(weight / math.fsum(weights) for weight in weights if 0 < weight < math.inf)
    if len(normalised) < count or not all(normalised):  # a weight that is tiny beside another may become 0
        shown = " ".join(f"{weight:g}" for weight in weights)
        raise UserError(f"the teachers' weights must be numbers above 0, got {shown}; leave out a teacher instead")
    return normalised
