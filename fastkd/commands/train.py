"""`fastkd train`: the data, the teacher, the student alone, the student distilled, the table."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import yaml
from torch import nn

from .. import distributed
from ..config import Config, defaults, flat, parse
from ..data.base import EpochLoader, describe
from ..engine.backends import backends, fix_workspace
from ..engine.finite import check_network
from ..errors import UserError, count_of
from ..evaluate import evaluate, speed
from ..methods import find_method
from ..methods.frozen import AbsentTeacher
from ..models import load_weights
from ..progress import Bar, Counter
from ..report import log_rank0, set_output, show_table
from ..run.folder import EXTENDABLE, find_finished, has_run
from ..signals import names_the_command
from ..teacher_cache import TeacherCache
from ..train import Trainer
from .job import Job, weights_problem

COLUMNS = ["", "network", "top-1 %", "parameters", "inference img/s"]


def run(arguments: list[str]) -> None:
    """The command: parse the options, then print the configuration or train.

    Checks come before the first file is written. A signal after that raises Stopped with the command that goes on.
    """
    notes: list[str] = []  # logged once the process group tells which process prints
    with names_the_command(distributed.command("train", *arguments), "before the training began"):
        config = parse(arguments, notes.append)
        if config.run.print_config:
            print(*(f"# {note}\n" for note in notes), yaml.safe_dump(flat(config), sort_keys=False), sep="", end="")
            return
        set_output(config.run.quiet, config.run.verbose)
        fix_workspace(config.train.deterministic)
        job = Job(config)
        for note in notes:
            log_rank0(note)
        job.claim()
    short = ["--out", str(job.out), "--resume"]
    again = distributed.command("train", *(arguments if config.train.extend else short))
    with names_the_command(again), backends(job.device, config.train.deterministic):
        Trainings(job).work()


def hint_of_finished(bar: Bar) -> str:
    """How a run goes on that had all of its epochs when it was resumed; else ""."""
    if bar.first < bar.total:
        return ""
    return f"the run had all of its {count_of(bar.epochs, 'epoch')}; --resume --extend --epochs N goes on for more"


def hint_of_best(history: Sequence[dict]) -> str:
    """Where the weights of the best epoch are, if that is not the last one; else ""."""
    best = max(history, key=lambda row: row["top1"])
    if best["top1"] <= history[-1]["top1"]:
        return ""
    return (
        f"the table has the student after the last epoch; best.pt has epoch {best['epoch']}, top-1 {best['top1']:.2f} %"
    )


def hint_of_teacher(rows: Sequence[Sequence[str]]) -> str:
    """What to do if the best teacher of the table is worse than the student alone; "" if it is not, or not known."""
    taught = [float(row[2]) for row in rows if row[0].startswith("teacher")]
    alone = [float(row[2]) for row in rows if row[0] == "student alone"]
    if not (taught and alone) or max(taught) >= alone[0]:
        return ""
    return (
        f"hint: the teacher (top-1 {max(taught):.2f} %) is worse than the student that was trained alone "
        f"({alone[0]:.2f} %): take a stronger teacher, trained weights (--teacher-weights), or more --teacher-epochs"
    )


class Trainings:
    """The trainings of a job that has its folder: the teachers, the student alone, the student."""

    def __init__(self, job: Job):
        self.job, self.names, self.config, self.cache = job, job.names, job.config, job.cache
        self.rows: list[list[str]] = []
        self.alone: list[dict] = []  # the history of the student alone
        self.trained: list[Path] = []  # the weights of the teachers that were trained, or were found

    def work(self) -> None:
        """Train what needs training, the student last, and show the table."""
        for number, teacher in enumerate(self.job.teachers):
            self.prepare_teacher(number, teacher)
        if self.cache and self.names.teacher_epochs:
            self.cache = self.job.open_cache(tuple(map(str, self.trained)))
        if isinstance(self.job.teacher, AbsentTeacher):
            log_rank0(f"teacher {' '.join(self.names.teacher)}: its logits are in {self.names.teacher_cache}")
        if self.job.teacher is not None and len(self.job.teachers) > 1:
            self._add_row("teachers' mean", " ".join(self.names.teacher), self.job.teacher, teaches=True)
        name, method = self.names.student, self.config.run.method
        if self.names.baseline and method != "ce":
            log_rank0(f"student {name}: alone, for comparison")
            self.job.check_state()
            net = self.job.maker.student()
            trainer = self._fit(
                self.job.alone(name, self.names.student_weights, self.config.train, "alone", self.names.model_kwargs),
                net,
            )
            self.alone = trainer.history
            self._add_row("student alone", name, trainer.network)
        log_rank0(f"student {name}: {method}" + (f" from {', '.join(self.names.teacher)}" if self.job.teacher else ""))
        trainer = self._fit(self.config, self.job.student, self.job.teacher, self.job.peers, self.cache)
        for label, net in trainer.networks.items():
            self._add_row(f"{label.replace('_', ' ')}, {method}", trainer.report.models.get(label, ""), net)
        show_table(COLUMNS, self.rows, numbers=3)
        for hint in (hint_of_finished(trainer.bar), hint_of_teacher(self.rows), hint_of_best(trainer.history)):
            if hint:
                log_rank0(hint)
        if trainer.report.page:
            trainer.report.page.add_table(COLUMNS, self.rows, self.alone)
        log_rank0(f"everything is in {self.job.out}")

    def prepare_teacher(self, number: int, teacher: nn.Module) -> None:
        """Train or fine-tune teacher `number` (from 0) if --teacher-epochs says so, and log its accuracy.

        Its accuracy near chance is a warning.
        """
        name = self.names.teacher[number]
        folder = "teacher" + (str(number + 1) if number else "")
        if self.names.teacher_epochs:
            self.trained.append(self._trained_teacher(number, teacher, folder))
            load_weights(teacher, self.trained[-1])
        check_network(f"the teacher {name}", teacher)
        top1 = self._add_row(folder.replace("teacher", "teacher ").strip(), name, teacher, teaches=True)
        chance = 100 / len(self.job.val_loader.classes)
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
        config = self.job.alone(name, weights, self.job.teacher_options(number), folder, self.names.teacher_kwargs)
        if self.names.teacher_run:
            found: Path | None = self.job.named_teacher(number, teacher)
        else:
            found = distributed.from_rank_zero(self._finished_teacher, teacher, folder, flat(config))
        origin = f" from {weights}" if weights else ""
        if found:
            log_rank0(f"teacher {name}: trained before{origin}, taken from {found.parent}")
            return found
        work = (
            f"fine-tuning it{origin}, {count_of(self.names.teacher_epochs, 'epoch')}"
            if weights
            else "training it first"
        )
        log_rank0(f"teacher {name}: {work}")
        return self._fit(config, teacher).report.out / "student.safetensors"

    def _finished_teacher(self, teacher: nn.Module, folder: str, config: dict) -> Path | None:
        """The weights of a finished training with these settings: of this run, else of one beside it.

        The teacher of this run stays as it is if `--extend` has changed the run since.
        """
        own, data = self.job.out / folder, describe(self.job.train_loader)
        more = (data, defaults("ce"), partial(weights_problem, teacher), log_rank0)
        beside = sorted(each for each in self.job.out.parent.glob("*/teacher*") if each != own)
        found = find_finished([own], config, *more, EXTENDABLE if self.config.train.resume else ())
        return found or find_finished(beside, config, *more)

    def _fit(
        self,
        config: Config,
        student: nn.Module,
        teacher: nn.Module | None = None,
        peers: Sequence[nn.Module] = (),
        cache: TeacherCache | None = None,
    ) -> Trainer:
        self.job.train_loader.load_state_dict(self.job.first_epoch)
        if isinstance(self.job.train_loader, EpochLoader):
            self.job.train_loader.stretch(config.train.epochs)
        torch.manual_seed(config.train.seed)  # so that a method's own layers do not depend on earlier trainings
        method = find_method(config.run.method)(student, teacher, config.method, peers)
        if config.data.unlabelled:
            method.allow_unlabelled()
        begun = distributed.from_rank_zero(has_run, Path(config.train.out))  # by this start or an earlier one
        options = replace(config.train, resume=begun, extend=config.train.extend and begun)
        trainer = Trainer(method, self.job.train_loader, self.job.val_loader, options, flat(config), cache)
        trainer.fit()
        return trainer

    def _add_row(self, label: str, name: str, net: nn.Module, teaches: bool = False) -> float:
        """Evaluate a network and add its row; gives its top-1. Raises UserError if what it `teaches` is not finite."""
        net.to(self.job.device).to(memory_format=self.config.train.memory_format)
        loader, interval = self.job.val_loader, self.config.train.log_interval
        with Counter(f"{label} {name}: evaluation", loader, interval) as count:
            scores = evaluate(net, loader, self.job.precision, count)
        if teaches and scores["nonfinite"]:
            raise UserError(
                f"the {label} {name} gives logits that are NaN or infinite for {scores['nonfinite']} of the "
                f"{scores['images']} validation images, although its weights are finite; check its weights, the "
                "normalisation (--teacher-mean, --teacher-std), and --amp-dtype float32"
            )
        top1 = scores["top1"]
        rate = speed(net, self.job.val_loader, self.job.precision)
        parameters = sum(p.numel() for p in net.parameters())
        self.rows.append([label, name, f"{top1:.2f}", f"{parameters:,}", f"{rate:,.0f}"])
        return top1
