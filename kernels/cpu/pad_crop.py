"""pad_crop.py on the CPU: whole images and whole rows are copied. A gather of pixels takes 20 times as long."""

from collections.abc import Sequence

import torch
from torch import Tensor


def closed_form(
    images: Tensor,
    chosen: Tensor,
    corners: Tensor,
    flips: Tensor,
    output: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    pad: int,
    reflect: bool,
) -> None:
    """The same arguments as the kernel's `launch`."""
    _check_range("chosen", chosen, len(images) - 1)
    _check_range("corners", corners, 2 * pad)
    crops = images.index_select(0, chosen)
    if pad:
        crops = _cropped(_padded(crops, pad, reflect), corners, images.shape[1], images.shape[2])
    if flips.any():
        crops = torch.where(flips[:, None, None, None], crops.flip(2), crops)
    N, H, W, _ = crops.shape
    rows = crops.expand(-1, -1, -1, 3).reshape(N, H, W * 3).float()  # long rows: the inner loop is over W * 3 numbers
    m, s = (torch.tensor(three, dtype=torch.float32).repeat(W) for three in (mean, std))
    output.permute(0, 2, 3, 1).copy_(rows.div_(255).sub_(m).div_(s).view(N, H, W, 3))


def _check_range(name: str, values: Tensor, largest: int) -> None:
    low, high = (int(edge) for edge in values.aminmax())
    if low < 0 or high > largest:
        raise ValueError(f"{name} must be from 0 to {largest}, got {low} to {high}")


def _padded(images_NHWC: Tensor, pad: int, reflect: bool) -> Tensor:
    for axis in (1, 2):
        size = images_NHWC.shape[axis]
        before, after = images_NHWC.narrow(axis, 0, pad), images_NHWC.narrow(axis, size - pad, pad)
        if reflect:
            before, after = images_NHWC.narrow(axis, 1, pad), images_NHWC.narrow(axis, size - pad - 1, pad)
            before, after = before.flip(axis), after.flip(axis)
        else:
            before, after = torch.zeros_like(before), torch.zeros_like(after)
        images_NHWC = torch.cat([before, images_NHWC, after], axis)
    return images_NHWC


def _cropped(padded: Tensor, corners: Tensor, H: int, W: int) -> Tensor:
    """[N, H, W, C]: each row of a crop is one piece of memory, that begins at any pixel."""
    N, tall, wide, C = padded.shape
    pieces = padded.as_strided((N * tall * wide - W + 1, W * C), (C, 1))
    first = torch.arange(N)[:, None] * tall + corners[:, :1] + torch.arange(H)  # row of the batch
    begins = first * wide + corners[:, 1:]
    return pieces.index_select(0, begins.reshape(-1)).view(N, H, W, C)
