"""CE: training on the labels alone. It makes the teachers, and it is the baseline of every distillation."""

from collections.abc import Hashable

from torch import Tensor

from .base import Method
from .forwards import ForwardCache


class CE(Method):
    """Cross-entropy with the labels alone: no teacher."""

    needs_teacher = False
    takes_bce = True

    def losses(self, out: ForwardCache, target: Tensor, plan: Hashable) -> dict[str, Tensor]:
        return {"ce": self.hard_loss(out(self.student), target)}
