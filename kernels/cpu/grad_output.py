"""What comes from above, on the CPU, where asking for it costs nothing."""

import itertools
from collections.abc import Sequence

from torch import Tensor


def scaled(
    grads: Tensor, loss_gradient: Tensor | None, terms_gradient: Tensor | None = None, counts: Sequence[object] = ()
) -> bool:
    """Whether grads, those of upstream gradients of 1, could be made the wanted ones by one factor, and now are.

    counts: which of the terms have a gradient at all. Elsewhere than on the CPU: no.
    """
    first, *both = (gradient for gradient in (loss_gradient, terms_gradient) if gradient is not None)
    if first.device.type != "cpu":
        return False
    given = (first + both[0] if both else first).flatten().tolist()
    return multiplied(grads, set(given if terms_gradient is None else itertools.compress(given, counts)))


def multiplied(grads: Tensor, factors: set[float]) -> bool:
    """Whether one factor, or none, makes of grads what all of these ask for; it then has done so."""
    if factors <= {1.0}:
        return True
    if len(factors) > 1 or grads.dtype.itemsize < 4:  # 16 bits may have lost what a large factor would have kept
        return False
    grads.mul_(factors.pop())
    return True
