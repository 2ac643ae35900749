"""fastkd: knowledge distillation of image classifiers, fast and exact.

    fastkd.create_model   networks by name          fastkd.losses    one loss for your own trainer
    fastkd.Trainer        the loop                  fastkd.methods   one paper, one file

Names are imported on first use, because the command line sets an environment variable before torch is loaded (cli.py).
Editors and type checkers see every name.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import data, engine, kernels, losses, methods, models
    from .engine import TrainOptions
    from .models import create_model
    from .train import Result, Trainer

__version__ = "0.1.0"
__all__ = [
    "Result",
    "TrainOptions",
    "Trainer",
    "create_model",
    "data",
    "engine",
    "kernels",
    "losses",
    "methods",
    "models",
]

_MODULE_OF = {"Result": "train", "TrainOptions": "engine", "Trainer": "train", "create_model": "models"}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'fastkd' has no attribute {name!r}")
    module = import_module(f".{_MODULE_OF.get(name, name)}", __name__)
    return getattr(module, name) if name in _MODULE_OF else module


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
