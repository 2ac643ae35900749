"""The loop: loader -> mixup -> step, then evaluation, checkpoint and report.

result = Trainer(KD(student, teacher), train_loader, val_loader, TrainOptions(epochs=10)).fit()
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from . import distributed, weights_file
from .callbacks import check_callbacks
from .data.adapter import adapt
from .data.base import (
    EpochLoader,
    Loader,
    check_count,
    check_loaders,
    continued,
    describe,
    first_images,
    place_of,
    rewound,
    samples_of,
    state_at,
)
from .data.train_size import batches_of_all_sizes
from .engine import Schedule, Step, TrainOptions, graphed
from .engine.backends import backends
from .engine.ema import warms_up
from .engine.labels import LabelCheck
from .engine.launch import Runner, check_method, compiles, uses_graphs
from .engine.mixup import Mixup
from .engine.teacher_forms import teacher_form
from .engine.trial import try_step
from .evaluate import Batches, evaluate_networks
from .methods.base import Method
from .methods.frozen import is_absent
from .progress import Bar, track
from .report import Report, log_rank0, titles
from .run.checkpoint import Result, Writer
from .run.diverged import Watch
from .run.extend import extension
from .run.folder import new_folder
from .run.known import known_of
from .run.pace import Pace
from .run.phase import KeptPhase
from .run.problems import problem_of
from .run.random_state import KeptRandom, random_state, seed_all
from .run.resume import identity_of, state_to_resume
from .signals import Stopped, stop_on_signals
from .teacher_cache import Lessons, TeacherCache
from .teacher_cache.lessons import check_lessons, same_bits


class Trainer:
    """Trains `method.student` on `train_loader`, and evaluates it on `val_loader` after each epoch.

    `train_loader` follows `fastkd.data.Loader`, or is any iterable of (images, target) with a length, such as a
    DataLoader; `val_loader` is any iterable of them. `classes`: names, where the data set has none. `about`: more for
    config.yaml. `teacher_cache`: the teacher's answers are read from there, or kept there. `callbacks`: see
    callbacks.py. Raises UserError if a loader is empty, `config.out` holds another run, or training diverges.
    """

    def __init__(
        self,
        method: Method,
        train_loader: Loader | Iterable,
        val_loader: Batches,
        config: TrainOptions,
        about: dict | None = None,
        teacher_cache: TeacherCache | None = None,
        *,
        callbacks: Sequence[object] = (),
        classes: Sequence[str] | None = None,
    ):
        check_method(method, config)
        check_callbacks(callbacks)
        self.device = distributed.device_for(config.device, config.peer_timeout)
        form = config.memory_format
        train_loader, val_loader = adapt(train_loader, val_loader, classes, self.device, form, log_rank0)
        batch = check_loaders(train_loader, val_loader, distributed.gather)
        method.set_label_loss(config.loss, config.bce_target_thresh)
        for name, net in method.networks().items():
            weights_file.check_savable(net, name.replace("_", " "))
        self.train_loader, self.val_loader, self.data = train_loader, val_loader, describe(train_loader)
        self.method = method.to(self.device).to(memory_format=form)
        if teacher_cache:
            check_lessons(method, train_loader, teacher_cache, bool(config.mixup or config.cutmix))
        taught = teacher_cache.rows.example(len(batch[0])) if teacher_cache else ()
        about, image = known_of(method, train_loader, batch[0], about or {})
        for note, images in batches_of_all_sizes(train_loader, batch):
            try_step(method, images, train_loader.classes, config, self.device, titles(about), taught, note)
        compiled = compiles(method, config, self.device, config.epochs * len(train_loader), log_rank0)
        flat = uses_graphs(config, self.device)
        warm = warms_up(config.ema_decay, config.epochs * len(train_loader), log_rank0)
        self.step = Step(method, config, self.device, flat=flat, compiled=compiled, ema_warms_up=warm, log=log_rank0)
        self.schedule = Schedule(config, self.step.optimizer)
        self.mixup = Mixup(config.mixup, config.cutmix, config.smoothing, len(train_loader.classes), config.seed)
        is_ours = isinstance(train_loader, EpochLoader)  # its labels are right by construction
        if isinstance(train_loader, EpochLoader) and train_loader.shard.views and self.device.type == "cpu":
            same_bits(method)
        self.lessons = Lessons(teacher_cache, method, self.step.precision.autocast) if teacher_cache else None
        self.labels = None if is_ours else LabelCheck(len(train_loader.classes), self.device, method.ignore_index)
        out = config.out or distributed.from_rank_zero(new_folder, "runs/run")
        self.config = replace(config, out=str(out))
        self.report = Report(self.config, about, self.data, image, callbacks)
        self.writer = Writer(self.report.out, config.keep_checkpoints, log_rank0)
        self.watch = Watch(self.step, self.writer, log_rank0)
        self.epoch = self.done = 0  # epochs, with their evaluation, and steps of the next one
        self.row: dict[str, Any] | None = None  # the figures of an epoch whose steps are done, before its evaluation
        self.history: list[dict[str, Any]] = []
        self.form, self.random = str(config.teacher_form), KeptRandom(self.device)

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
        with self.report, backends(self.device, self.config.deterministic):
            return self._fit()

    def _fit(self) -> Result:
        with stop_on_signals() as self.request:
            self._prepare()
            self._train()
            self.report.finish(self.history, self.networks)
            with self.bar.start_evaluation("report.html", self.val_loader):
                found = self.networks, self.method.teacher, self.val_loader, self.step.precision
                self.report.examine(*found, self._between)
            distributed.barrier()  # every process finds the files
            self._stop_if_asked()  # the job may have further trainings
        return Result(self.history, self.report.out)

    def _prepare(self) -> None:
        """What the method trains before the first epoch, then the state that the run goes on from."""
        seed_all(self.config.seed + distributed.rank())
        tracker = partial(track, interval=self.config.log_interval)
        run = self.step.run_context(len(self.train_loader), self.report.out, tracker, log_rank0)
        saved = partial(KeptPhase, options=self.config, loader=self.train_loader, device=self.device)
        run = replace(run, phase=partial(saved, request=self.request, log=log_rank0))
        teacher = self.method.teacher and self.method.teacher.net
        self.identity = identity_of(teacher, self.train_loader, self.report.options)
        check = partial(problem_of, step=self.step, loader=self.train_loader, epochs=self.config.epochs)
        known = (self.report.out, check, self.identity, self.train_loader, log_rank0, self.config.extend)
        found = state_to_resume(*known) if self.config.resume else None
        self.report.accept()
        with rewound(self.train_loader):
            self.method.prepare(self.train_loader, run)
        if found:
            self._resume(*found)

    def _train(self) -> None:
        images = partial(first_images, self.train_loader)
        asked, cache = str(self.config.teacher_form), self.lessons.cache if self.lessons else None
        wanted = (cache and cache.manifest.how.get("teacher_form")) or self.form
        with teacher_form(self.method, images, wanted, self.step.precision, log_rank0, asked) as self.form:
            if cache and not is_absent(self.method.teacher):
                cache.note_form(self.form)
            self._train_epochs()

    def _train_epochs(self) -> None:
        self.runner: Runner = graphed(self.step, self.config.graph, self.device, log_rank0)
        interval, callbacks = self.config.log_interval, self.report.callbacks
        self.bar = Bar(self.config.epochs, len(self.train_loader), self.steps, interval, callbacks)
        self.pace = Pace(self.config.checkpoint_every, self.request)
        try:
            with self.writer, self.bar:
                while self.epoch < self.config.epochs:
                    if not self.row:
                        self._train_epoch()
                    self._finish_epoch()
        finally:
            summary = self.runner.close()
        if summary:
            log_rank0(summary)

    @property
    def steps(self) -> int:
        """Steps of the run so far."""
        return self.epoch * len(self.train_loader) + self.done

    def _train_epoch(self) -> None:
        """Make the steps of the epoch that are left, and save the state before an evaluation that may fail."""
        seed_all(self.config.seed + 1_000_003 * self.epoch + 10_007 * distributed.rank())
        self.method.train()
        self.bar.start_epoch(self.epoch)
        self.place = place_of(self.train_loader, self.epoch, self.done)
        self.loader_start = self.train_loader.state_dict()
        if self.lessons:
            self.lessons.start(samples_of(self.train_loader, self.place[0], 0, 0, 0)[0])
        batches = continued(self.train_loader, self.done, self.random.restore)
        for images, target in self.bar.wait.batches(batches):
            self.random.restore()  # our loader has drawn what it draws at the start of an epoch
            lr = self._make_step(images, target)
            self.bar.advance(len(images), self.step.meter, lr)
            self._look()
        first = self.epoch * len(self.train_loader)
        check_count(self.done, self.train_loader, self.epoch + 1)
        if self.lessons:
            self.lessons.finish()
        rates = self.method.selection_rates(range(first, first + self.done))
        self.row = {"epoch": self.epoch + 1, "lr": lr, **self.step.meter.read(), **rates, **self.bar.rates()}
        self.step.meter.reset()
        self.row["bad_steps"] = self.watch.finish_epoch(self.done, self.epoch + 1)
        self.step.average_buffers()
        self._save()
        self._stop_if_asked()

    def _make_step(self, images: Tensor, target: Tensor) -> float:
        """One training step; gives its learning rate."""
        number, length = self.steps, len(self.train_loader)
        lr = self.schedule.write(number / length, (number - 1) / length)
        self.method.at_epoch(number / length)
        target = self.labels(target) if self.labels else target
        epoch, first = self.place
        drawn = samples_of(self.train_loader, epoch, first + self.done, len(images), distributed.rank())
        images, target = self.mixup(images, target, *drawn)
        taught = self.lessons(images, drawn[1]) if self.lessons else ()
        if self.step.ema:
            self.step.ema.write(number)
        for plan in self.method.plans(number):
            self.runner(images, target, plan, taught)
            self.watch(self.epoch, self.done, drawn[1])
        self.done += 1
        return lr

    def _look(self) -> None:
        """Save the state if it is time; stop if a signal asks for it. After the last step the epoch's end does both."""
        if any(self.pace(self.steps)) and self.done < len(self.train_loader):
            self._save()
            self._stop_if_asked()

    def _stop_if_asked(self) -> None:
        """At a place that every process comes to: stop if a signal came to any of them."""
        if name := next(filter(None, distributed.gather(self.request.name)), ""):
            self.writer.wait()
            distributed.barrier()  # a process that ends first may make the launcher end the others
            raise Stopped(name, f"after step {self.steps:,} of {self.config.epochs * len(self.train_loader):,}")

    def _between(self) -> bool:
        """Asked after each batch of an evaluation: whether a signal ends it. The state before it is saved."""
        self.bar.advance_evaluation()
        return bool(self.request.name)

    def _finish_epoch(self) -> None:
        """Evaluate, save and report."""
        assert self.row is not None
        self.bar.start_evaluation(f"epoch {self.epoch + 1}/{self.bar.epochs}", self.val_loader, len(self.networks))
        scores = evaluate_networks(self.networks, self.val_loader, self.step.precision, self._between)
        if not scores:
            self._stop_if_asked()
        self.history.append(self.row | scores)
        self.epoch, self.done, self.row = self.epoch + 1, 0, None
        self._save()
        if distributed.rank() == 0:
            self.report.epoch(self.history)

    def _save(self) -> None:
        """Hand the state to the writer. Every process must call it."""
        self.watch.check_state(f"step {self.steps}")
        if self.labels:
            self.labels.check_labels(self.epoch + 1)
        if self.lessons and 0 < self.done < len(self.train_loader):
            self.lessons.flush()
        ranks = distributed.gather(self._own_state())
        if distributed.rank() == 0:
            place = {"epoch": self.epoch, "step": self.done, "row": self.row, "history": self.history, "ranks": ranks}
            named = {"teacher_form": self.form, "student": self.network.state_dict(), "identity": self.identity}
            self.writer.save(place | named | self.step.state_dict())

    def _own_state(self) -> dict[str, Any]:
        """What differs between the processes: the loader, and within an epoch the generators, sums and statistics."""
        if self.done % len(self.train_loader) == 0:
            return {"loader": self.train_loader.state_dict()}
        loader = state_at(self.train_loader, self.loader_start, self.place[1] + self.done)
        return {"loader": loader, "random": random_state(self.device)} | self.step.own_state()

    def _resume(self, state: dict[str, Any], own: dict[str, Any]) -> None:
        self.epoch, self.done, self.row, self.history = (state[name] for name in ("epoch", "step", "row", "history"))
        step, length, epochs, self.form = self.step, len(self.train_loader), self.config.epochs, state["teacher_form"]
        self.done = length if self.row else self.done  # with other processes the epoch had another number of steps
        self.train_loader.load_state_dict(own["loader"])
        step.load_state_dict(state)
        if "random" in own:
            self.random.state = own["random"]
            step.load_own_state(own)
        place = f"step {self.steps:,} of {epochs * length:,}" if self.done else f"epoch {self.epoch} of {epochs}"
        log_rank0(f"resuming {self.report.out} after {place}")
        for line in extension(state["identity"]["options"], self.config, step, self.train_loader, self.steps):
            log_rank0(line)
