"""One evaluation and one training step on a few real images, before anything is written or trained.

Many faults show only when a network runs: another image size than it is built for, auxiliary outputs, another number of
classes, a layer that overwrites what the backward pass needs. Without the trial they come after the teacher's training.
"""

import traceback
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from .. import distributed
from ..errors import UserError
from ..methods.base import Method
from ..methods.forwards import Taught
from ..methods.frozen import FrozenTeacher, is_absent
from ..models.own_input import plain_network
from .finite import check_network
from .grad_checkpointing import blocks_to_checkpoint, check_some_ran, checkpointed
from .labels import allowed_labels, out_of_range
from .loss_terms import check_terms
from .mixup import Mixup
from .options import TrainOptions
from .precision import Precision, wrong_dtype

IMAGES = 4  # enough for losses that compare the images of a batch, few enough for a network at a large size

Batch = tuple[Tensor, Tensor]


class Network(NamedTuple):
    """A network as errors name it."""

    title: str
    net: nn.Module


def try_step(
    method: Method,
    batch: Batch,
    classes: Sequence[str],
    options: TrainOptions,
    device: torch.device,
    titles: Mapping[str, str] | None = None,
    taught: Taught = (),
    note: str = "",
) -> None:
    """Evaluate each network of `method`, and make a training step without its update, on IMAGES images of `batch`.

    `method` is on `device`; `batch`: (images [N, 3, H, W], target) as a training loader gives it; `titles`: by role,
    what errors call a network, such as {"student": "the student resnet8"}; `taught`: what an absent teacher would say
    of the images; `note`: what errors begin with. Weights, statistics, modes and random states stay as they are. Every
    process must call it. Raises the same UserError on all of them if something fails on one; it names the network.
    """
    problem = ""
    try:
        check_batch(*batch, classes, options, device, method.ignore_index)
        images, target = (part[:IMAGES] for part in batch)
        with _unchanged(method, device):
            _try(method, images, target, len(classes), options, device, titles or {}, taught)
    except UserError as error:
        problem = note + str(error)
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what the few images took
    if first := next(filter(None, distributed.gather(problem)), ""):
        raise UserError(first)


def check_batch(
    images: Tensor,
    target: Tensor,
    classes: Sequence[str],
    options: TrainOptions,
    device: torch.device,
    ignore_index: int | None = None,
) -> None:
    """Raise UserError unless the batch is one that networks and losses can take. Waits for the device.

    `ignore_index`: the label of images without one, if the method allows it.
    """
    if len(classes) < 2:
        raise UserError(
            f"the training data has {len(classes)} class ({', '.join(classes)}): there is nothing to learn; is the "
            "folder one level too deep or too high? Each class is a folder below train/"
        )
    if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise UserError(
            f"train_loader gives images {list(images.shape)} of {images.dtype}; [N, 3, H, W] of normalised floating "
            "numbers are needed"
        )
    if images.device.type != device.type or target.device.type != device.type:
        raise UserError(
            f"train_loader gives images on {images.device} and labels on {target.device}, the run is on {device}; let "
            "the loader move them, or choose the other --device"
        )
    if not bool(images.isfinite().all()):
        raise UserError("the images of the first batch hold NaN or infinite numbers; check how they are normalised")
    _check_target(images, target, len(classes), options, ignore_index)


def _check_target(
    images: Tensor, target: Tensor, classes: int, options: TrainOptions, ignore_index: int | None
) -> None:
    is_soft = target.is_floating_point() and target.shape == (len(images), classes)
    if not is_soft and (target.dtype != torch.int64 or target.shape != images.shape[:1]):
        raise UserError(
            f"train_loader gives labels {list(target.shape)} of {target.dtype} for {len(images)} images and {classes} "
            f"classes; give class indices [N] int64, or probabilities [N, {classes}]"
        )
    if is_soft and (options.mixup or options.cutmix or options.smoothing):
        raise UserError("--mixup, --cutmix and --smoothing need class indices, and train_loader gives probabilities")
    if not is_soft and bool(out_of_range(target, classes, ignore_index).any()):
        raise UserError(
            f"the labels of the first batch go from {int(target.min())} to {int(target.max())} and there are {classes} "
            f"classes; {allowed_labels(classes)}"
        )


