"""How evaluation turns one picture into the input of a trained network."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2

from ..errors import UserError
from .base import resize_side
from .decode import decode
from .normalise import Normalise


@dataclass(frozen=True)
class Preprocess:
    """Resize the shorter side (antialiased), crop the centre, normalise.

    A crop that is larger than the resized picture has a black border.
    """

    resize: int  # pixels of the shorter side
    image_size: int  # pixels of the crop
    mean: tuple[float, ...]  # of each channel of images in [0, 1]
    std: tuple[float, ...]
    interpolation: str = "bilinear"  # or "bicubic"
    exif: bool = False  # turn photos as their EXIF orientation says

    @classmethod
    def of(cls, noted: Mapping[str, Any]) -> "Preprocess | None":
        """From what a weights file notes of its images; None if it lacks the size or the normalisation.

        Small images that were kept in memory were neither resized nor cropped; those of a named set may have a border.
        """
        from .small_sets import SMALL_SETS

        if not all(noted.get(name) for name in ("image_size", "mean", "std")):
            return None
        size, known = noted["image_size"], SMALL_SETS.get(noted.get("data", ""))
        in_memory = known.sides[0] if known else size
        resize = in_memory if known or noted.get("resident") else resize_side(size, noted.get("crop_pct", 0.0))
        how = noted.get("interpolation", "bilinear")
        return cls(resize, size, tuple(noted["mean"]), tuple(noted["std"]), how, bool(noted.get("exif")))

    @property
    def crop_pct(self) -> float:
        """timm's option: it resizes the shorter side to floor(image_size / crop_pct)."""
        fraction = self.image_size / self.resize
        exact = math.floor(self.image_size / fraction) == self.resize
        return fraction if exact else math.nextafter(fraction, 0)

    def read(self, file: str) -> Tensor:
        """The picture as uint8 [image_size, image_size, 3]. Raises UserError for one that cannot be decoded."""
        transform = v2.Compose(
            [v2.Resize(self.resize, v2.InterpolationMode(self.interpolation)), v2.CenterCrop(self.image_size)]
        )
        return transform(decode(file, self.exif, self.resize)).permute(1, 2, 0)

    def normalise(self, images_NHWC: Tensor) -> Tensor:
        """uint8 [N, H, W, 3] -> what the network takes, float32 [N, 3, H, W]. Raises UserError for other images."""
        if images_NHWC.dtype != torch.uint8 or images_NHWC.ndim != 4 or images_NHWC.shape[3] != 3:
            raise UserError(
                f"normalise takes uint8 [N, H, W, 3], as read(file)[None], got {images_NHWC.dtype} "
                f"{list(images_NHWC.shape)}"
            )
        return Normalise(self.mean, self.std, images_NHWC.device, torch.float32)(images_NHWC)
