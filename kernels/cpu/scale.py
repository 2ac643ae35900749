"""The gradient that the forward pass left, times what comes from above, on the CPU, where reading values is free."""

import itertools
from collections.abc import Sequence

from torch import Tensor


def scale_in_place(
    grads: Tensor, grad_loss: Tensor | None, grad_terms: Tensor | None = None, *, counts: Sequence[object]
) -> bool:
    """Scale the saved gradient in place if one factor is enough. Returns True if done; always False off the CPU.

    grad_terms: the gradient of each term. counts: a false value marks a term that has no gradient.
    """
    first, *both = (gradient for gradient in (grad_loss, grad_terms) if gradient is not None)
    if first.device.type != "cpu":
        return False
    given = (first + both[0] if both else first).flatten().tolist()
    factors = set(given if grad_terms is None else itertools.compress(given, counts))
    if factors <= {1.0}:
        return True
    if len(factors) > 1 or grads.dtype.itemsize < 4:  # 16 bits may have lost what a large factor would have kept
        return False
    grads.mul_(factors.pop())
    return True