def _try(
    method: Method,
    images: Tensor,
    target: Tensor,
    classes: int,
    options: TrainOptions,
    device: torch.device,
    titles: Mapping[str, str],
    taught: Taught,
) -> None:
    precision, networks = Precision(options.amp_dtype, device), networks_of(method, titles)
    blocks = blocks_to_checkpoint(method, options.grad_checkpointing)
    for network in networks:
        check_network(network.title, network.net)
    method.eval()
    for network in networks:
        with torch.no_grad(), precision.autocast():
            _check_logits(network, images, classes, "in evaluation")
    method.train()
    mixup = Mixup(options.mixup, options.cutmix, options.smoothing, classes)
    images, target = mixup(images, target, 0, torch.arange(len(images)))
    taught = tuple(each[: len(images)].to(device) for each in taught)
    for plan in _plans(method):
        try:
            with precision.autocast(), checkpointed(blocks):
                terms = method(images, target, plan, taught)
        except Exception as error:  # a network's code may raise anything
            for network in networks:  # a method's own error may come from what one network returns
                with torch.no_grad(), precision.autocast():
                    _check_logits(network, images, classes, "in training")
            raise _failed(f"a training step of {type(method).__name__} fails", error) from error
        check_terms(type(method).__name__, terms, device)
        _check_gradients(method, terms, precision)
    check_some_ran(blocks)


def networks_of(method: Method, titles: Mapping[str, str]) -> list[Network]:
    """The networks that a run evaluates or trains, the teacher last. `titles`: see `try_step`."""
    nets: dict[str, nn.Module] = dict(method.networks())
    if method.teacher is not None and not is_absent(method.teacher):
        nets["teacher"] = method.teacher.net
    plain = {role: f"the {role.replace('_', ' ')} {type(plain_network(net)).__name__}" for role, net in nets.items()}
    networks = [Network(titles.get(role) or plain[role], net) for role, net in nets.items()]
    for title, net in networks:
        if any(is_lazy(tensor) for tensor in chain(net.parameters(), net.buffers())):
            raise UserError(f"{title} has lazy layers, whose shapes are not known; run a batch through it first")
    return networks


def _plans(method: Method) -> list[Hashable]:
    """The plans of the first step, and where blocks are swapped, the path through the teacher's blocks too."""
    plans = list(method.plans(0))
    if method.swaps_blocks:
        plans += [tuple(False for _ in plan) for plan in plans[:1] if isinstance(plan, tuple)]
    return list(dict.fromkeys(plans))


def _check_logits(network: Network, images: Tensor, classes: int, when: str) -> None:
    """Raise UserError unless the network gives finite logits [N, classes]."""
    side = " x ".join(map(str, images.shape[2:]))
    title, wanted = f"{network.title} {when}", [len(images), classes]
    try:
        logits = network.net(images)
    except Exception as error:  # a network's code may raise anything
        what = f"{network.title} fails {when} on images of {side} pixels"
        dtype = wrong_dtype(network.net, images)
        raise _failed(what, error, f"; {dtype}" if dtype else _other_size(network.net, images)) from error
    if not isinstance(logits, Tensor):
        raise UserError(
            f"{title} returns {_described(logits)} and not one tensor of logits; switch its extra outputs off, or wrap "
            "it in a module that returns the logits alone"
        )
    if list(logits.shape) != wanted:
        raise UserError(
            f"{title} returns {list(logits.shape)} for {len(images)} images of {side} pixels, and {wanted} is needed: "
            f"one logit for each of the {classes} classes of this data; make it with num_classes={classes}"
        )
    if not bool(logits.isfinite().all()):
        raise UserError(
            f"{title} gives logits that are NaN or infinite on the first images; check its weights, the normalisation "
            "of the images, and --amp-dtype float32"
        )


