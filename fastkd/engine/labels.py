"""Labels of a user's training loader: a label that is none of the classes ends the run with a clear error."""

import torch
from torch import Tensor

from ..errors import UserError

UNLABELLED = -100  # the `ignore_index` of torch's losses: an image without a label


class LabelCheck:
    """`check(target)` gives the labels [N] int64 with those that are none of the classes replaced by class 0.

    On CUDA they are counted, and `finish(epoch)` raises UserError at the end of the epoch: no step waits for the
    device, and torch's loss would end the process. On the CPU the error comes at once. Targets [N, C] pass as they are.
    """

    def __init__(self, classes: int, device: torch.device):
        self.classes, self.count = classes, torch.zeros((), dtype=torch.int64, device=device)

    def __call__(self, target: Tensor) -> Tensor:
        if target.is_floating_point():
            return target
        is_strange = out_of_range(target, self.classes)
        self.count += is_strange.sum()
        if target.device.type == "cpu":
            self.finish()
        return target.masked_fill(is_strange, 0)

    def finish(self, epoch: int | None = None) -> None:
        """Raise UserError if there was such a label. Waits for the device. `epoch` counts from 1, for the message."""
        if count := int(self.count.item()):
            when = "" if epoch is None else f" of epoch {epoch}"
            raise UserError(
                f"{count} training labels{when} are none of the {self.classes} classes; labels go from 0 to "
                f"{self.classes - 1}, or are {UNLABELLED} for an image without one"
            )


def out_of_range(target_N: Tensor, classes: int) -> Tensor:
    """bool [N]: True for a label that is neither a class nor UNLABELLED."""
    return ((target_N < 0) | (target_N >= classes)) & (target_N != UNLABELLED)
