"""`fastkd train`: the data, the teacher, the student alone, the student distilled, the table."""

import copy
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import yaml
from torch import nn

from .. import checkpoint, distributed
from ..config import Config, RunOptions, defaults, flat, parse
from ..data import create_loaders
from ..data.base import EpochLoader, describe, first_batch, input_of
from ..data.train_size import batches_of_all_sizes
from ..engine import TrainOptions
from ..engine.backends import backends
from ..engine.launch import check_compile, check_graph
from ..engine.optim import APEX, apex_optimizers
from ..engine.precision import Precision
from ..engine.teacher_forms import check_form
from ..engine.trial import try_step
from ..errors import UserError
from ..evaluate import evaluate, speed
from ..methods import find_method
from ..methods.base import Method
from ..methods.context import NoOptions, RunContext
from ..methods.frozen import AbsentTeacher
from ..models import load_weights
from ..models.own_input import InputSpec, OwnInput
from ..network_options import NetworkOptions
from ..report import board_class, log_rank0, show_table
from ..teacher_cache import TeacherCache
from ..train import Trainer, titles
from .cached import check_cached, open_cache, views_of, with_views
from .networks import NetworkMaker, check_networks, teacher_of
from .unlabelled import check_unlabelled


def run(arguments: list[str]) -> None:
    """The command: parse the options, then print the configuration or train.

    Checks come before the first file is written. A later KeyboardInterrupt holds the command that resumes the run.
    """
    notes: list[str] = []  # logged once the process group tells which process prints
    config = parse(arguments, notes.append)
    if config.run.print_config:
        print(*(f"# {note}\n" for note in notes), yaml.safe_dump(flat(config), sort_keys=False), sep="", end="")
        return
    job = Job(config)
    for note in notes:
        log_rank0(note)
    job.claim()
    try:
        with backends(job.device):
            job.work()
    except KeyboardInterrupt:
        again = f"fastkd train --out {shlex.quote(str(job.out))} --resume"
        raise KeyboardInterrupt(f"go on with `{again}`") from None