def _check_gradients(method: Method, terms: dict[str, Tensor], precision: Precision) -> None:
    """Backward of the terms, without a change to `.grad`. Raises UserError if the run could not learn from it."""
    kind = type(method).__name__
    bad = [name for name, term in terms.items() if not bool(term.isfinite().all())]
    if bad:
        raise UserError(
            f"the loss of {kind} is NaN or infinite on the first images: {', '.join(bad)}; lower its weight, or try "
            "--amp-dtype float32"
        )
    learnt = [term for term in terms.values() if term.requires_grad]
    weights = [(name, p) for name, p in method.named_parameters() if p.requires_grad]
    try:
        grads = torch.autograd.grad(learnt, [p for _, p in weights], allow_unused=True)
    except RuntimeError as error:
        hint = "; a layer may overwrite its input (inplace=True, +=)" if "inplace" in str(error) else ""
        raise _failed(f"the backward pass of {kind} fails", error, hint) from error
    if precision.scaler.is_enabled():  # float16 overflows until the run has found its scale
        return
    for (name, _), grad in zip(weights, grads, strict=True):
        if grad is not None and not bool(grad.isfinite().all()):
            raise UserError(
                f"the gradient of {kind} is NaN or infinite in {name} on the first images; lower the weights of its "
                "loss, or try --amp-dtype float32"
            )


def _failed(what: str, error: Exception, hint: str = "") -> UserError:
    """One line: what failed, why, and the way out."""
    if isinstance(error, UserError):
        return error
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/torch/" not in frame.filename]
    place = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames and not str(error) else ""
    reason = f"{type(error).__name__}{place}: {' '.join(str(error).split())}".removesuffix(": ")[:300]
    return UserError(f"{what} ({reason.rstrip('.')}){hint}")


def _other_size(net: nn.Module, images: Tensor) -> str:
    """The way out for a network that cannot take images of this size, with the size that it is made for, if known."""
    net = plain_network(net)
    config = getattr(net, "pretrained_cfg", None) or {}
    side = getattr(net, "image_size", 0)
    if isinstance(config, dict) and config.get("input_size"):
        side = config["input_size"][-1]
    if isinstance(side, int) and side and side != images.shape[-1]:
        return f"; it is made for images of {side} pixels: use --image-size {side}, or another network"
    return "; use another --image-size, or another network"


def _described(output: Any) -> str:
    """What a network returned instead of a tensor, such as "InceptionOutputs (logits, aux_logits)"."""
    kind = type(output).__name__
    if isinstance(output, Mapping):
        return f"{kind} ({', '.join(map(str, output))})"
    if isinstance(output, (tuple, list)):
        fields = getattr(output, "_fields", [type(item).__name__ for item in output])
        return f"{kind} ({', '.join(fields)})"
    return kind


@contextmanager
def _unchanged(method: Method, device: torch.device) -> Iterator[None]:
    """Within the block anything may run; afterwards buffers, modes and random states are as they were.

    Buffers are put back in place rather than run on a copy: a copy would need the memory of all networks again.
    """
    frozen = {module.net for module in method.modules() if isinstance(module, FrozenTeacher)}
    roots = (method, *frozen, *method.networks().values())
    modules = list(dict.fromkeys(chain(*(root.modules() for root in roots))))
    modes = [(module, module.training, getattr(module, "track_running_stats", None)) for module in modules]
    buffers = {id(b): (b, b.clone()) for root in roots for b in root.buffers() if not is_lazy(b)}
    # An encoder that `prepare` trains refuses to run before; its values do not matter here.
    unfitted = [module for module in modules if getattr(module, "is_fitted", None) is False]
    try:
        for module in unfitted:
            setattr(module, "is_fitted", True)  # noqa: B010, not in torch's types
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        for module in unfitted:
            setattr(module, "is_fitted", False)  # noqa: B010, not in torch's types
        with torch.no_grad():
            for buffer, before in buffers.values():
                buffer.copy_(before)
        for module, mode, tracks in modes:
            module.training = mode
            if isinstance(module, _BatchNorm) and tracks is not None:
                module.track_running_stats = tracks
