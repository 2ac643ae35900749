"""Activation checkpointing: `--grad-checkpointing`.

The blocks of the student and the peers keep their inputs alone. The backward pass runs each block again to get the
rest: less memory for about a third more time. Losses, gradients and BatchNorm statistics keep their bits.

Ours instead of timm's set_grad_checkpointing, which moves BatchNorm's running statistics twice a step, and which views
of stages would bypass. A block is of another class during a step, whose forward is torch's checkpoint around its own.
So hooks of the block itself run once, as they do without it. Views, copies and evaluations find the block as it was.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from ..errors import UserError
from ..methods.base import Method

CHECKED = "_fastkd_checked"  # attribute of a block that was recomputed
DRAWS = "_fastkd_draws"  # attribute of a block that has run: whether its forward draws random numbers


def blocks_to_checkpoint(method: Method, wanted: bool = True) -> list[nn.Module]:
    """The blocks of the networks that `method` trains; none unless `wanted`. UserError if a network has none."""
    return [block for net in (method.student, *method.peers) for block in _checked_blocks(net)] if wanted else []


def _checked_blocks(net: nn.Module) -> list[nn.Module]:
    blocks, name = list(dict.fromkeys(_blocks(net))), type(net).__name__
    if 2 * max(map(_weights, blocks), default=_weights(net)) > _weights(net):
        raise UserError(
            f"--grad-checkpointing: fastkd finds no blocks in {name} that divide it; "
            "--grad-accum N saves memory in any network; or choose a network of blocks (ResNet, ViT, ConvNeXt, ...)"
        )
    return blocks


def _blocks(module: nn.Module) -> list[nn.Module]:
    """The smallest modules that repeat and have two weight layers or more, such as residual blocks."""
    inner = [block for child in module.children() for block in _blocks(child)]
    kinds = Counter(type(block) for block in inner if type(block) is not nn.Sequential)
    if any(count > 1 for count in kinds.values()) or (inner and type(module) is nn.Sequential):
        return inner
    runs = type(module).forward is not nn.Module.forward  # ModuleList and ModuleDict do not
    return [module] if runs and _weights(module) > 1 else inner


def _weights(module: nn.Module) -> int:
    """The number of layers with a matrix or a kernel."""
    return sum(any(p.dim() > 1 for p in layer.parameters(recurse=False)) for layer in module.modules())


@contextmanager
def checkpointed(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Within the block, which is a step, the modules keep their inputs alone for the backward pass."""
    kinds: list[type] = [type(block) for block in blocks]
    try:
        for block, kind in zip(blocks, kinds, strict=True):
            block.__class__ = _checkpointed_kind(kind)
        yield
    finally:
        for block, kind in zip(blocks, kinds, strict=True):
            block.__class__ = kind


def check_some_ran(blocks: Sequence[nn.Module]) -> None:
    """Raise UserError if a step has run none of the blocks: a view of a network may run the layers inside of them."""
    if blocks and not any(DRAWS in block.__dict__ for block in blocks):
        raise UserError(
            "--grad-checkpointing: the method divides the network inside of its blocks, and none of them runs as a "
            "whole; use --grad-accum N to save memory, or another method or network"
        )


@cache
def _checkpointed_kind(kind: type) -> type[nn.Module]:
    return type(kind.__name__, (Checkpointed, kind), {"__module__": kind.__module__})


class Checkpointed(nn.Module):
    """Put before the class of a block during a step."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        run = super().forward
        if not torch.is_grad_enabled():
            return run(*args, **kwargs)
        if torch.compiler.is_compiling():  # the compiler moves all changes of buffers out of what it recomputes
            return checkpoint(run, *args, use_reentrant=False, **kwargs)
        leaves, form = tree_flatten((args, kwargs))  # torch then sees all inputs, and a list may change afterwards

        def run_leaves(*leaves: Any) -> Any:
            args, kwargs = tree_unflatten(leaves, form)
            return run(*args, **kwargs)

        draws = self.__dict__.get(DRAWS, True)  # a CUDA graph cannot hold that a generator is asked for its state
        options: dict[str, Any] = {
            "use_reentrant": False,
            "context_fn": partial(_contexts, self),
            "preserve_rng_state": draws,
        }
        before = None if DRAWS in self.__dict__ else _random_states()
        result = checkpoint(run_leaves, *leaves, **options)
        if before is not None:
            self.__dict__[DRAWS] = not all(map(torch.equal, before, _random_states()))
        return result


def _random_states() -> list[Tensor]:
    """The states of the generators, which are on the host."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [])]


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
    """Around the forward of a block, and around its recomputation."""
    return nullcontext(), _recomputing(block)


@contextmanager
def _recomputing(block: nn.Module) -> Iterator[None]:
    """Within the block, BatchNorm computes as in training, but its running statistics and counters stay."""
    norms = [module for module in block.modules() if isinstance(module, _NormBase)]
    hidden = {"momentum": 0.0, "num_batches_tracked": None}
    saved = [{name: norm.__dict__[name] for name in hidden if name in norm.__dict__} for norm in norms]
    others = {} if CHECKED in block.__dict__ else _other_buffers(block, norms)
    before = {name: buffer.clone() for name, buffer in others.items()}
    for norm in norms:
        norm.__dict__.update(hidden)  # an attribute of the instance hides the buffer
    try:
        yield
    finally:  # torch ends a recomputation early, by an exception
        for norm, attributes in zip(norms, saved, strict=True):
            del norm.__dict__["num_batches_tracked"]
            norm.__dict__.update(attributes)
        _check_buffers(block, others, before)
        block.__dict__[CHECKED] = True


def _check_buffers(block: nn.Module, buffers: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> None:
    for name, buffer in buffers.items():
        if not torch.equal(buffer, before[name]):
            raise UserError(
                f"--grad-checkpointing: a forward pass of {type(block).__name__} changes its buffer {name}, and would "
                "do so twice; drop --grad-checkpointing (--grad-accum N saves memory too), or use another network"
            )


def _other_buffers(block: nn.Module, norms: Sequence[nn.Module]) -> dict[str, Tensor]:
    known = {id(buffer) for norm in norms for buffer in norm.buffers(recurse=False)}
    return {name: buffer for name, buffer in block.named_buffers() if id(buffer) not in known}
