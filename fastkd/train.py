"""The loop: loader -> mixup -> step, then evaluation, checkpoint and report.

result = Trainer(KD(student, teacher), train_loader, val_loader, TrainOptions(epochs=10)).fit()
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from . import checkpoint, distributed
from .checkpoint import Result
from .data.base import (
    EpochLoader,
    Loader,
    check_count,
    check_loaders,
    describe,
    first_images,
    input_of,
    place_of,
    rewound,
    samples_of,
)
from .data.train_size import batches_of_all_sizes
from .engine import Schedule, Step, TrainOptions, graphed
from .engine.backends import backends
from .engine.ema import needs_warm_up
from .engine.labels import LabelCheck
from .engine.launch import Runner, check_compile, compiles, uses_graphs
from .engine.mixup import Mixup
from .engine.teacher_forms import check_form, teacher_form
from .engine.trial import try_step
from .evaluate import Batches, evaluate_networks
from .methods.base import Method
from .methods.forwards import Taught
from .methods.frozen import is_absent
from .report import Bar, Report, log_rank0, track
from .teacher_cache import Lessons, TeacherCache
from .teacher_cache.lessons import check_lessons, same_bits


class Trainer:
    """Trains `method.student` on `train_loader`, and evaluates it on `val_loader` after each epoch.

    `train_loader` follows `fastkd.data.Loader`; `val_loader` is any iterable of (images, target). `about` is written to
    config.yaml beside the training options; its "student" is the network's name for `create_model`. `teacher_cache`:
    what the teacher says is read from there, or asked once and kept there. Raises UserError
    if a loader is empty, if `config.out` holds another run, or if training diverges.
    """

    def __init__(
        self,
        method: Method,
        train_loader: Loader,
        val_loader: Batches,
        config: TrainOptions,
        about: dict | None = None,
        teacher_cache: TeacherCache | None = None,
    ):
        self.device = distributed.device_for(config.device)
        batch = check_loaders(train_loader, val_loader, distributed.gather)
        check_form(method, config.teacher_form)
        check_compile(method, config)
        for name, net in method.networks().items():
            checkpoint.check_savable(net, name.replace("_", " "))
        self.train_loader, self.val_loader, self.data = train_loader, val_loader, describe(train_loader)
        self.method = method.to(self.device).to(memory_format=config.memory_format)
        if teacher_cache:
            check_lessons(method, train_loader, teacher_cache, bool(config.mixup or config.cutmix))
        taught = teacher_cache.rows.example(len(batch[0])) if teacher_cache else ()
        for note, images in batches_of_all_sizes(train_loader, batch):
            try_step(method, images, train_loader.classes, config, self.device, titles(about or {}), taught, note)
        out = config.out or distributed.from_rank_zero(checkpoint.new_folder, "runs/run")
        self.config = config = replace(config, out=str(out))
        compiled = compiles(method, config, self.device, config.epochs * len(train_loader), log_rank0)
        flat = uses_graphs(config, self.device)
        self.step = Step(
            method,
            config,
            self.device,
            flat=flat,
            compiled=compiled,
            ema_warms_up=_ema_warms_up(config, config.epochs * len(train_loader)),
            log=log_rank0,
        )
        self.runner: Runner = self.step
        self.schedule = Schedule(config, self.step.optimizer)
        alphas = (config.mixup, config.cutmix, config.smoothing)
        self.mixup = Mixup(*alphas, len(train_loader.classes), config.seed)
        is_ours = isinstance(train_loader, EpochLoader)  # its labels are right by construction
        if isinstance(train_loader, EpochLoader) and train_loader.shard.views and self.device.type == "cpu":
            same_bits(method)
        self.lessons: Lessons | None = None
        if teacher_cache:
            self.lessons = Lessons(teacher_cache, method, self.step.precision.autocast)
        self.labels = None if is_ours else LabelCheck(len(train_loader.classes), self.device, method.ignore_index)
        self.report = Report(config, about or {}, self.data, input_of(train_loader, about or {}))
        self.epoch, self.form = 0, str(config.teacher_form)
        self.history: list[dict[str, Any]] = []

    @property
    def networks(self) -> dict[str, nn.Module]:
        """What is evaluated and saved, the student first: the networks, or with EMA the averages of their weights."""
        return self.step.networks()

    @property
    def network(self) -> nn.Module:
        """The student, or with EMA the average of its weights."""
        return self.networks["student"]

    def fit(self) -> Result:
        """Train to the last epoch, and write the files of the run."""
        with backends(self.device):
            return self._fit()

    def _fit(self) -> Result:
        torch.manual_seed(self.config.seed + distributed.rank())
        run = self.step.run_context(len(self.train_loader), self.report.out, track, log_rank0)
        with rewound(self.train_loader):
            self.method.prepare(self.train_loader, run)
        if self.config.resume:
            self._resume()
        images = partial(first_images, self.train_loader)
        asked, cache = str(self.config.teacher_form), self.lessons.cache if self.lessons else None
        wanted = (cache and cache.manifest.how.get("teacher_form")) or self.form
        with teacher_form(self.method, images, wanted, self.step.precision, log_rank0, asked) as self.form:
            if cache and not is_absent(self.method.teacher):
                cache.note_form(self.form)
            self._train()
        self.report.finish(self.history, self.networks)
        distributed.barrier()  # every process finds the files
        return Result(self.history, self.report.out)

    def _train(self) -> None:
        self.runner = graphed(self.step, self.config.graph, self.device, log_rank0)
        bar = Bar(self.config.epochs, self.epoch, len(self.train_loader))
        try:
            with bar.progress:
                while self.epoch < self.config.epochs:
                    self._finish_epoch(self._train_epoch(bar))
        finally:
            summary = self.runner.close()
        if summary:
            log_rank0(summary)

    def _train_epoch(self, bar: Bar) -> dict[str, Any]:
        torch.manual_seed(self.config.seed + 1_000_003 * self.epoch + 10_007 * distributed.rank())
        self.method.train()
        bar.start_epoch(self.epoch)
        first = done = self.epoch * len(self.train_loader)  # steps before this epoch, and before the next step
        epoch, place = place_of(self.train_loader, self.epoch)
        lr, taught, lessons = 0.0, Taught(), self.lessons
        if lessons:
            lessons.start(samples_of(self.train_loader, epoch, 0, 0, 0)[0])
        for images, target in bar.wait.batches(self.train_loader):
            lr = self.schedule.write(done / len(self.train_loader), (done - 1) / len(self.train_loader))
            self.method.at_epoch(done / len(self.train_loader))
            target = self.labels(target) if self.labels else target
            drawn = samples_of(self.train_loader, epoch, place + done - first, len(images), distributed.rank())
            images, target = self.mixup(images, target, *drawn)
            taught = lessons(images, drawn[1]) if lessons else ()
            if self.step.ema:
                self.step.ema.write(done)
            for plan in self.method.plans(done):
                self.runner(images, target, plan, taught)
            bar.advance(len(images), self.step.meter)
            done += 1
        check_count(done - first, self.train_loader, self.epoch + 1)
        if lessons:
            lessons.finish()
        if self.labels:
            self.labels.check_labels(self.epoch + 1)
        rates = self.method.selection_rates(range(first, done))
        row = {"epoch": self.epoch + 1, "lr": lr, **self.step.meter.read(), **rates, **bar.rates()}
        self.step.meter.reset()
        self.step.check_finite(done - first, self.epoch + 1, log_rank0)
        return row

    def _finish_epoch(self, row: dict[str, Any]) -> None:
        """Evaluate, save and report."""
        self.step.average_buffers()
        self.history.append(row | evaluate_networks(self.networks, self.val_loader, self.step.precision))
        self.epoch += 1
        loaders = distributed.gather(self.train_loader.state_dict())
        if distributed.rank() == 0:
            state = {"epoch": self.epoch, "history": self.history, "data": self.data, "loaders": loaders}
            state |= {"teacher_form": self.form, "student": self.network.state_dict()}
            checkpoint.save_run(self.report.out, state | self.step.state_dict())
            self.report.epoch(self.history)

    def _resume(self) -> None:
        state = checkpoint.load_run(self.report.out, self.data, distributed.world_size())
        if state is not None:
            self.epoch, self.history, self.form = state["epoch"], state["history"], state["teacher_form"]
            self.train_loader.load_state_dict(state["loaders"][distributed.rank()])
            self.step.load_state_dict(state)
            log_rank0(f"resuming {self.report.out} after epoch {self.epoch} of {self.config.epochs}")


def titles(about: Mapping[str, Any]) -> dict[str, str]:
    """By role, what errors call a network, such as {"student": "the student resnet8"}."""
    peers = {f"peer{number}": f"the peer {name}" for number, name in enumerate(about.get("peers", ()), 1)}
    named = {role: about[role] for role in ("student", "teacher") if about.get(role)}
    lists = {role: [name] if isinstance(name, str) else name for role, name in named.items()}
    return {role: f"the {role} {' '.join(names)}" for role, names in lists.items()} | peers


def _ema_warms_up(config: TrainOptions, steps: int) -> bool:
    """Whether the decay of the weights' average has to rise in a run of so many steps; logs it if so."""
    decay = config.ema_decay
    if not decay or not needs_warm_up(decay, steps):
        return False
    log_rank0(
        f"--ema-decay {decay:g}: {steps:,} steps would leave {100 * decay**steps:.2g} % of the initial weights in the "
        "average; so the decay rises from 0, as in timm's --model-ema-warmup"
    )
    return True
