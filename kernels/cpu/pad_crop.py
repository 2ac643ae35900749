"""pad_crop.py on the CPU: one gather of pixels, then the normalisation over long rows."""

import os
from collections.abc import Sequence

import torch
from torch import Tensor


def check_corners(images: Tensor, index: Tensor, corners: Tensor, reflect: bool) -> None:
    """On the CPU, and with FASTKD_DEBUG=1 everywhere: ValueError for what lies outside the images."""
    if index.device.type != "cpu" and os.environ.get("FASTKD_DEBUG") != "1":
        return
    N, H, W, _ = images.shape
    if not ((index >= 0) & (index < N)).all():
        raise ValueError(f"index must be 0 to {N - 1} for {N} images, got {int(index.min())} to {int(index.max())}")
    if reflect and (corners.abs() > torch.tensor([H - 1, W - 1], device=corners.device)).any():
        raise ValueError(
            f"images of {H} x {W} can be mirrored by up to {H - 1} and {W - 1} pixels, got corners from "
            f"{corners.amin(0).tolist()} to {corners.amax(0).tolist()}"
        )


def closed_form(
    images: Tensor,
    index: Tensor,
    corners: Tensor,
    flips: Tensor,
    output: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    reflect: bool,
) -> None:
    """The same arguments as the kernel's `launch`."""
    B, (_, H, W, _) = len(index), images.shape
    crops = cropped(images, index, corners, flips, reflect)
    # long rows: the inner loop would be 3 numbers otherwise
    values = crops.view(B, H, W * 3).float().div_(255)
    values.sub_(torch.tensor(mean).repeat(W)).div_(torch.tensor(std).repeat(W))
    output.permute(0, 2, 3, 1).copy_(values.view(B, H, W, 3))


def cropped(images: Tensor, index: Tensor, corners: Tensor, flips: Tensor, reflect: bool) -> Tensor:
    """uint8 [B, H, W, 3], contiguous: the crops, before normalising."""
    H, W = images.shape[1:3]
    rows, columns = (corners[:, axis, None] + torch.arange(side) for axis, side in enumerate((H, W)))
    columns = torch.where(flips[:, None], columns.flip(1), columns)
    if reflect:
        rows, columns = (edge - (edge - at.abs()).abs() for at, edge in ((rows, H - 1), (columns, W - 1)))
        return images[index[:, None, None], rows[:, :, None], columns[:, None]].contiguous()
    outside = ((rows < 0) | (rows >= H))[:, :, None] | ((columns < 0) | (columns >= W))[:, None]
    rows, columns = rows.clamp(0, H - 1), columns.clamp(0, W - 1)
    crops = images[index[:, None, None], rows[:, :, None], columns[:, None]].contiguous()
    return crops.masked_fill_(outside[..., None], 0)
