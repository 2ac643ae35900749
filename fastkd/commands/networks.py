"""The networks of a run, made from its options: the student, the teachers and the peers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from .. import distributed, weights_file
from ..config import Config
from ..data.classes import class_note, class_order
from ..errors import UserError
from ..files import sha256_of
from ..methods.base import Method
from ..models import (
    check_name,
    create_model,
    is_weights_file,
    layout_note_of,
    name_stages,
    new_classifier_of,
    reorder_classes,
)
from ..models.ensemble import Ensemble
from ..models.kwargs import parse_kwargs
from ..models.own_input import InputSpec, own_input
from ..models.weights import blaming
from ..network_options import NetworkOptions
from ..report import log_rank0
from .teacher_input import check_teacher_input, teacher_input


@dataclass(frozen=True)
class NetworkMaker:
    """Makes the networks of a run. Each depends on the options and the seed alone, and is equal in every process.

    A network that will be trained takes weights of another number of classes, or of classes with other names.
    """

    options: NetworkOptions
    classes: tuple[str, ...]  # names, in label order
    images: InputSpec  # as the loaders give them
    seed: int
    ignore_class_names: bool = False

    def student(self) -> nn.Module:
        """The student, with its initial weights."""
        options = self.options
        check_hash(options.student_weights, options.student_sha256)
        kwargs = options.model_kwargs
        return self.make("student", options.student, options.student_weights, kwargs=kwargs)

    def teachers(self) -> list[nn.Module]:
        """The teachers in the order of --teacher. Teachers that are trained first have other initial weights each."""
        pairs = zip(self.options.teacher, self.options.weights_of_teachers, strict=True)
        return [self._teacher(number, name, weights) for number, (name, weights) in enumerate(pairs)]

    def _teacher(self, number: int, name: str, weights: str) -> nn.Module:
        """A teacher, with its own input if it takes other images than the student."""
        trained = self.options.teacher_epochs > 0
        notes: list[str] = []  # logged once the network is there: its error comes first
        wanted = teacher_input(self.options, name, weights, self.images, notes.append, is_trained=trained)
        kwargs = kwargs_of(self.options, weights, notes.append)
        net = self.make("teacher", name, weights, number, trained=trained, image_size=wanted.image_size, kwargs=kwargs)
        for note in notes:
            log_rank0(note)
        return own_input(net, self.images, wanted)

    def peers(self) -> list[nn.Module]:
        """The peers. They start with other weights each: equal networks have nothing to teach each other."""
        alike = {self.options.student: self.options.model_kwargs}
        named = enumerate(self.options.peers, 1)
        return [self.make("peer", name, "", number, kwargs=alike.get(name, ())) for number, name in named]

    def make(
        self,
        role: str,
        name: str,
        weights: str,
        number: int = 0,
        *,
        trained: bool = True,
        image_size: int = 0,
        kwargs: tuple[str, ...] = (),
    ) -> nn.Module:
        """A network by its name. `number` is added to the seed of the initial weights. `image_size` 0: the run's."""
        torch.manual_seed(self.seed + number)  # so that it does not depend on the networks before it
        if distributed.rank() > 0:
            distributed.barrier()  # rank 0 goes first, so that pre-trained weights are downloaded once
        size = image_size or self.images.image_size
        noted = weights_file.read_about(Path(weights)) if weights else {}
        if noted.get("model", name) != name:
            log_rank0(f"{role} {name}: the weights {weights} are of {noted['model']}, says their note")
        option = f"--{role}-weights " if is_weights_file(weights) else ""
        with blaming(option, lambda classes: "--teacher-epochs N fine-tunes the teacher with a new one"):
            net = create_model(
                name,
                len(self.classes),
                weights or None,
                image_size=size,
                new_classifier=trained,
                kwargs=parse_kwargs(kwargs),
            )
        if distributed.rank() == 0:
            distributed.barrier()
        ends = {"student": self.options.student_stages, "teacher": self.options.teacher_stages}.get(role, ())
        if ends:
            name_stages(net, ends)
        if note := layout_note_of(net):
            log_rank0(f"{role} {name}: {weights}: {note}")
        if fresh := new_classifier_of(net):
            have = f"{fresh.classes} classes" if fresh.classes else "no classifier"
            log_rank0(
                f"{role} {name}: {weights or 'the tag'} has {have}, the data {len(self.classes)} classes: a new "
                f"classifier; these keys start fresh: {', '.join(fresh.keys)}"
            )
        elif weights:
            self._align_classes(role, net, weights, noted.get("data", {}).get("classes", self.classes), trained)
        return net

    def _align_classes(self, role: str, net: nn.Module, weights: str, noted: Sequence[str], trained: bool) -> None:
        """Put the logits into the order of the data's classes. `noted`: the classes by the note of the weights.

        Raises UserError if a network that will not be trained has classes of other names.
        """
        source = f"--{role}-weights {weights}"
        if trained and sorted(noted) != sorted(self.classes):
            if not self.ignore_class_names:
                log_rank0(f"{source}: its classes have other names than the data's; its classifier is trained further")
            return
        order = class_order(noted, self.classes, source, self.ignore_class_names)
        if order is not None:
            reorder_classes(net, order)
            log_rank0(f"{source}: it has the classes in another order; its logits are put into the data's order")
        elif note := class_note(noted, self.classes, source, self.ignore_class_names):
            log_rank0(note)


