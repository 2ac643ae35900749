"""The first tensor of a network, or of the whole state of a training, that is not finite."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from ..errors import UserError

STATISTICS = ("running_mean", "running_var")


class Checked(NamedTuple):
    """A tensor as errors name it. `may_be_infinite`: a constant of a network, such as the mask of an attention."""

    name: str
    tensor: Tensor
    may_be_infinite: bool = False


def first_nonfinite(tensors: Iterable[Checked]) -> str:
    """The first of `tensors` that is not finite, such as "student.fc.weight holds NaN", or the empty string.

    One reduction and one wait for all tensors of a dtype on a device. Tensors that are not floating are left out.
    """
    checked, groups = list(tensors), defaultdict[tuple[torch.dtype, torch.device], list[int]](list)
    for number, (_, tensor, _) in enumerate(checked):
        if not is_lazy(tensor) and tensor.is_floating_point() and tensor.numel():
            groups[tensor.dtype, tensor.device].append(number)
    bad: dict[int, float] = {}
    for numbers in groups.values():
        values = _largest([checked[number].tensor.detach() for number in numbers]).tolist()
        for number, value in zip(numbers, values, strict=True):
            if math.isnan(value) or value == math.inf and not checked[number].may_be_infinite:
                bad[number] = value
    if not bad:
        return ""
    first = min(bad)
    return f"{checked[first].name} holds {'NaN' if math.isnan(bad[first]) else 'an infinite number'}"


def _largest(tensors: list[Tensor]) -> Tensor:
    """The largest absolute value of each tensor, or NaN if it holds one."""
    if tensors[0].device.type == "cpu":  # the norm reads 1 GB/s there, and this 7 GB/s
        return torch.stack([torch.stack(tensor.aminmax()).abs().amax() for tensor in tensors])
    return torch.stack(torch._foreach_norm(tensors, math.inf))


def tensors_of(net: nn.Module, prefix: str = "") -> Iterator[Checked]:
    """The weights and buffers of a network."""
    for name, p in net.named_parameters():
        yield Checked(prefix + name, p)
    for name, buffer in net.named_buffers():
        yield Checked(prefix + name, buffer, not name.endswith(STATISTICS))


def tensors_of_optimizer(optimizer: Optimizer, net: nn.Module) -> Iterator[Checked]:
    """The optimizer's state, such as momentum, named after the weights of `net`."""
    for name, p in net.named_parameters():
        for kind, value in optimizer.state.get(p, {}).items():
            if isinstance(value, Tensor):
                yield Checked(f"the optimizer's {kind} of {name}", value)


def check_network(title: str, net: nn.Module) -> None:
    """Raise UserError, with the name of the first bad tensor, if weights or buffers of a network are not finite."""
    if bad := first_nonfinite(tensors_of(net)):
        raise UserError(f"{title} cannot be used: {bad}; take other weights, or train it again")
