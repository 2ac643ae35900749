"""CE: plain training on the labels. How teachers are made, and the baseline that every distillation is held against."""

from .base import Method, cross_entropy


class CE(Method):
    """Cross-entropy with the labels alone: no teacher."""

    needs_teacher = False

    def losses(self, out, target, plan):
        return {"ce": cross_entropy(out(self.student), target)}
