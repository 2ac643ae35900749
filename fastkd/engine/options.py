"""The options of training that every method shares."""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import torch

from ..errors import UserError, check_number
from ..option_kinds import check_kinds
from .timm_optim import APEX_NAMES, check_name


@dataclass(frozen=True)
class TrainOptions:
    """Training."""

    epochs: int = 100
    """Passes over the training images; a recipe's warm-up and drops are stretched to them."""
    lr: float = 0.1
    """Learning rate after the warm-up. It is used as given: scale it with batch size times processes yourself."""
    opt: str = "sgd"
    """Optimizer: sgd, nesterov, adam, adamw (torch's fused ones, which CUDA graphs hold); fusedsgd, fusedlamb,
    fusedadam of NVIDIA apex, if it is installed; or any of timm's by name, such as lamb, without CUDA graphs."""
    momentum: float = 0.9
    """Momentum of SGD; from 0 to below 1."""
    weight_decay: float = 1e-4
    """Weight decay on all weights (decoupled in adamw)."""
    layer_decay: float = 0.0
    """Factor on the learning rate from each layer of the student to the one before it, such as 0.75; 0: off. For
    networks of timm that name their layers."""
    decay_norms: bool = True
    """Apply weight decay to norms and biases too, as the papers do. Without it, weights that a network of timm names
    (no_weight_decay), such as position embeddings, have none either, as in timm."""
    sched: Literal["cosine", "step", "multistep", "constant"] = "cosine"
    """How the learning rate falls."""
    warmup_epochs: float = 0.0
    """Epochs of linear rise from warmup-lr to lr."""
    warmup_lr: float = 0.0
    """Learning rate at the first step of the warm-up."""
    min_lr: float = 0.0
    """Learning rate at the end of the cosine."""
    decay_epochs: float = 30.0
    """Epochs between the drops of --sched step."""
    decay_milestones: tuple[float, ...] = ()
    """Epochs of the drops of --sched multistep."""
    decay_rate: float = 0.1
    """Factor on the learning rate at a drop."""
    reset_momentum: bool = False
    """Set the momentum of SGD to zero at each drop of the learning rate, as code does that makes a new optimizer."""
    clip_grad: float = 0.0
    """Largest norm of the whole gradient; 0 turns clipping off."""
    max_bad_steps: int = 25
    """Stop the run after so many steps in a row whose loss or gradient is not finite. Each is skipped. With float16
    some 20 at the start are normal."""
    grad_accum: int = 1
    """Number of micro-batches that a batch is split into to save memory, of at least 2 images each. There is one update
    for the whole batch."""
    grad_checkpointing: bool = False
    """Keep only the inputs of the blocks of the networks that are trained, and compute the rest again in the backward
    pass: less memory, about a third more time, equal results. For networks of blocks, such as ResNets and ViTs."""
    smoothing: float = 0.0
    """Label smoothing; from 0 to below 1."""
    loss: Literal["ce", "bce"] = "ce"
    """Loss of the labels: cross-entropy, or the binary cross-entropy of every class, as timm's --bce-loss. The weight
    of the method's `ce` term scales it."""
    bce_target_thresh: float = -1.0
    """With --loss bce: a target above it becomes 1, any other 0, after mixup and smoothing; timm's recipes have 0.2;
    below 0: off."""
    mixup: float = 0.0
    """Alpha of mixup; 0 is off. Images are mixed in pairs, each in its own proportion. The teacher sees the mixed image
    too."""
    cutmix: float = 0.0
    """Alpha of CutMix; 0 is off. With mixup as well, each image draws one of the two."""
    ema_decay: float = 0.0
    """Decay per step of the weights' moving average; 0 is off. The average is evaluated and saved as the student."""
    amp_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Data type of the forward passes: auto is bfloat16 on CUDA, float32 on the CPU."""
    teacher_form: Literal["auto", "plain", "folded", "fused", "compiled"] = "auto"
    """How the frozen teacher runs. plain: as it is; folded: BatchNorm folded into the convolutions; fused: ReLU and
    residual addition too; compiled: folded, by torch.compile. auto takes the fastest on CUDA, and on the CPU the plain
    one, whose results have the same bits in every run."""
    graph: Literal["auto", "on", "off"] = "auto"
    """Replay steps as CUDA graphs. auto does so on a GPU, but not with apex's optimizers or networks that ask the GPU
    for values; it prints the reason."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile forward passes and losses by torch.compile, inside graphs too; once for each image size and path. auto
    does so on a GPU in runs of 100,000 steps or more per process, and continues uncompiled if the compiler fails."""
    sync_bn: bool = False
    """Let BatchNorm use the images of all processes (torchrun), so that their number changes nothing. Two messages a
    layer and step; steps are then neither captured as graphs nor compiled."""
    deterministic: bool = False
    """Use only algorithms whose results have the same bits in every run on the same machine. On a GPU it costs speed:
    no search for the fastest convolution, and the teacher runs as it is."""
    channels_last: bool = True
    """Use the channels-last memory layout, which is the fast one for convolutions on GPUs."""
    device: str = "auto"
    """cuda, cpu, or auto: CUDA when there is one."""
    seed: int = 0
    """Seed of weights, order and augmentation."""
    out: str = ""
    """Folder of the run. By default a new folder below runs/."""
    resume: bool = False
    """Continue the run in --out from its newest saved state. The result is that of an uninterrupted run.
    `--resume auto` starts the run if --out holds none: one command for torchrun's restarts, SLURM, Kubernetes."""
    extend: bool = False
    """With --resume: go on with another --epochs, --lr, schedule, --weight-decay, --clip-grad or --smoothing."""
    peer_timeout: int = 1800
    """Under torchrun: seconds to wait for another process, before the run ends with an error."""
    checkpoint_every: str = "10m"
    """How often the state is saved within an epoch: a number of steps (500), a time (90s, 10m, 2h), or off. It is saved
    after each epoch too. A thread writes it while the steps go on."""
    keep_checkpoints: int = 2
    """The newest states that are kept, as last.pt, last-1.pt, ...; a damaged one is passed over at a resume. Each is
    about three times as large as the student, with its momentum."""
    log: tuple[Literal["csv", "tensorboard", "wandb", "mlflow"], ...] = ()
    """Where the rows of the epochs go too, such as tensorboard wandb. history.csv, which is csv, is always written."""
    log_interval: float = 30.0
    """Seconds between the lines that say how far the run is, where the output is no terminal."""
    report: bool = True
    """Write report.html into the run folder. Its images take a pass over the validation set at the end of the run, with
    the student and the teacher."""

    def __post_init__(self) -> None:
        if type(self.checkpoint_every) is int:  # a number of steps
            object.__setattr__(self, "checkpoint_every", str(self.checkpoint_every))
        check_kinds(self)
        check_name(self.opt)
        wanted = {
            "epochs": (self.epochs >= 1, "1 or more"),
            "keep_checkpoints": (self.keep_checkpoints >= 1, "1 or more"),
            "seed": (0 <= self.seed < 2**32, ">= 0 and below 2**32"),
            "peer_timeout": (self.peer_timeout >= 1, "1 or more"),
            "grad_accum": (self.grad_accum >= 1, "1 or more"),
            "max_bad_steps": (self.max_bad_steps >= 1, "1 or more"),
            "smoothing": (0 <= self.smoothing < 1, "in [0, 1)"),
            "ema_decay": (0 <= self.ema_decay < 1, "in [0, 1)"),
            "momentum": (0 <= self.momentum < 1, "in [0, 1)"),
            "warmup_epochs": (0 <= self.warmup_epochs < self.epochs, f"from 0 to below --epochs {self.epochs}"),
            "layer_decay": (0 <= self.layer_decay <= 1, "in [0, 1]"),
            "bce_target_thresh": (self.bce_target_thresh < 1, "below 1"),
            "decay_epochs": (self.decay_epochs > 0, "above 0"),
        }
        for name, (holds, words) in wanted.items():
            if not holds:
                raise UserError(f"--{name.replace('_', '-')} must be {words}, got {getattr(self, name)}")
        for name in ("lr", "log_interval"):
            check_number(name, getattr(self, name), above_zero=True)
        if self.extend and not self.resume:
            raise UserError("--extend goes on with a run under other options: give --out FOLDER --resume too")
        for name in ("weight_decay", "warmup_lr", "min_lr", "decay_rate", "clip_grad", "mixup", "cutmix"):
            check_number(name, getattr(self, name))
        if self.bce_target_thresh >= 0 and self.loss != "bce":
            raise UserError(f"--bce-target-thresh {self.bce_target_thresh:g} is for --loss bce, got --loss {self.loss}")
        if self.opt == "nesterov" and not self.momentum:
            raise UserError(f"--opt nesterov needs --momentum above 0, got {self.momentum}")
        if self.opt in APEX_NAMES and self.amp_dtype == "float16":
            raise UserError(
                f"--opt {self.opt} --amp-dtype float16: float16 skips the steps that overflow, and apex's optimizers "
                "cannot skip one without waiting for the GPU; use --amp-dtype bfloat16, or --opt sgd, nesterov or adamw"
            )
        if self.sched == "multistep":
            self._check_milestones()
        if self.reset_momentum and not (self.opt in ("sgd", "nesterov") and self.momentum and self.drops):
            raise UserError(
                f"--reset-momentum sets the momentum of SGD to zero at each drop, with --sched step or multistep, got "
                f"--opt {self.opt} --momentum {self.momentum:g} --sched {self.sched} --epochs {self.epochs}; "
                "--no-reset-momentum turns it off"
            )

        self._check_sync_bn()

    def _check_sync_bn(self) -> None:
        """What synchronised statistics exclude: messages within the forward pass are not compiled or sent again, and
        micro-batches could differ in number between processes."""
        for name, usual in (("grad_accum", 1), ("compile", "auto"), ("grad_checkpointing", False)):
            value = getattr(self, name)
            if self.sync_bn and value not in (usual, "off"):
                option = f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
                raise UserError(f"--sync-bn and {option} exclude each other: drop one")

    def _check_milestones(self) -> None:
        if not self.decay_milestones:
            raise UserError("--sched multistep needs --decay-milestones, such as --decay-milestones 150 180 210")
        points = (0, *self.decay_milestones, self.epochs)
        if not all(earlier < later for earlier, later in pairwise(points)):
            raise UserError(
                f"--decay-milestones must rise, from above 0 to below --epochs {self.epochs}, "
                f"got {' '.join(f'{point:g}' for point in self.decay_milestones)}"
            )

    def stretched(self, epochs: int) -> "TrainOptions":
        """The same schedule over another number of epochs."""
        factor = epochs / self.epochs
        return replace(
            self,
            epochs=epochs,
            warmup_epochs=self.warmup_epochs * factor,
            decay_epochs=self.decay_epochs * (factor if self.sched == "step" else 1),
            decay_milestones=tuple(milestone * factor for milestone in self.decay_milestones),
        )

    @property
    def drops(self) -> tuple[float, ...]:
        """Epochs at which the learning rate drops; none where it falls steadily or not at all."""
        if self.sched == "step":
            return tuple(n * self.decay_epochs for n in range(1, -int(-self.epochs // self.decay_epochs)))
        return self.decay_milestones if self.sched == "multistep" else ()

    @property
    def memory_format(self) -> torch.memory_format:
        """torch's memory format for the networks and images."""
        return torch.channels_last if self.channels_last else torch.contiguous_format