def kwargs_of(names: NetworkOptions, weights: str, log: Callable[[str], None]) -> tuple[str, ...]:
    """The arguments of a teacher's constructor: --teacher-kwargs, or else what its file of `weights` notes."""
    noted = () if names.teacher_kwargs else tuple(weights_file.read_about(Path(weights)).get("kwargs", ()))
    parse_kwargs(noted, f"--teacher-weights {weights} notes the argument")
    if noted:
        log(f"--teacher-kwargs {' '.join(noted)}, as the weights {weights} note")
    return names.teacher_kwargs or noted


def check_hash(weights: str, sha256: str) -> None:
    """Raise UserError if the file `weights` has another content than the noted one; an empty hash fits any file."""
    if sha256 and (found := sha256_of(Path(weights))) != sha256:
        raise UserError(
            f"--student-weights {weights} has the SHA-256 {found or 'of no file'}, and --student-sha256 is {sha256}: "
            "give the file of the run that is repeated, or drop --student-sha256"
        )


def teacher_of(teachers: list[nn.Module], config: Config) -> nn.Module | None:
    """The network that the method takes as its teacher: the only one, or the mean of several; None without teachers.

    The mean of probabilities is taken at the method's temperature, which must be one for all methods of a sum.
    """
    if len(teachers) < 2:
        return teachers[0] if teachers else None
    names = config.networks
    temperature = 1.0 if names.ensemble == "logits" else _temperature(config)
    return Ensemble(teachers, names.teacher_ratios or None, names.ensemble, temperature)


def _temperature(config: Config) -> float:
    """The temperature by which the method, or all methods of a sum, soften the logits; 1 if there is none.

    Raises UserError if the methods of a sum have different ones: there is one mean for all of them.
    """
    options = vars(config.method)
    given = {name: value for name, value in options.items() if name == "temperature" or name.endswith("_temperature")}
    if len(set(given.values())) > 1:
        shown = ", ".join(f"--{name.replace('_', '-')} {value:g}" for name, value in given.items())
        raise UserError(
            f"{shown}: the mean of several teachers' probabilities is taken at one temperature; give all methods the "
            "same, or take the mean of the logits, --ensemble logits"
        )
    return next(iter(given.values()), 1.0)


def refuse_without_weights(names: NetworkOptions, otherwise: str) -> None:
    """Raise UserError if a teacher has no weights, or an unknown name. `otherwise`: what to do without weights."""
    bare = [name for name, weights in zip(names.teacher, names.weights_of_teachers, strict=True) if not weights]
    if bare:
        check_name(bare[0])
        raise UserError(
            f"the teacher {bare[0]} has no weights: give --teacher-weights FILE (or `pretrained`), or {otherwise}"
        )


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
    if kind.needs_teacher and not names.teacher_epochs:
        refuse_without_weights(names, "--teacher-epochs N to train it first")
    option = "dcm_init" if "+" in method else "init"  # in a sum, options begin with the name of their method
    if names.student_weights and (init := getattr(config.method, option, "default")) != "default":
        raise UserError(
            f"--{option.replace('_', '-')} {init} draws all weights anew: --student-weights {names.student_weights} "
            "would be lost; drop one of them"
        )
    check_teacher_input(names, kind.needs_teacher, is_trained=names.teacher_epochs > 0)
