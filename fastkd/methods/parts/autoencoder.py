"""The auto-encoder of a teacher's feature maps, whose first half gives the factors of IE-KD and FT.

Maps [N, C, H, W] <-> factors [N, F, H, W], F = C/2 by default. The auto-encoder is trained once per run, before the
first epoch, and kept in the run's folder. All processes get equal weights.

Source: Huang et al., CVPR 2021, arXiv:2107.00181, as in the authors' code; the idea of factors is that of FT (Kim et
al. 2018, arXiv:1802.04977). From the code too: 30 epochs, SGD at 0.1 (momentum 0.9, Nesterov, weight decay 5e-4), L1.
Departures: none known. The learning rate is constant, because no schedule was found in the sources.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from ... import distributed, weights_file
from ...data.base import Loader, continued
from ...errors import UserError, check_number
from ...models.nets.resnet import he_init
from ..base import Method
from ..context import FirstPhase, RunContext, State
from ..frozen import FrozenTeacher

SLOPE = 0.1  # of all leaky ReLUs
ERRORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"l1": F.l1_loss, "l2": F.mse_loss}
Maps = Callable[[int], Iterable[Tensor]]  # maps(step): those of an epoch from a step on, [N, C, H, W], without a graph


class Coder(nn.Sequential):
    """Leaky ReLU, then conv3x3, BN, leaky ReLU three times: [N, cin, H, W] -> [N, cout, H, W].

    Convolutions cin -> cin -> cout -> cout, without bias, from N(0, 2 / (9 * their output channels)).
    """

    def __init__(self, cin: int, cout: int):
        layers: list[nn.Module] = [nn.LeakyReLU(SLOPE)]
        for a, b in ((cin, cin), (cin, cout), (cout, cout)):
            layers += [nn.Conv2d(a, b, 3, 1, 1, bias=False), nn.BatchNorm2d(b), nn.LeakyReLU(SLOPE, inplace=True)]
        super().__init__(*layers)
        he_init(self)


class AutoEncoder(nn.Module):
    """Maps [N, channels, H, W] -> their reconstruction, through a factor [N, factor_channels, H, W]."""

    def __init__(self, channels: int, factor_channels: int):
        super().__init__()
        self.encoder = Coder(channels, factor_channels)
        self.decoder = Coder(factor_channels, channels)

    def forward(self, maps_NCHW: Tensor) -> Tensor:
        return self.decoder(self.encoder(maps_NCHW))


def factor_channels(options: Any, teacher: int) -> int:
    """Those of the factors of a teacher's map with so many channels: --factor-channels, or half of them."""
    return options.factor_channels or teacher // 2


def check_auto_encoder(options: Any) -> None:
    """Raise UserError unless an auto-encoder can be trained with factor_channels, ae_epochs, ae_lr and ae_error."""
    if options.factor_channels < 0:
        raise UserError(
            f"--factor-channels must be 1 or more, or 0 for half of the teacher's, got {options.factor_channels}"
        )
    if options.ae_epochs < 1:
        raise UserError(f"--ae-epochs must be 1 or more, got {options.ae_epochs}")
    check_number("ae_lr", options.ae_lr, above_zero=True)
    if options.ae_error not in ERRORS:
        raise UserError(f"--ae-error must be one of {', '.join(ERRORS)}, got {options.ae_error!r}")


class TeacherEncoder(FrozenTeacher):
    """A frozen Coder of a teacher's last maps: [N, channels, H, W] -> factors [N, factor_channels, H, W]."""

    def __init__(self, channels: int, factor_channels: int):
        super().__init__(Coder(channels, factor_channels))
        self.is_fitted = False

    def fit(self, method: Method, loader: Loader, name: str, run: RunContext) -> None:
        """`fit_encoder` on the maps of the method's teacher, with the options of the method."""
        teacher = method.teacher

        def maps(step: int) -> Iterator[Tensor]:
            for images, _ in continued(loader, step):
                with torch.no_grad(), run.autocast():
                    last = method.staged_views[teacher].features(images.to(run.device, non_blocking=True))[1][-1]
                yield last.float() if last.dtype == torch.float16 else last  # see train_auto_encoder

        about = {"teacher": weights_file.fingerprint(teacher.net), "batches": len(loader)}
        if method.options.factor_channels:
            about["factor_channels"] = method.options.factor_channels
        fit_encoder(self.net, maps, method.options, about, name, run)
        self.is_fitted = True

    def forward(self, maps_NCHW: Tensor) -> Tensor:
        if not self.is_fitted:
            raise UserError("the teacher's auto-encoder is not trained yet: call prepare(loader) before the first step")
        return super().forward(maps_NCHW)


def fit_encoder(encoder: nn.Module, maps: Maps, options: Any, about: dict, name: str, run: RunContext) -> None:
    """Train an auto-encoder on `maps` and load its first half into `encoder`, a Coder.

    `options` has ae_epochs, ae_lr and ae_error. The weights are saved as the file `name` in `run.folder`. A later call
    with equal settings loads them instead of training. `about`: further settings of the result, as JSON values. All
    processes end with equal weights; only rank 0 reads and writes the file. UserError if the auto-encoder diverges.
    """
    about = about | {key: getattr(options, key) for key in ("ae_epochs", "ae_lr", "ae_error")} | {"seed": run.seed}
    path = run.folder / name if run.folder else None
    known = distributed.from_rank_zero(_load, encoder, path, about, run.log)
    with run.phase(name.removesuffix(".safetensors"), about) as phase:
        if not known:
            _train(encoder, maps, options, run, phase)
    if dist.is_initialized():
        for tensor in encoder.state_dict().values():
            dist.broadcast(tensor, 0)
    if not all(tensor.isfinite().all() for tensor in encoder.state_dict().values()):
        raise UserError(f"the auto-encoder diverged: its weights are not finite; lower --ae-lr {options.ae_lr:g}")
    if not known and path and distributed.rank() == 0:
        weights_file.save_network(path, encoder, about)
    phase.done()


