"""What follows a convolution of a frozen network, in place on its output: bias, residual addition and ReLU in one pass.

    y[n, c, h, w] <- relu(y[n, c, h, w] + bias[c] + z[n, c, h, w])

torch computes a convolution's bias in a kernel of its own, and the addition and the ReLU in two more: three passes over
the map. Here it is one launch, which reads y (and z) once and writes y once.
Shapes: y and z [N, C, H, W], bias [C]; y in channels-last or contiguous memory, fp16, bf16 or fp32. bias and z may be
left out. Computed in fp32 and rounded once. NaN propagates. No host sync, nothing allocated. Bytes per element in bf16:
4, or 6 with z. A z in another memory format than y's is copied first. No gradient.
"""

import torch
from torch import Tensor

from .check import check_floating
from .cpu.conv_epilogue import closed_form


def conv_epilogue_reference(y: Tensor, bias: Tensor | None, z: Tensor | None = None, *, relu: bool = True) -> Tensor:
    """The specification, with y as it was: a new tensor in the dtype of y, computed in float64."""
    total = y.double()
    if bias is not None:
        total = total + bias.double()[:, None, None]
    if z is not None:
        total = total + z.double()
    return (total.relu() if relu else total).to(y.dtype)


def conv_epilogue(y: Tensor, bias: Tensor | None, z: Tensor | None = None, *, relu: bool = True) -> Tensor:
    """Write relu(y + bias + z) into y, and return y. Without `relu`: y + bias + z.

    y: [N, C, H, W], channels-last or contiguous; bias: [C] or None; z: shaped as y, any strides, or None. Any floating
    dtypes on one device. An empty batch writes nothing. ValueError for what does not fit, and for a y that requires a
    gradient, which this operation does not give.
    """
    given = {"y": y} | ({} if bias is None else {"bias": bias}) | ({} if z is None else {"z": z})
    check_floating(**given)
    if y.dim() != 4:
        raise ValueError(f"y must be [N, C, H, W], got {list(y.shape)}")
    if bias is not None and bias.shape != y.shape[1:2]:
        raise ValueError(f"bias must be [{y.shape[1]}] for y {list(y.shape)}, got {list(bias.shape)}")
    if z is not None and z.shape != y.shape:
        raise ValueError(f"z must have the shape of y, {list(y.shape)}, got {list(z.shape)}")
    if not (y.is_contiguous() or y.is_contiguous(memory_format=torch.channels_last)):
        strides = list(y.stride())
        raise ValueError(f"y must be dense in memory, channels-last or contiguous, got strides {strides}")
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given.values()):
        raise ValueError("an input requires a gradient, which this operation does not give; use torch.no_grad()")
    _conv_epilogue(y, bias, z, relu)
    return y


@torch.library.custom_op("fastkd::conv_epilogue", mutates_args=("y",))
def _conv_epilogue(y: Tensor, bias: Tensor | None, z: Tensor | None, relu: bool) -> None:
    if y.numel() == 0:
        return
    if y.device.type == "cuda" and y.dtype != torch.float64:
        from .gpu.conv_epilogue import launch as compute
    else:
        compute = closed_form
    compute(y, bias, z, relu)


@_conv_epilogue.register_fake
def _(*_inputs: object) -> None:
    return None
