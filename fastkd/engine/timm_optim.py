"""timm's optimizers by name (--opt lamb), and its learning rates by layer (--layer-decay).

They read the learning rate and count their steps on the host, so that no CUDA graph can hold their steps. They do not
know of skipped steps either: the host waits for the verdict on each step, and leaves a bad one out.
"""

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..errors import UserError, nearest

if TYPE_CHECKING:
    from .options import TrainOptions

OURS = ("sgd", "nesterov", "adam", "adamw")  # torch's fused ones: graphs hold them, and they skip steps on the device
APEX_NAMES = ("fusedsgd", "fusedlamb", "fusedadam")
# Of timm's: names of ours by other defaults, optimizers of other packages, those that need a second backward pass, and
# kron, whose state_dict lacks its generator and counters: a resume would go on otherwise.
LEFT_OUT = ("momentum", "fused", "bnb", "adahessian", "lookahead", "kron")


@cache
def timm_names() -> tuple[str, ...]:
    """The names of timm's optimizers that fastkd takes."""
    try:
        from timm.optim import list_optimizers
    except ImportError as error:
        raise UserError(f"timm's optimizers need timm 1.0.12 or later ({error}): pip install -U timm") from None
    return tuple(name for name in map(str, list_optimizers()) if name not in OURS and not name.startswith(LEFT_OUT))


def is_timms(name: str) -> bool:
    """True for an optimizer of timm."""
    return name not in (*OURS, *APEX_NAMES)


def check_name(name: str) -> None:
    """Raise UserError unless --opt knows the name."""
    if is_timms(name) and name not in timm_names():
        known = (*OURS, *APEX_NAMES, *timm_names())
        raise UserError(
            f"--opt {name!r} is not known{nearest(name, known)}: it is one of {', '.join((*OURS, *APEX_NAMES))}, or of "
            f"timm's {', '.join(timm_names())}"
        )


def create_timm_optimizer(groups: list[dict[str, Any]], options: "TrainOptions") -> Optimizer:
    """timm's optimizer `options.opt`, with timm's defaults for what is no option here."""
    from timm.optim import create_optimizer_v2

    try:
        return create_optimizer_v2(
            groups, options.opt, lr=options.lr, weight_decay=options.weight_decay, momentum=options.momentum
        )
    except (ImportError, TypeError, ValueError, AssertionError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise UserError(f"--opt {options.opt} cannot be made ({reason}): use another one") from error


def check_timm_optimizer(options: "TrainOptions") -> None:
    """Raise UserError if the optimizer cannot make a step here, such as without a package that it needs."""
    weights = [nn.Parameter(torch.ones(shape)) for shape in ((4,), (4, 4), (4, 4, 3, 3))]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer = create_timm_optimizer([{"params": weights, "lr": options.lr}], options)
    try:
        with torch.random.fork_rng(devices=[]):
            optimizer.step()
    except Exception as error:  # the library's own code
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise UserError(f"--opt {options.opt} cannot make a step here ({reason}): use another one") from error


def groups_by_layer(groups: Sequence[dict[str, Any]], student: nn.Module, decay: float) -> list[dict[str, Any]]:
    """`groups` divided by the student's layers: the rate of a layer is `decay` times that of the layer after it.

    The layers are timm's (`group_matcher`); the last one, with the classifier, keeps its rate, and so do weights that
    are not the student's. Raises UserError for a network that does not name its layers.
    """
    if not hasattr(student, "group_matcher"):
        raise UserError(
            f"--layer-decay {decay:g} needs a network of timm that names its layers (group_matcher), and the student "
            f"is a {type(student).__name__}: drop --layer-decay, or use timm/NAME"
        )
    from timm.optim import param_groups_layer_decay

    layers = param_groups_layer_decay(student, layer_decay=decay)
    scales = {weight: layer["lr_scale"] for layer in layers for weight in layer["params"]}
    found = []
    for group in groups:
        by_scale: dict[float, list[nn.Parameter]] = {}
        for weight in group["params"]:
            by_scale.setdefault(scales.get(weight, 1.0), []).append(weight)
        found += [{**group, "params": weights, "lr": group["lr"] * scale} for scale, weights in by_scale.items()]
    return found
