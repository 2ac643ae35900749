"""Labels of a user's training loader: a label that is none of the classes ends the run with a clear error."""

import torch
from torch import Tensor

from ..errors import UserError, count_of
from ..kernels.logit_loss import UNLABELLED


class LabelCheck:
    """`check(target)` gives the labels [N] int64 with those that are none of the classes replaced by class 0.

    On CUDA they are counted, and `check_labels(epoch)` raises UserError at the end of the epoch: no step waits for the
    device, and torch's loss would end the process. On the CPU the error comes at once. Targets [N, C] pass as they are.
    `ignore_index`: the label of images without one, if the method allows it.
    """

    def __init__(self, classes: int, device: torch.device, ignore_index: int | None = None):
        self.ignore_index = ignore_index
        self.classes, self.count = classes, torch.zeros((), dtype=torch.int64, device=device)

    def __call__(self, target: Tensor) -> Tensor:
        if target.is_floating_point():
            return target
        is_strange = out_of_range(target, self.classes, self.ignore_index)
        self.count += is_strange.sum()
        if target.device.type == "cpu":
            self.check_labels()
        return target.masked_fill(is_strange, 0)

    def check_labels(self, epoch: int | None = None) -> None:
        """Raise UserError if there was such a label. Waits for the device. `epoch` counts from 1, for the message."""
        if count := int(self.count.item()):
            when = "" if epoch is None else f" of epoch {epoch}"
            raise UserError(
                f"{count_of(count, 'training label')}{when} outside of the {self.classes} classes; "
                f"{allowed_labels(self.classes)}"
            )


def out_of_range(target_N: Tensor, classes: int, ignore_index: int | None) -> Tensor:
    """bool [N]: True for a label that is neither a class nor `ignore_index`."""
    strange = (target_N < 0) | (target_N >= classes)
    return strange if ignore_index is None else strange & (target_N != ignore_index)


def allowed_labels(classes: int) -> str:
    """What a label may be, for messages."""
    return (
        f"labels go from 0 to {classes - 1}; {UNLABELLED} stands for an image without one, after "
        "method.allow_unlabelled() or with --unlabelled"
    )
