"""What a run knows of its student and its images."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..data.base import Loader, input_of
from ..models.sizes import name_of


def known_of(
    student: nn.Module, loader: Loader, images: Tensor, about: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(`about` with what it lacks of the student and its images, what `input_of` says of the images).

    A network of `create_model` has its name. The size is that of the loader, or else of its first `images`, if they
    are square. The normalisation is known if the loader has it.
    """
    name, kwargs = name_of(student)
    known: dict[str, Any] = {"student": name, "model_kwargs": kwargs} if name and not about.get("student") else {}
    height, width = images.shape[2:]
    size = {"image_size": height} if height == width else {}
    given = {key: value for key, value in about.items() if value or key not in size}
    image = input_of(loader, size | given)
    known |= {key: image[key] for key in ("image_size", "mean", "std") if key in image and not about.get(key)}
    known = {key: list(value) if isinstance(value, tuple) else value for key, value in known.items()}
    return {**about, **known}, image
