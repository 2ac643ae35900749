"""How a step is run: number formats, optimizers, the learning rate, the average of the weights."""

from .options import TrainOptions
from .schedule import Schedule
from .step import Step

__all__ = ["Schedule", "Step", "TrainOptions"]
