"""Number formats of a step: autocast for the forward passes, a gradient scaler where fp16 needs one."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..methods.base import FrozenTeacher, Method

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


def cast_frozen(method: Method, images: Tensor, precision: Precision) -> Callable[[], None]:
    """Teachers' convolutions and matrices in the format to which autocast would cast them in every step.

    Their results are the same to the bit; where they are not, as with layers that leave autocast, nothing is cast. What
    is evaluated and saved keeps its weights: in SOKD a part of the teacher, unless a faster form runs in its place.
    Call what comes back to have the weights as they were.
    """
    frozen = [module for module in method.modules() if isinstance(module, FrozenTeacher)]
    saved = {module for net in method.networks().values() for module in net.modules()}
    layers = [layer for each in frozen for layer in each.net.modules() if type(layer) in (nn.Conv2d, nn.Linear)]
    weights = [(p, p.data) for layer in layers if layer not in saved for p in layer.parameters()]

    def put_back() -> None:
        for p, data in weights:
            p.data = data

    if precision.dtype == torch.float32 or method.teacher is None:
        return put_back
    with precision.autocast():
        right = method.teacher(images)
        for p, data in weights:
            p.data = data.to(precision.dtype)
        try:
            same = torch.allclose(method.teacher(images), right, 1e-2, 1e-2)
        except RuntimeError:  # numbers of two formats meet
            same = False
    if not same:
        put_back()
    return put_back
