"""The encoder of a teacher's factors, for IE-KD and FT: trained once a run, kept in its folder, equal everywhere."""

import hashlib
import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ... import checkpoint, distributed
from ...errors import UserError
from .autoencoder import ERRORS, AutoEncoder, train_auto_encoder


def fingerprint(net: nn.Module) -> str:
    """SHA-256 of a network's weights and statistics; it does not depend on device and memory format."""
    digest = hashlib.sha256()
    for name, tensor in net.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def teacher_maps(view: nn.Module, loader, run) -> Callable[[], Iterable[Tensor]]:
    """What gives one epoch of the last stage's maps of a frozen teacher, seen through `view`."""

    def epoch():
        for images, _ in loader:
            with torch.no_grad(), run.autocast():
                maps = view.features(images.to(run.device, non_blocking=True))[1][-1]
            yield maps.float() if maps.dtype == torch.float16 else maps  # see _train

    return epoch


def check_auto_encoder(options) -> None:
    """UserError unless ae_epochs, ae_lr and ae_error can be trained with."""
    if options.ae_epochs < 1:
        raise UserError(f"--ae-epochs must be 1 or more, got {options.ae_epochs}")
    if not 0 < options.ae_lr < math.inf:
        raise UserError(f"--ae-lr must be a number above 0, got {options.ae_lr}")
    if options.ae_error not in ERRORS:
        raise UserError(f"--ae-error must be one of {', '.join(ERRORS)}, got {options.ae_error!r}")


def fit_encoder(encoder: nn.Module, maps: Callable[[], Iterable[Tensor]], options, about: dict, name: str, run) -> None:
    """Give `encoder`, a Coder, the weights that it gets as the first half of an auto-encoder of the teacher's maps.

    `maps()`: one epoch of maps [N, C, H, W], without a graph. `options`: has ae_epochs, ae_lr and ae_error. `about`:
    all else that the result depends on, as JSON has it. `run`: a RunContext. The weights are kept as the file
    `name` in `run.folder` and taken from there when they belong to equal settings. All processes end with equal
    weights; rank 0 alone reads and writes.
    """
    about = about | {key: getattr(options, key) for key in ("ae_epochs", "ae_lr", "ae_error")} | {"seed": run.seed}
    path = run.folder / name if run.folder else None
    known = distributed.from_rank_zero(_load, encoder, path, about, run.log)
    if not known:
        _train(encoder, maps, options, run)
    _send_from_rank_zero(encoder)
    if not all(tensor.isfinite().all() for tensor in encoder.state_dict().values()):
        raise UserError(f"the auto-encoder diverged: its weights are not finite; lower --ae-lr {options.ae_lr:g}")
    if not known and path and distributed.rank() == 0:
        checkpoint.save_network(path, encoder, about)


def _train(encoder: nn.Module, maps, options, run) -> None:
    first, last = encoder[1].weight, encoder[-3].weight
    channels_last = first.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    auto_encoder = AutoEncoder(first.shape[1], last.shape[0]).to(run.device, first.dtype, memory_format=layout)
    autocast = nullcontext if _is_fp16(run) else run.autocast  # fp16 would need a gradient scaler
    settings = (options.ae_epochs, options.ae_lr, options.ae_error, run.track, autocast)
    errors = train_auto_encoder(run.parallel(auto_encoder), maps, *settings)
    run.log(f"mean {options.ae_error} error of the auto-encoder: {errors[0]:.4g} at first, {errors[-1]:.4g} at last")
    encoder.load_state_dict(auto_encoder.encoder.state_dict())
    distributed.average_buffers(encoder)


def _is_fp16(run) -> bool:
    kind = run.device.type
    with run.autocast():
        return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16


def _load(encoder: nn.Module, path: Path | None, about: dict, log: Callable[[str], None]) -> bool:
    """Fill `encoder` from `path`, if what is kept there is what `about` describes."""
    if path is None or not path.exists():
        return False
    try:
        kept, weights = checkpoint.read_about(path), load_file(path)
    except (UserError, SafetensorError, OSError, ValueError) as problem:
        log(f"{path} cannot be read ({problem}): the auto-encoder is trained anew")
        return False
    if other := [key for key in about | kept if kept.get(key) != about.get(key)]:
        log(f"{path} was made with another {', '.join(other)}: the auto-encoder is trained anew")
        return False
    log(f"the auto-encoder was trained before with this teacher and these settings: taken from {path}")
    encoder.load_state_dict(weights)
    return True


@torch.no_grad()
def _send_from_rank_zero(encoder: nn.Module) -> None:
    for tensor in encoder.state_dict().values():
        if dist.is_initialized():
            dist.broadcast(tensor, 0)