def _train(encoder: nn.Module, maps: Maps, options: Any, run: RunContext, phase: FirstPhase) -> None:
    convolutions = [module.weight for module in encoder.modules() if isinstance(module, nn.Conv2d)]
    first, last = convolutions[0], convolutions[-1]
    channels_last = first.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    auto_encoder = AutoEncoder(first.shape[1], last.shape[0]).to(run.device, first.dtype).to(memory_format=layout)
    errors = train_auto_encoder(run.parallel(auto_encoder), maps, options, run, phase)
    run.log(f"mean {options.ae_error} error of the auto-encoder: {errors[0]:.4g} at first, {errors[-1]:.4g} at last")
    encoder.load_state_dict(auto_encoder.encoder.state_dict())
    distributed.average_buffers(encoder)


def train_auto_encoder(
    auto_encoder: nn.Module, maps: Maps, options: Any, run: RunContext, phase: FirstPhase | None = None
) -> list[float]:
    """Train in place; returns the mean reconstruction error of each epoch, over all elements of all its maps.

    `auto_encoder`: an `AutoEncoder`, or DDP around one; it ends in train mode, without gradients. `options` has
    ae_epochs, ae_lr and ae_error; the error is in fp32 or fp64. `run` gives device, autocast and progress bar. No step
    synchronises with the device. `phase` keeps the states and gives the one to go on from. Raises UserError for an
    unknown error and for an epoch without maps.
    """
    if options.ae_error not in ERRORS:
        raise UserError(f"error is {options.ae_error!r}: 'l1' (mean absolute) or 'l2' (mean squared)")
    training, phase = _Training(auto_encoder, options, run), phase or FirstPhase()
    auto_encoder.train()
    if kept := phase.kept(auto_encoder.state_dict()):
        training.load(*kept)
    title = f"Training the auto-encoder, --ae-epochs {options.ae_epochs}"
    for epoch in run.track(range(phase.epoch, options.ae_epochs), title):
        phase.begin_epoch()
        for step, batch in enumerate(maps(phase.step), phase.step):
            phase.look(step, training.state)
            training.step(batch, epoch)
        if not training.images[epoch]:
            raise UserError("an epoch of the auto-encoder has no maps: each call must give a new iterator")
        phase.end_epoch()
    return (training.totals / torch.tensor(training.images, device=run.device)).tolist()


class _Training:
    """The steps of an auto-encoder's training, and their state. By epoch: the sum of the errors, and the images."""

    def __init__(self, auto_encoder: nn.Module, options: Any, run: RunContext):
        self.auto_encoder, self.error = auto_encoder, ERRORS[options.ae_error]
        self.optimizer = torch.optim.SGD(
            auto_encoder.parameters(), options.ae_lr, momentum=0.9, weight_decay=5e-4, nesterov=True
        )
        self.optimizer.zero_grad()
        with run.autocast():
            kind = run.device.type
            is_fp16 = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
        self.autocast = nullcontext if is_fp16 else run.autocast  # fp16 would need a gradient scaler
        self.totals = torch.zeros(options.ae_epochs, dtype=torch.float64, device=run.device)
        self.images = [0] * options.ae_epochs
        self.batch_norms = dict(auto_encoder.named_buffers())

    def step(self, batch: Tensor, epoch: int) -> None:
        dtype = torch.promote_types(batch.dtype, torch.float32)
        with self.autocast():
            reconstruction = self.auto_encoder(batch)
        loss = self.error(reconstruction.to(dtype), batch.to(dtype))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.totals[epoch] += loss.detach() * len(batch)
        self.images[epoch] += len(batch)

    def state(self) -> tuple[State, State]:
        """What is equal in all processes, and what each has seen: the statistics, the errors so far."""
        shared = {"network": self.auto_encoder.state_dict(), "optimizer": self.optimizer.state_dict()}
        buffers = {name: buffer.cpu() for name, buffer in self.batch_norms.items()}  # they go to the other processes
        return shared, {"buffers": buffers, "totals": self.totals.cpu(), "images": self.images}

    def load(self, shared: State, own: State) -> None:
        self.auto_encoder.load_state_dict(shared["network"])
        self.optimizer.load_state_dict(shared["optimizer"])
        self.auto_encoder.load_state_dict(own["buffers"], strict=False)
        self.totals.copy_(own["totals"])
        self.images = list(own["images"])


def _load(encoder: nn.Module, path: Path | None, about: dict, log: Callable[[str], None]) -> bool:
    """Load `path` into `encoder` if it was saved with the settings `about`; returns whether it was."""
    if path is None or not path.exists():
        return False
    try:
        kept, weights = weights_file.read_about(path), load_file(path)
    except (UserError, SafetensorError, OSError, ValueError) as problem:
        log(f"{path} cannot be read ({problem}): the auto-encoder is trained again")
        return False
    if other := [key for key in about | kept if kept.get(key) != about.get(key)]:
        log(f"{path} was made with another {', '.join(other)}: the auto-encoder is trained again")
        return False
    log(f"the auto-encoder of this teacher and these settings is loaded from {path}")
    encoder.load_state_dict(weights)
    return True
