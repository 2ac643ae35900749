"""Pixels as pictures inside a page: data URIs."""

import base64
import io
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

SMALL = 64  # pixels a side; up to here a picture is kept without loss


def denormalised(images: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> Tensor:
    """Bytes [K, H, W, 3] of normalised images [K, 3, H, W]. Without mean and std, each image fills black to white."""
    if mean and std:
        shift, scale = (torch.tensor(list(each), dtype=torch.float32).view(-1, 1, 1) for each in (mean, std))
        images = images * scale + shift
    else:
        low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
        images = (images - low) / (high - low).clamp_min(1e-12)
    return (images.nan_to_num(0).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).contiguous()


def picture_uri(pixels: Tensor) -> str:
    """A picture, bytes [H, W, 3] or [H, W, 4], as a data URI: PNG if it is small or has an alpha channel, else JPEG."""
    is_exact = max(pixels.shape[:2]) <= SMALL or pixels.shape[2] == 4
    kind, options = ("png", {"optimize": True}) if is_exact else ("jpeg", {"quality": 90})
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
