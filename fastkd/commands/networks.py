"""The networks of a run, made from its options: the student, the teachers and the peers."""

from dataclasses import dataclass

import torch
from torch import nn

from .. import distributed
from ..config import Config, NetworkOptions
from ..errors import UserError
from ..methods.base import Method
from ..models import create_model
from ..models.ensemble import Ensemble


@dataclass(frozen=True)
class NetworkMaker:
    """Makes the networks of a run. Each depends on the options and the seed alone, and is equal in every process."""

    options: NetworkOptions
    classes: tuple[str, ...]  # names, in label order
    seed: int

    def student(self) -> nn.Module:
        """The student, with its initial weights."""
        return self.make(self.options.student, self.options.student_weights)

    def teachers(self) -> list[nn.Module]:
        """The teachers in the order of --teacher. Teachers that are trained first have other initial weights each."""
        pairs = zip(self.options.teacher, self.options.weights_of_teachers, strict=True)
        return [self.make(name, weights, number) for number, (name, weights) in enumerate(pairs)]

    def peers(self) -> list[nn.Module]:
        """The peers. They start with other weights each: equal networks have nothing to teach each other."""
        return [self.make(name, "", number) for number, name in enumerate(self.options.peers, 1)]

    def make(self, name: str, weights: str, number: int = 0) -> nn.Module:
        """A network by its name. `number` is added to the seed of the initial weights."""
        torch.manual_seed(self.seed + number)  # so that it does not depend on the networks before it
        if distributed.rank() > 0:
            distributed.barrier()  # rank 0 goes first, so that pre-trained weights are downloaded once
        net = create_model(name, len(self.classes), weights or None)
        if distributed.rank() == 0:
            distributed.barrier()
        return net


def teacher_of(teachers: list[nn.Module], config: Config) -> nn.Module | None:
    """The network that the method takes as its teacher: the only one, or the mean of several; None without teachers.

    The mean of probabilities is taken at the method's temperature.
    """
    if len(teachers) < 2:
        return teachers[0] if teachers else None
    names = config.networks
    temperature = getattr(config.method, "temperature", 1.0)
    return Ensemble(teachers, names.teacher_ratios or None, names.ensemble, temperature)


def check_networks(kind: type[Method], config: Config) -> None:
    """Raise UserError if the options name networks or weights that the method does not use, or lack weights."""
    names, method = config.networks, config.run.method
    if names.peers and not kind.needs_peers:
        raise UserError(f"--peers {' '.join(names.peers)}: method {method} trains the student alone; drop --peers")
    if names.teacher_weights and not kind.needs_teacher:
        raise UserError(
            f"--teacher-weights {' '.join(names.teacher_weights)}: method {method} has no teacher, all learn from "
            "scratch" + ("; name the other networks by --peers" if kind.needs_peers else "")
        )
    bare = [name for name, weights in zip(names.teacher, names.weights_of_teachers, strict=True) if not weights]
    if kind.needs_teacher and bare and not names.teacher_epochs:
        raise UserError(
            f"the teacher {bare[0]} has no weights: give --teacher-weights FILE (or `pretrained`), "
            "or --teacher-epochs N to train it first"
        )
