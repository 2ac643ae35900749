"""How a step runs: number formats, optimizers, the learning rate, the average of the weights, graphs."""

from .graph import GraphedStep
from .launch import graphed
from .optim import Schedule
from .options import TrainOptions
from .step import Step
from .teacher_forms import choose_form

__all__ = ["GraphedStep", "Schedule", "Step", "TrainOptions", "choose_form", "graphed"]
