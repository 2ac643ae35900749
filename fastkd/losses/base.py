"""What every loss has in common."""

import inspect

from torch import nn


class Loss(nn.Module):
    """A loss shows its options when printed: KDLoss(temperature=4.0, ce_weight=0.1, ...).

    Those are the arguments of the constructor that are attributes of the same name.
    """

    def extra_repr(self) -> str:
        names = inspect.signature(type(self)).parameters
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names if hasattr(self, name))
