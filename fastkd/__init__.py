"""fastkd: knowledge distillation of image classifiers, fast and exact.

fastkd.create_model   networks by name          fastkd.losses    one loss for your own trainer
fastkd.Trainer        the loop                  fastkd.methods   one paper, one file
"""

from .engine import TrainOptions
from .models import create_model
from .train import Result, Trainer

__version__ = "0.1.0"
__all__ = ["Result", "TrainOptions", "Trainer", "create_model"]
