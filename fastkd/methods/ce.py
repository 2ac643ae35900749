"""CE: training on the labels alone. It makes the teachers, and it is the baseline of every distillation."""

from collections.abc import Hashable

from torch import Tensor

from .base import Method, cross_entropy
from .forwards import ForwardCache


class CE(Method):
    """Cross-entropy with the labels alone: no teacher."""

    needs_teacher = False

    def losses(self, out: ForwardCache, target: Tensor, plan: Hashable) -> dict[str, Tensor]:
        return {"ce": cross_entropy(out(self.student), target, ignore_index=self.ignore_index)}
