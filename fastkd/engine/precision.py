"""Number formats of a step: autocast for the forward passes, and a gradient scaler for fp16."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ..methods.base import Method
from ..methods.frozen import FrozenTeacher

AMP_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Precision:
    """`amp_dtype`: a key of AMP_DTYPES, or "auto": bfloat16 on CUDA, else float32. Only float16 scales gradients.

    `autocast()` is a context for forward passes; it does nothing in float32.
    """

    def __init__(self, amp_dtype: str, device: torch.device):
        if amp_dtype == "auto":
            amp_dtype = "bfloat16" if device.type == "cuda" else "float32"
        self.dtype, self.device = AMP_DTYPES[amp_dtype], device
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.autocast = partial(torch.autocast, device.type, self.dtype, enabled=self.dtype != torch.float32)


def wrong_dtype(net: nn.Module, images: Tensor) -> str:
    """What to do about images in whose number format `net` cannot compute, for an error; "" if they have a right one.

    Autocast, if it is on, casts all floating images but those of float64.
    """
    wanted = next((p.dtype for p in net.parameters() if p.is_floating_point()), images.dtype)
    casts = torch.is_autocast_enabled(images.device.type) and images.dtype != torch.float64
    if images.dtype == wanted or casts:
        return ""
    how = ".float()" if wanted == torch.float32 else f".to({wanted})"
    return f"the loader's images are {images.dtype} and the weights {wanted}: convert the images, by {how}"


def cast_frozen(method: Method, images: Tensor, precision: Precision) -> Callable[[], None]:
    """Cast the teachers' convolutions and linear layers once to the dtype to which autocast casts them in every step.

    The results keep their bits. If a forward pass of `images` [N, 3, H, W] shows that they do not, as with layers that
    leave autocast, nothing is cast. Layers shared with a saved network are not cast (SOKD's teacher bottom). The
    returned function gives the teachers their weights back.
    """
    teachers = [module for module in method.modules() if isinstance(module, FrozenTeacher)]
    saved = {module for net in method.networks().values() for module in net.modules()}
    layers = [layer for each in teachers for layer in each.net.modules() if type(layer) in (nn.Conv2d, nn.Linear)]
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
        except RuntimeError:  # two dtypes in one operation
            same = False
    if not same:
        put_back()
    return put_back
