"""`fastkd train`, whole: data, teacher, the student alone, the student distilled, the table. And `fastkd eval`."""

from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from . import checkpoint, distributed
from .config import NetworkOptions, RunOptions, flat
from .data import create_loaders
from .engine.optim import APEX, apex_optimizers
from .engine.precision import Precision
from .errors import UserError
from .evaluate import evaluate, speed
from .methods import METHODS
from .methods.base import NoOptions
from .models import create_model, load_weights
from .report import board_class, say, show_table
from .train import Result, Trainer


def run(config) -> Result:
    """Take one effective configuration (config.parse) to its table; checks come before the first file is written."""
    job = Job(config)
    job.claim()
    if job.teacher is not None:
        job.prepare_teacher()
    if config.networks.baseline:
        job.train_alone()
    result = job.distill()
    show_table(["", "network", "top-1 %", "parameters", "inference img/s"], job.rows, numbers=3)
    say(f"everything is in {job.out}")
    return result


class Job:
    """The data, the networks and the run folder that the runs of one job share."""

    def __init__(self, config):
        _check_optional_parts(config.train)
        self.device = distributed.device_for(config.train.device)
        out = config.train.out or str(checkpoint.free_folder(f"runs/{default_name(config)}"))
        self.out = Path(distributed.gather(out)[0])
        self.config = replace(config, train=replace(config.train, out=str(self.out)))
        self.names, self.precision = config.networks, Precision(config.train.amp_dtype, self.device)
        self.train_loader, self.val_loader = create_loaders(
            config.data,
            self.device,
            seed=config.train.seed,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            dtype=self.precision.dtype,
            say=say,
        )
        self.first_epoch = self.train_loader.state_dict()
        self.student = self._network(self.names.student, self.names.student_weights)
        self.teacher = self._teacher() if METHODS[config.run.method].needs_teacher else None
        self.alone = self._part(self.names.student, config.train.epochs, "alone") if self.names.baseline else None
        self.rows: list[list[str]] = []

    def claim(self) -> None:
        if distributed.rank() == 0:
            checkpoint.claim_folder(self.out, flat(self.config), self.config.train.resume)

    def prepare_teacher(self) -> None:
        """Train the teacher if it has no weights yet, then say what it knows, loudly when that is nothing."""
        if not self.names.teacher_weights:
            self._find_or_train_teacher()
        top1 = self._add_row("teacher", self.names.teacher, self.teacher)
        chance = 100 / len(self.val_loader.classes)
        say(f"teacher {self.names.teacher}: top-1 {top1:.2f} % on the validation images")
        if top1 < chance + 0.1 * (100 - chance):
            say(
                f"WARNING: the teacher's top-1 is {top1:.2f} % and chance is {chance:.2f} %. Its weights, the order of "
                "the classes or the normalisation (--mean, --std) do not fit this data; the student will learn noise."
            )

    def train_alone(self) -> None:
        say(f"student {self.names.student}: alone, for comparison")
        net = self._network(self.names.student, self.names.student_weights)
        self._fit(self.alone, net)
        self._add_row("student alone", self.names.student, net)

    def distill(self) -> Result:
        name = self.config.run.method
        say(f"student {self.names.student}: {name}" + (f" from {self.names.teacher}" if self.teacher else ""))
        result, trainer = self._fit(self.config, self.student, self.teacher)
        self._add_row(f"student, {name}", self.names.student, trainer.network)
        return result

    def _teacher(self) -> nn.Module:
        if not self.names.teacher_weights and not self.names.teacher_epochs:
            raise UserError(
                f"the teacher {self.names.teacher} has no weights: give --teacher-weights FILE (or `pretrained`), "
                "or --teacher-epochs N to train it first"
            )
        self.teacher_config = self._part(self.names.teacher, self.names.teacher_epochs or 1, "teacher")
        return self._network(self.names.teacher, self.names.teacher_weights)

    def _find_or_train_teacher(self) -> None:
        """Weights from a finished run with the same settings, here or in a neighbouring folder; otherwise train."""
        folders = [self.out / "teacher", *sorted(self.out.parent.glob("*/teacher"))]
        same = (folder for folder in folders if checkpoint.finished(folder, flat(self.teacher_config)))
        found = distributed.gather(next(same, None))[0]
        if found:
            say(f"teacher {self.names.teacher}: trained before with these settings, taken from {found}")
            load_weights(self.teacher, found / "student.safetensors")
        else:
            say(f"teacher {self.names.teacher}: training it first")
            self._fit(self.teacher_config, self.teacher)

    def _part(self, name: str, epochs: int, folder: str):
        """The configuration of a plain training that this job needs, in a folder of its own."""
        return replace(
            self.config,
            run=RunOptions(method="ce"),
            networks=NetworkOptions(student=name),
            options=NoOptions(),
            train=replace(self.config.train, epochs=epochs, out=str(self.out / folder)),
        )

    def _fit(self, config, student: nn.Module, teacher: nn.Module | None = None) -> tuple[Result, Trainer]:
        self.train_loader.load_state_dict(self.first_epoch)
        method = METHODS[config.run.method](student, teacher, config.options)
        options = replace(config.train, resume=True)  # the folder is this job's: go on wherever a run in it had got to
        trainer = Trainer(method, self.train_loader, self.val_loader, options, flat(config))
        return trainer.fit(), trainer

    def _network(self, name: str, weights: str) -> nn.Module:
        torch.manual_seed(self.config.train.seed)  # a network starts the same whichever others are made
        return create_model(name, len(self.train_loader.classes), weights or None)

    def _add_row(self, label: str, name: str, net: nn.Module) -> float:
        net.to(self.device, memory_format=self.config.train.memory_format)
        top1 = evaluate(net, self.val_loader, self.precision)["top1"]
        rate = speed(net, self.val_loader, self.precision)
        parameters = sum(p.numel() for p in net.parameters())
        self.rows.append([label, name, f"{top1:.2f}", f"{parameters:,}", f"{rate:,.0f}"])
        return top1


