"""The modules of timm, torchvision and transformers, and the names of their networks."""

from importlib import import_module
from types import ModuleType

from ..errors import UserError, nearest


def library_module(name: str, prefix: str = "", package: str = "") -> ModuleType:
    """The module of a library. Raises UserError if it cannot be imported."""
    try:
        return import_module(name)
    except ImportError as error:
        raise UserError(
            f"models '{prefix or name}/...' need {name}, which cannot be imported ({error}): "
            f"pip install {package or name}"
        ) from error


def timm_architecture(name: str) -> str:
    """The name without its tag of weights. Raises UserError if timm has no such network."""
    timm, architecture = library_module("timm"), name.partition(".")[0]
    if not timm.is_model(architecture):
        raise UserError(f"timm has no model {architecture!r}{nearest(architecture, timm.list_models())}")
    return architecture


def check_torchvision_name(name: str) -> None:
    """Raise UserError if torchvision has no such network for classification."""
    models = library_module("torchvision").models
    names = models.list_models(module=models)
    if name not in names:
        raise UserError(f"torchvision has no classification model {name!r}{nearest(name, names)}")
