"""CE: plain training on the labels. How teachers are made, and the baseline that every distillation is held against."""

import torch
import torch.nn.functional as F

from .base import Method


class CE(Method):
    """Cross-entropy with the labels alone: no teacher."""

    needs_teacher = False

    def losses(self, out, target, plan):
        logits = out(self.student)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return {"ce": F.cross_entropy(logits, target)}