class Job:
    """The data, the networks and the run folder that the trainings of one job share."""

    def __init__(self, config: Config):
        kind, names = find_method(config.run.method), config.networks
        if kind.needs_peers and not names.peers:
            names = replace(names, peers=(names.student,))
        self.config, self.names = replace(config, networks=names), names
        if names.teacher_cache:
            check_cached(kind, self.config)
            config = with_views(config, log_rank0)
        self.device = distributed.device_for(config.train.device)
        self.precision = Precision(config.train.amp_dtype, self.device)
        self.train_loader, self.val_loader = create_loaders(
            config.data,
            self.device,
            seed=config.train.seed,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            dtype=self.precision.dtype,
            paired=bool(config.train.mixup or config.train.cutmix),
            epochs=config.train.epochs,
            log=log_rank0,
            gather=distributed.gather,
        )
        check_unlabelled(kind, config, self.train_loader)
        self.first_epoch = self.train_loader.state_dict()
        noted = input_of(self.train_loader, {})
        images = InputSpec.of(noted)
        assert images is not None  # all of our loaders have a size and a normalisation
        if noted.get("resident"):
            config = replace(config, data=replace(config.data, loader="resident"))
        config = replace(config, data=replace(config.data, **vars(images)))  # so that config.yaml says what was used
        self.config = replace(config, networks=names)
        classes, ignore = self.train_loader.classes, config.data.ignore_class_names
        self.maker = NetworkMaker(names, classes, images, config.train.seed, ignore)
        self.student = self.maker.student()
        _check_options(kind, config)
        self.cache = self._open_cache(None if names.teacher_epochs else names.weights_of_teachers)
        absent = self.cache is not None and self.cache.covers(views_of(config)) and not names.teacher_epochs
        self.teachers = self.maker.teachers() if kind.needs_teacher and not absent else []
        self.teacher = AbsentTeacher() if absent else teacher_of(self.teachers, config)
        self.peers = self.maker.peers()
        self._check_fit(kind)
        self.rows: list[list[str]] = []
        self.trained: list[Path] = []  # the weights of the teachers that the job has trained, or has found

    def _open_cache(self, weights: tuple[str, ...] | None) -> TeacherCache | None:
        """The teacher cache, if the run has one. `weights`: of the teachers; None: they have yet to be trained."""
        if not self.names.teacher_cache:
            return None
        if isinstance(self.train_loader, EpochLoader):
            self.train_loader.stretch(self.config.train.epochs)  # the training of a teacher has other epochs
        cache = open_cache(self.config, self.train_loader, self.precision, weights)
        if cache.lost and weights is not None:
            views = ", ".join(str(view + 1) for view in cache.lost)
            log_rank0(f"teacher cache {cache.folder}: files of view {views} are missing; the teacher is asked again")
        if cache.manifest.complete and weights is None:
            log_rank0(
                f"teacher cache {cache.folder}: it fits if the teacher, which is trained first, gets the very weights "
                "that the cache was made from; else give these by --teacher-weights"
            )
        return cache

    def _check_fit(self, kind: type[Method]) -> None:
        """Raise UserError if networks, options or schedule do not fit the method, before a teacher is trained."""
        trial = kind(*copy.deepcopy((self.student, self.teacher, self.config.method, self.peers)))
        options = self.config.train
        run = RunContext(
            epochs=options.epochs,
            steps_per_epoch=len(self.train_loader),
            drops=options.drops,
            seed=options.seed,
            device=self.device,
        )
        trial.check(run)
        if isinstance(self.teacher, OwnInput) and any(getattr(each, "swaps_blocks", False) for each in trial.modules()):
            log_rank0("swapped-in blocks get the student's features: the teacher's own images are not for them")
        check_form(trial, options.teacher_form)
        check_compile(trial, options)
        check_graph(options.graph, options, self.device)
        trained = dict.fromkeys(self.teachers, "teacher") if self.names.teacher_epochs else {}
        for net, role in (trained | {net: role for role, net in trial.networks().items()}).items():
            checkpoint.check_savable(net, role.replace("_", " "))
        self._try_steps(trial)

    def _try_steps(self, method: Method) -> None:
        """Make a step of `method`, and of the training of its teacher if there is one, on images of the first batch."""
        batch, classes, options = first_batch(self.train_loader), self.train_loader.classes, self.config.train
        trials = [(method, titles(vars(self.names)))]
        if self.names.teacher_epochs:
            for name, net in zip(self.names.teacher, self.teachers, strict=False):
                trials.append((find_method("ce")(copy.deepcopy(net)), {"student": f"the teacher {name}"}))
        taught = self.cache.rows.example(len(batch[0])) if self.cache else ()
        for trial, called in trials:
            if self.config.data.unlabelled:
                trial.allow_unlabelled()
            trial.to(self.device).to(memory_format=options.memory_format)
            given = taught if trial is method else ()
            for note, images in batches_of_all_sizes(self.train_loader, batch):
                try_step(trial, images, classes, options, self.device, called, given, note)

    def claim(self) -> None:
        """Make the run folder; without --out it is a new one in runs/."""
        options = self.config.train
        names = (Path(self.config.data.data).name, self.config.run.method, self.names.student)
        stem = "runs/" + "-".join(name.replace("/", "_") for name in names)
        out = options.out or distributed.from_rank_zero(checkpoint.new_folder, stem)
        self.out = Path(out)
        self.config = replace(self.config, train=replace(options, out=str(out)))
        if options.resume and not (self.out / "last.pt").exists():
            log_rank0(f"--resume: {out} has no checkpoint of the student yet; its training starts from the beginning")
        if distributed.rank() == 0 and options.resume:
            checkpoint.add_missing_options(self.out, defaults(self.config.run.method))
            for folder in (*self.out.glob("teacher*"), self.out / "alone"):
                checkpoint.add_missing_options(folder, defaults("ce"))
        if distributed.rank() == 0:
            checkpoint.claim_folder(self.out, flat(self.config), options.resume)

    def work(self) -> None:
        """Train what needs training, the student last, and show the table."""
        for number, teacher in enumerate(self.teachers):
            self.prepare_teacher(number, teacher)
        if self.cache and self.names.teacher_epochs:
            self.cache = self._open_cache(tuple(map(str, self.trained)))
        if isinstance(self.teacher, AbsentTeacher):
            log_rank0(f"teacher {' '.join(self.names.teacher)}: its logits are in {self.names.teacher_cache}")
        if self.teacher is not None and len(self.teachers) > 1:
            self._add_row("teachers' mean", " ".join(self.names.teacher), self.teacher)
        name, method = self.names.student, self.config.run.method
        if self.names.baseline and method != "ce":
            log_rank0(f"student {name}: alone, for comparison")
            net = self.maker.student()
            trainer = self._fit(self._alone(name, self.names.student_weights, self.config.train, "alone"), net)
            self._add_row("student alone", name, trainer.network)
        log_rank0(f"student {name}: {method}" + (f" from {', '.join(self.names.teacher)}" if self.teacher else ""))
        trainer = self._fit(self.config, self.student, self.teacher, self.peers, self.cache)
        for label, net in trainer.networks.items():
            self._add_row(f"{label.replace('_', ' ')}, {method}", trainer.report.models.get(label, ""), net)
        show_table(["", "network", "top-1 %", "parameters", "inference img/s"], self.rows, numbers=3)
        log_rank0(f"everything is in {self.out}")

    def prepare_teacher(self, number: int, teacher: nn.Module) -> None:
        """Train or fine-tune teacher `number` (from 0) if --teacher-epochs says so, and log its accuracy.

        Its accuracy near chance is a warning.
        """
        name = self.names.teacher[number]
        folder = "teacher" + (str(number + 1) if number else "")
        if self.names.teacher_epochs:
            self.trained.append(self._trained_teacher(number, teacher, folder))
            load_weights(teacher, self.trained[-1])
        top1 = self._add_row(folder.replace("teacher", "teacher ").strip(), name, teacher)
        chance = 100 / len(self.val_loader.classes)
        log_rank0(f"teacher {name}: top-1 {top1:.2f} % on the validation images")
        if top1 < chance + 0.1 * (100 - chance):
            reason = "Its weights or the normalisation (--teacher-mean, --teacher-std) do not fit this data"
            if self.names.teacher_epochs:
                reason = f"It was trained for too short a time (--teacher-epochs {self.names.teacher_epochs})"
            log_rank0(
                f"WARNING: the teacher's top-1 is {top1:.2f} % and chance is {chance:.2f} %. {reason}; "
                "the student will learn noise."
            )

    def _trained_teacher(self, number: int, teacher: nn.Module, folder: str) -> Path:
        """The saved weights of teacher `number`, trained in `folder` unless a finished run has the same settings."""
        name, weights = self.names.teacher[number], self.names.weights_of_teachers[number]
        options = self.config.train.stretched(self.names.teacher_epochs)
        options = replace(options, seed=options.seed + number)  # equal teachers that start alike would stay equal
        config = self._alone(name, weights, options, folder)
        folders = [self.out / folder, *sorted(self.out.parent.glob("*/teacher*"))]
        data = describe(self.train_loader)
        found = distributed.from_rank_zero(checkpoint.find_finished, folders, flat(config), data, defaults("ce"))
        origin = f" from {weights}" if weights else ""
        if found:
            log_rank0(f"teacher {name}: trained before{origin} with these settings, taken from {found.parent}")
            return found
        work = f"fine-tuning it{origin}, {self.names.teacher_epochs} epochs" if weights else "training it first"
        log_rank0(f"teacher {name}: {work}")
        return self._fit(config, teacher).report.out / "student.safetensors"

    def _alone(self, name: str, weights: str, options: TrainOptions, folder: str) -> Config:
        """The configuration of a training with the labels alone, in a folder below this job's."""
        content = distributed.from_rank_zero(checkpoint.sha256_of, Path(weights)) if weights else ""
        return replace(
            self.config,
            run=RunOptions(method="ce"),
            networks=NetworkOptions(student=name, student_weights=weights, student_sha256=content),
            method=NoOptions(),
            train=replace(options, out=str(self.out / folder), teacher_form="auto"),  # it has no teacher
        )

    def _fit(
        self,
        config: Config,
        student: nn.Module,
        teacher: nn.Module | None = None,
        peers: Sequence[nn.Module] = (),
        cache: TeacherCache | None = None,
    ) -> Trainer:
        self.train_loader.load_state_dict(self.first_epoch)
        if isinstance(self.train_loader, EpochLoader):
            self.train_loader.stretch(config.train.epochs)
        torch.manual_seed(config.train.seed)  # so that a method's own layers do not depend on earlier trainings
        method = find_method(config.run.method)(student, teacher, config.method, peers)
        if config.data.unlabelled:
            method.allow_unlabelled()
        options = replace(config.train, resume=True)  # continue whatever run is in the job's folder
        trainer = Trainer(method, self.train_loader, self.val_loader, options, flat(config), cache)
        trainer.fit()
        return trainer

    def _add_row(self, label: str, name: str, net: nn.Module) -> float:
        net.to(self.device).to(memory_format=self.config.train.memory_format)
        top1 = evaluate(net, self.val_loader, self.precision)["top1"]
        rate = speed(net, self.val_loader, self.precision)
        parameters = sum(p.numel() for p in net.parameters())
        self.rows.append([label, name, f"{top1:.2f}", f"{parameters:,}", f"{rate:,.0f}"])
        return top1


def _check_options(kind: type[Method], config: Config) -> None:
    """Raise UserError if the options need a package that is not installed, or do not fit the method or the batch."""
    check_networks(kind, config)
    if config.train.tensorboard:
        board_class()
    if config.train.opt in APEX:
        apex_optimizers()
    parts, images = config.train.grad_accum, config.data.batch_size
    if images < 2 * parts:
        most = images // 2
        raise UserError(f"--grad-accum {parts}: a batch of {images} has {most} parts at most, of 2 images or more")
