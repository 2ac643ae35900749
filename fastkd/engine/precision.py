"""Number formats of a step: autocast for the forward passes, a gradient scaler where fp16 needs one."""

import torch
from torch import nn

from ..methods.base import Frozen, Method

AMP_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Precision:
    """`amp_dtype` "auto" is bfloat16 on CUDA and float32 elsewhere. Only float16 needs the gradient scaler."""

    def __init__(self, amp_dtype: str, device: torch.device):
        if amp_dtype == "auto":
            amp_dtype = "bfloat16" if device.type == "cuda" else "float32"
        self.dtype, self.device = AMP_DTYPES[amp_dtype], device
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


def cast_frozen(method: Method, precision: Precision) -> None:
    """Teachers' convolutions and matrices in the format to which autocast would cast them in every step.

    Their results are the same to the bit. What is evaluated and saved keeps its weights: in SOKD a part of the teacher,
    unless a faster form runs in its place.
    """
    saved = {module for net in method.networks().values() for module in net.modules()}
    for teacher in (module for module in method.modules() if isinstance(module, Frozen)):
        for module in teacher.net.modules():
            if type(module) in (nn.Conv2d, nn.Linear) and module not in saved:
                module.to(precision.dtype)
