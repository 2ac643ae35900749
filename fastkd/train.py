"""The loop: loader -> mixup -> step, then evaluation, checkpoint and report. Everything else is one call away.

result = Trainer(KD(student, teacher), train_loader, val_loader, TrainOptions(epochs=10)).fit()
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from . import checkpoint, distributed
from .engine import Schedule, Step, TrainOptions, choose_form, graphed
from .engine.launch import check_compile
from .engine.mixup import Mixup
from .engine.precision import cast_frozen
from .engine.teacher import check_form
from .errors import UserError
from .evaluate import evaluate
from .methods.base import Method, RunContext
from .report import Bar, Report, log_rank0, track


@dataclass(frozen=True)
class Result:
    """What a run leaves: one row per epoch, and where its files are."""

    history: list[dict]
    out: Path

    @property
    def top1(self) -> float:
        """Accuracy of the saved student (the last epoch's), in per cent."""
        return self.history[-1]["top1"]

    @property
    def student(self) -> Path:
        """Its weights, safetensors."""
        return self.out / "student.safetensors"


class Trainer:
    """Trains `method.student` on `train_loader`, evaluates it on `val_loader` after each epoch.

    The loaders follow `fastkd.data.Loader`. `about` is recorded in config.yaml beside the training options; its
    "student" names the network for `create_model`. Raises UserError when `config.out` holds another run, or when
    training diverges.
    """

    def __init__(self, method: Method, train_loader, val_loader, config: TrainOptions, about: dict | None = None):
        _check_loaders(train_loader, val_loader)
        check_form(method, config.teacher_form)
        check_compile(method, config)
        self.device = distributed.device_for(config.device)
        out = config.out or distributed.from_rank_zero(checkpoint.new_folder, "runs/run")
        self.config = replace(config, out=str(out))
        self.train_loader, self.val_loader = train_loader, val_loader
        self.method = method.to(self.device, memory_format=config.memory_format)
        self.step = Step(method, config, self.device)
        self.schedule = Schedule(config, self.step.optimizer)
        alphas = (config.mixup, config.cutmix, config.smoothing)
        self.mixup = Mixup(*alphas, len(train_loader.classes), config.seed, distributed.rank())
        self.data = describe(train_loader)
        self.report = Report(self.config, about or {}, self.data)
        self.epoch, self.history, self.form = 0, [], config.teacher_form
        self._put_back = lambda: None  # gives the teacher its own weights back

    @property
    def networks(self) -> dict[str, torch.nn.Module]:
        """What is evaluated and saved, the student first: the networks, or the averages of their weights."""
        return dict(self.step.ema.net) if self.step.ema else self.method.networks()

    @property
    def network(self) -> torch.nn.Module:
        """The student, or the average of its weights."""
        return self.networks["student"]

    def fit(self) -> Result:
        self._prepare()
        self._resume()
        try:
            self._speed_up()
            self._train()
        finally:
            end = self.step.close()
            self._put_back()
        if end:
            log_rank0(end)
        self.report.finish(self.history, self.networks)
        distributed.barrier()  # the files are there for every process
        return Result(self.history, Path(self.config.out))

    def _train(self) -> None:
        bar = Bar(self.config.epochs, self.epoch, len(self.train_loader))
        with bar.progress:
            while self.epoch < self.config.epochs:
                torch.manual_seed(self.config.seed + 1_000_003 * self.epoch + 10_007 * distributed.rank())
                row = {"epoch": self.epoch + 1, **self._train_epoch(bar), **self._evaluate()}
                self._finish_epoch(row)

    def _prepare(self) -> None:
        """The method's own work, on batches that the epochs then see as if it had not been."""
        options, position = self.config, self.train_loader.state_dict()
        torch.manual_seed(options.seed + distributed.rank())
        self.method.prepare(
            self.train_loader,
            RunContext(
                epochs=options.epochs,
                steps_per_epoch=len(self.train_loader),
                drops=options.drops,
                seed=options.seed,
                device=self.device,
                folder=self.report.out,
                autocast=self.step.precision.autocast,
                parallel=partial(distributed.parallel, device=self.device),
                track=track,
                log=log_rank0,
            ),
        )
        self.train_loader.load_state_dict(position)

    def _speed_up(self) -> None:
        """The teacher in its chosen form, the same in every process and after a resume; steps as graphs."""
        if self.form == "auto" and self.device.type != "cuda":
            self.form = "plain"
        if self.form != "plain" or self.step.precision.dtype != torch.float32:
            position = self.train_loader.state_dict()
            images, _ = next(iter(self.train_loader))
            self.train_loader.load_state_dict(position)
            self._choose_form(images)
            self._put_back = cast_frozen(self.method, images, self.step.precision)
        self.step = graphed(self.step, self.config.graph, self.device, distributed.world_size(), log_rank0)

    def _choose_form(self, images: torch.Tensor) -> None:
        if self.form != "plain":
            choose = partial(choose_form, self.method, images, precision=self.step.precision, log=log_rank0)
            self.form = distributed.from_rank_zero(choose, self.form)
            if distributed.rank():
                choose(self.form)

    def _train_epoch(self, bar: Bar) -> dict[str, float]:
        self.method.train()
        bar.start_epoch(self.epoch)
        for number, (images, target) in enumerate(self.train_loader):
            done = self.epoch * len(self.train_loader) + number  # steps before this one, over the whole run
            lr = self.schedule.write(done / len(self.train_loader))
            images, target = self.mixup(images, target, done)
            for plan in self.method.plans(done):
                self.step(images, target, plan)
            bar.advance(len(images), self.step.meter)
        shares = self.method.selection_rates(range(done + 1 - len(self.train_loader), done + 1))
        row = {"lr": lr, **self.step.meter.read(), **shares, **bar.rates()}
        self.step.meter.reset()
        self._stop_if_diverged()
        return row

    def _evaluate(self) -> dict[str, float]:
        distributed.average_buffers(self.method)
        if self.step.ema:
            distributed.average_buffers(self.step.ema.net)
        row = {}
        for name, net in self.networks.items():
            scores = evaluate(net, self.val_loader, self.step.precision)
            prefix = "" if name == "student" else f"{name}_"
            row |= {
                f"{prefix}top1": scores["top1"],
                f"{prefix}top5": scores["top5"],
                f"{prefix}val_loss": scores["loss"],
            }
        return row

    def _finish_epoch(self, row: dict) -> None:
        self.epoch += 1
        self.history.append(row)
        loaders = distributed.gather(self.train_loader.state_dict())
        if distributed.rank() == 0:
            progress = {"epoch": self.epoch, "history": self.history, "data": self.data, "loaders": loaders}
            progress["teacher_form"] = self.form
            state = progress | self.step.state_dict() | {"student": self.network.state_dict()}
            best = row["top1"] >= max(past["top1"] for past in self.history)
            checkpoint.save([self.report.out / name for name in [*(["best.pt"] if best else []), "last.pt"]], state)
            self.report.epoch(self.history)

    def _resume(self) -> bool:
        last = Path(self.config.out) / "last.pt"
        if not (self.config.resume and last.exists()):
            return False
        state = checkpoint.load(last)
        self.epoch, self.history, self.form = state["epoch"], state["history"], state["teacher_form"]
        if len(state["loaders"]) != distributed.world_size():
            raise UserError(
                f"{last} was written by {len(state['loaders'])} processes, now there are {distributed.world_size()}; "
                "an exact continuation needs the same number"
            )
        if state["data"] != self.data:
            raise UserError(f"{last} was written on other data: {state['data']}, now {self.data}")
        self.train_loader.load_state_dict(state["loaders"][distributed.rank()])
        self.step.load_state_dict(state)
        log_rank0(f"resuming {self.config.out} after epoch {self.epoch} of {self.config.epochs}")
        return True

    def _stop_if_diverged(self) -> None:
        bad, steps = int(self.step.nonfinite.item()), len(self.train_loader)
        self.step.nonfinite.zero_()
        # fp16 finds its scale by overflowing: some 20 such steps at the start are its routine
        if bad > max(steps / 2, 25 if self.step.precision.scaler.is_enabled() else 0):
            raise UserError(
                f"training diverged: the gradient was not finite in {bad} of {steps} steps of epoch {self.epoch + 1}; "
                f"lower --lr {self.config.lr:g}, or set --clip-grad or --warmup-epochs; "
                f"the last good state is in {self.config.out}"
            )
        if bad:
            log_rank0(f"warning: the gradient was not finite in {bad} of {steps} steps of epoch {self.epoch + 1}")


def _check_loaders(train_loader, val_loader) -> None:
    """Before anything is written. A DataLoader is not enough for training: it cannot go on where it had got to."""
    names = ("__iter__", "__len__", "classes", "samples", "state_dict", "load_state_dict")
    for role, loader, wanted in (("train_loader", train_loader, names), ("val_loader", val_loader, names[:1])):
        missing = [name for name in wanted if not hasattr(loader, name)]
        if missing:
            kind = type(loader).__name__
            raise UserError(f"{role} ({kind}) lacks {', '.join(missing)}; see Loader in fastkd/data/base.py")


def describe(loader) -> dict:
    """What a run must find again when it is resumed."""
    return {"images": loader.samples, "classes": list(loader.classes)}
