"""What the trainings of a command share: data, networks, options, checked before the first file is written."""

import copy
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import nn

from .. import distributed, weights_file
from ..config import Config, RunOptions, defaults, flat
from ..data import create_loaders
from ..data.base import EpochLoader, describe, first_batch, input_of
from ..data.train_size import batches_of_all_sizes
from ..engine import TrainOptions
from ..engine.launch import check_graph, check_method
from ..engine.optim import APEX, apex_optimizers
from ..engine.precision import Precision
from ..engine.timm_optim import check_timm_optimizer, groups_by_layer, is_timms
from ..engine.trial import try_step
from ..errors import UserError, no_folder
from ..files import sha256_of
from ..loggers import check_loggers
from ..methods import find_method
from ..methods.base import Method
from ..methods.context import NoOptions, RunContext
from ..methods.frozen import AbsentTeacher
from ..models import load_weights
from ..models.own_input import InputSpec, OwnInput
from ..network_options import NetworkOptions
from ..report import log_rank0, titles
from ..run.checkpoint import candidates
from ..run.folder import add_missing_options, check_length, claim_folder, misfit, new_folder, write_settings
from ..run.resume import check_newest, identity_of
from ..teacher_cache import TeacherCache
from .cached import check_cached, open_cache, views_of, with_views
from .networks import NetworkMaker, check_networks, teacher_of
from .unlabelled import check_unlabelled


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
        self.device = distributed.device_for(config.train.device, config.train.peer_timeout)
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
        self.cache = self.open_cache(None if names.teacher_epochs else names.weights_of_teachers)
        absent = self.cache is not None and self.cache.covers(views_of(config)) and not names.teacher_epochs
        self.teachers = self.maker.teachers() if kind.needs_teacher and not absent else []
        self.teacher = AbsentTeacher() if absent else teacher_of(self.teachers, config)
        self.peers = self.maker.peers()
        self._check_fit(kind)
        self.out = Path(config.train.out)  # `claim` sets it if it is not given
        if names.teacher_run:
            for number, teacher in enumerate(self.teachers):
                self.named_teacher(number, teacher)

    def open_cache(self, weights: tuple[str, ...] | None) -> TeacherCache | None:
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
        trial.set_label_loss(options.loss, options.bce_target_thresh)
        if isinstance(self.teacher, OwnInput) and any(getattr(each, "swaps_blocks", False) for each in trial.modules()):
            log_rank0("swapped-in blocks get the student's features: the teacher's own images are not for them")
        if options.layer_decay:
            groups_by_layer(trial.param_groups(options.lr), trial.student, options.layer_decay)
        check_method(trial, options)
        check_graph(options.graph, options, self.device)
        trained = dict.fromkeys(self.teachers, "teacher") if self.names.teacher_epochs else {}
        for net, role in (trained | {net: role for role, net in trial.networks().items()}).items():
            weights_file.check_savable(net, role.replace("_", " "))
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
        stem = "runs/" + "-".join(name.replace("/", "_")[:60] for name in names)  # file systems allow 255 bytes
        out = options.out or distributed.from_rank_zero(new_folder, stem)
        self.out = Path(out)
        self.config = replace(self.config, train=replace(options, out=str(out)))
        if options.resume and not candidates(self.out):
            log_rank0(f"--resume: the training of the student has not begun in {out}; what comes before it goes on")
        if distributed.rank() == 0:
            self._claim(flat(self.config))

    def _claim(self, config: dict) -> None:
        """Lock the folder and check what it holds, then complete the options of a run of an older version."""
        options, known = self.config.train, defaults(self.config.run.method)
        claim_folder(self.out, config, options.resume, log_rank0, options.extend, known)
        if options.extend:
            check_length(self.out / "alone", config)
        if options.resume:
            add_missing_options(self.out, known)
            for folder in (*self.out.glob("teacher*"), self.out / "alone"):
                add_missing_options(folder, defaults("ce"))

    def check_state(self) -> None:
        """Raise UserError if the student's newest state is not of this run. The teachers are trained by now.

        The student alone comes next, and would go on under other options even if the student cannot.
        """
        if distributed.rank() == 0 and self.config.train.resume:
            config = flat(self.config)
            identity = identity_of(self.teacher, self.train_loader, config)
            check_newest(self.out, identity, self.config.train.extend)
            write_settings(self.out, config)

    def teacher_options(self, number: int) -> TrainOptions:
        """The options of the training of teacher `number`."""
        options = self.config.train.stretched(self.names.teacher_epochs)
        # equal teachers that start alike would stay equal; the layers of --layer-decay are the student's
        return replace(options, seed=options.seed + number, layer_decay=0.0)

    def named_teacher(self, number: int, teacher: nn.Module) -> Path:
        """The weights of teacher `number` in --teacher-run. Raises UserError if its settings are others."""
        folder = Path(self.names.teacher_run)
        inner = "teacher" + (str(number + 1) if number else "")
        if number or os.path.isdir(folder / inner):
            folder = folder / inner
        name, weights = self.names.teacher[number], self.names.weights_of_teachers[number]
        config = self.alone(name, weights, self.teacher_options(number), inner, self.names.teacher_kwargs)
        if not os.path.isdir(folder):
            raise UserError(f"--teacher-run {self.names.teacher_run}: {no_folder(folder)}; name the folder of a run")
        found = distributed.from_rank_zero(
            misfit,
            *(folder, flat(config), describe(self.train_loader), defaults("ce"), partial(weights_problem, teacher)),
        )
        if found:
            raise UserError(
                f"--teacher-run {self.names.teacher_run}: {folder} is not the finished training of the teacher {name} "
                f"with these settings ({found.reason}): name another run, or take its weights as they are, by "
                "--teacher-weights FILE"
            )
        return folder / "student.safetensors"

    def alone(
        self, name: str, weights: str, options: TrainOptions, folder: str, kwargs: tuple[str, ...] = ()
    ) -> Config:
        """The configuration of a training with the labels alone, in a folder below this job's.

        `kwargs`: arguments of the network's constructor.
        """
        content = distributed.from_rank_zero(sha256_of, Path(weights)) if weights else ""
        return replace(
            self.config,
            run=RunOptions(method="ce"),
            networks=NetworkOptions(name, kwargs, student_weights=weights, student_sha256=content),
            method=NoOptions(),
            train=replace(options, out=str(self.out / folder), teacher_form="auto"),  # it has no teacher
        )


def weights_problem(net: nn.Module, weights: Path) -> str:
    """What is wrong with a weights file for a network like `net`, or "": it must fit, and its numbers be finite."""
    trial = copy.deepcopy(net)
    try:
        load_weights(trial, weights)
    except UserError as error:
        return str(error)
    wrong = [name for name, each in trial.state_dict().items() if not bool(each.isfinite().all())]
    return f"{weights} holds numbers that are not finite, in {', '.join(wrong[:3])}" if wrong else ""


def _check_options(kind: type[Method], config: Config) -> None:
    """Raise UserError if the options need a package that is not installed, or do not fit the method or the batch."""
    check_networks(kind, config)
    check_loggers(config.train.log)
    if config.train.opt in APEX:
        apex_optimizers()
    if is_timms(config.train.opt):
        check_timm_optimizer(config.train)
    parts, images = config.train.grad_accum, config.data.batch_size
    if images < 2 * parts:
        most = images // 2
        raise UserError(f"--grad-accum {parts}: a batch of {images} has {most} parts at most, of 2 images or more")