def _check_optional_parts(options) -> None:
    """Raise UserError, with what to install, while nothing has been written."""
    if options.tensorboard:
        board_class()
    if options.opt in APEX:
        apex_optimizers()


def default_name(config) -> str:
    """For a folder below runs/: data, method, student."""
    names = (Path(config.data.data).name, config.run.method, config.networks.student)
    return "-".join(name.replace("/", "_") for name in names)


def evaluate_weights(config) -> list[str]:
    """`fastkd eval`: the row of its table. `config.what` is cli.EvalOptions, `config.data` DataOptions."""
    what, device = config.what, distributed.device_for(config.what.device)
    about = read_about(what.weights)
    model = what.model or about.get("model")
    if not model:
        raise UserError(f"--weights {what.weights} does not say which network it is for: give --model NAME")
    world = {"rank": distributed.rank(), "world_size": distributed.world_size()}
    precision = Precision(what.amp_dtype, device)
    _, loader = create_loaders(config.data, device, **world, dtype=precision.dtype, say=say)
    net = create_model(model, len(loader.classes), what.weights)
    net.to(device, memory_format=torch.channels_last if what.channels_last else torch.contiguous_format)
    scores, rate = evaluate(net, loader, precision), speed(net, loader, precision)
    shown = [f"{scores['top1']:.2f}", f"{scores['top5']:.2f}", f"{scores['loss']:.4f}", f"{rate:,.0f}"]
    return [model, f"{scores['images']:,}", *shown]


def read_about(weights: str) -> dict[str, str]:
    """What a student.safetensors says of itself; nothing for other weights."""
    if not (weights.endswith(".safetensors") and Path(weights).is_file()):
        return {}
    try:
        with safe_open(weights, framework="pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise UserError(f"{weights} is not a whole safetensors file: {error}") from None
