"""What a run knows of its method, its student and its images."""

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np
from torch import Tensor

from ..data.base import Loader, input_of
from ..methods.base import Method
from ..models.sizes import name_of


def known_of(
    method: Method, loader: Loader, images: Tensor, about: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(`about` with what it lacks of the method, its student and its images, what `input_of` says of the images).

    A network of `create_model` has its name. The size is that of the loader, or else of its first `images`, if they
    are square. The normalisation is known if the loader has it.
    """
    name, kwargs = name_of(method.student)
    known: dict[str, Any] = {"student": name, "model_kwargs": kwargs} if name and not about.get("student") else {}
    height, width = images.shape[2:]
    size = {"image_size": height} if height == width else {}
    given = {key: value for key, value in about.items() if value or key not in size}
    image = input_of(loader, size | given)
    known |= {key: image[key] for key in ("image_size", "mean", "std") if key in image and not about.get(key)}
    known = {key: list(value) if isinstance(value, tuple) else value for key, value in known.items()}
    return {**({} if "method" in about else _described(method)), **about, **known}, image


def _described(method: Method) -> dict[str, Any]:
    """The method's name and its options, by the names that they have on the command line.

    Those of a caller's own class have the class's name in front, as in a sum of methods. Of a value that JSON does not
    have, the type is noted.
    """
    kind = type(method)
    name = kind.__name__.lower()
    prefix = "" if kind.__module__.startswith("fastkd.methods.") else f"{name}_"
    values = {f"{prefix}{each.name}": getattr(method.options, each.name) for each in fields(method.options)}
    return {"method": name} | {option: _plain(value) for option, value in values.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        return str(value) if isinstance(value, float) else type(value).__name__
