"""fastkd: knowledge distillation of image classifiers, fast and exact.

    fastkd.create_model   networks by name          fastkd.losses    one loss for your own trainer
    fastkd.Trainer        the loop                  fastkd.methods   one paper, one file

Names are imported on first use: the command line has something to set before torch is loaded (see cli.py).
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .engine import TrainOptions
    from .models import create_model
    from .train import Result, Trainer

__version__ = "0.1.0"
__all__ = ["Result", "TrainOptions", "Trainer", "create_model"]

_HOMES = {"Result": "train", "TrainOptions": "engine", "Trainer": "train", "create_model": "models"}
_PARTS = ("data", "engine", "kernels", "losses", "methods", "models")


def __getattr__(name: str):
    if name in _PARTS:
        return import_module(f".{name}", __name__)
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module 'fastkd' has no attribute {name!r}")
