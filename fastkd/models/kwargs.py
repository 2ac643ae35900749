"""Arguments of a network's constructor, such as drop_path_rate=0.1: `--model-kwargs`, in timm's form."""

import ast
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from ..errors import UserError, nearest

Kwargs = Mapping[str, Any]
LARGEST = 1 << 16  # of a number in the arguments: lists of this length take no time
# What fastkd gives itself, and what would load something or change the kind of result.
RESERVED = {
    "num_classes": "the data have their classes",
    "img_size": "give --image-size",
    "image_size": "give --image-size",
    "input_size": "give --image-size",
    "in_chans": "images have 3 channels",
    "global_pool": "the classifier needs the pooling that the network has",
}
RESERVED |= dict.fromkeys(("pretrained", "weights", "checkpoint_path"), "give the weights by their own option")
RESERVED |= dict.fromkeys(
    "pretrained_cfg pretrained_cfg_overlay pretrained_strict cache_dir features_only out_indices feature_cfg "
    "kwargs_filter scriptable exportable no_jit weights_backbone progress aux_logits".split(),
    "fastkd needs the network that returns logits",
)


def parse_kwargs(words: Sequence[str], option: str = "--model-kwargs") -> dict[str, Any]:
    """{"drop_path_rate": 0.1} of ("drop_path_rate=0.1",). Values are Python literals, or else text, as in timm.

    Raises UserError for anything else, and for a name that is given twice.
    """
    found: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not (equals and name.isidentifier()):
            raise UserError(f"{option} {word!r}: give NAME=VALUE, such as drop_path_rate=0.1")
        if name in found:
            raise UserError(f"{option}: {name} is given twice; keep one")
        if name in RESERVED:
            raise UserError(f"{option} {word}: {RESERVED[name]}; drop it")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            found[name] = value
        if _largest(found[name]) > LARGEST:
            raise UserError(f"{option} {word:.80}: give numbers from {-LARGEST:,} to {LARGEST:,}")
    return found


def _largest(value: Any) -> float:
    """The largest magnitude of the numbers in a Python literal."""
    if isinstance(value, Mapping):
        value = [*value, *value.values()]
    if isinstance(value, (list, tuple, set)):
        return max(map(_largest, value), default=0)
    return abs(value) if isinstance(value, (int, float, complex)) else 0


class KwargsOfFile(dict):
    """Arguments of a network for which there are weights. A file's note may name them, so the network is bounded.

    `tensors`, `numbers`: how many the network may have. The factors leave room for what the file lacks, such as a
    classifier; `copy_weights` compares exactly.
    """

    def __init__(self, kwargs: Kwargs, state: Mapping[str, Tensor], source: str):
        super().__init__(kwargs)
        self.source = source
        self.tensors, self.numbers = 1000 + 2 * len(state), 10**8 + 2 * sum(map(_stored, state.values()))


def _stored(tensor: Tensor) -> int:
    """Numbers in memory: an expanded or meta tensor claims more."""
    if tensor.layout is not torch.strided or tensor.is_meta:
        return 0
    return min(tensor.numel(), tensor.untyped_storage().nbytes())


@contextmanager
def _bounded(name: str, kwargs: KwargsOfFile) -> Iterator[None]:
    """Inside, making a network that is much larger than the weights is an error. It is made on meta: no memory."""
    tensors = numbers = modules = 0

    def check() -> None:
        if tensors > kwargs.tensors or numbers > kwargs.numbers or modules > 20 * kwargs.tensors:
            words = " ".join(f"{each}={value}" for each, value in kwargs.items())
            raise UserError(
                f"{kwargs.source}: {name} with {words:.160} is much larger than the network in this file: drop or "
                "correct these arguments"
            )

    def count_parameter(module: nn.Module, key: str, parameter: Tensor | None) -> None:
        nonlocal tensors, numbers
        tensors, numbers = tensors + 1, numbers + (0 if parameter is None else parameter.numel())
        check()

    def count_module(module: nn.Module, key: str, child: nn.Module | None) -> None:
        nonlocal modules
        modules += 1
        check()

    hooks = [
        register_module_parameter_registration_hook(count_parameter),
        register_module_module_registration_hook(count_module),
    ]
    try:
        with torch.device("meta"):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def built(name: str, kwargs: Kwargs, build: Callable[[Kwargs], nn.Module]) -> nn.Module:
    """`build(kwargs)`. Raises UserError with the arguments that the network `name` has if it does not take them."""
    if not kwargs:
        return build(kwargs)
    known, takes_others = _arguments(build)
    unknown = [each for each in kwargs if each not in known]
    if unknown and not takes_others:
        raise UserError(
            f"{name} has no argument {unknown[0]}{nearest(unknown[0], known)}; it has {', '.join(known) or 'none'}"
        )
    try:
        if isinstance(kwargs, KwargsOfFile):
            with _bounded(name, kwargs):
                build(kwargs)
        return build(kwargs)
    except UserError:
        raise
    except Exception as error:  # the library's own code
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        words = " ".join(f"{each}={value}" for each, value in kwargs.items())
        raise UserError(f"{name} cannot be made with {words} ({reason}); it has {', '.join(known)}") from error


def _arguments(build: Callable[[Kwargs], nn.Module]) -> tuple[list[str], bool]:
    """(the arguments of the network's classes, whether one of them may take others too)"""
    with torch.device("meta"):  # neither memory nor time
        kind = type(build({}))
    found: dict[str, None] = {}
    for each in kind.__mro__:
        if each is nn.Module:
            break
        parameters = inspect.signature(each).parameters.values()
        found |= dict.fromkeys(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
        if not any(p.kind == p.VAR_KEYWORD for p in parameters):
            return [name for name in found if name not in RESERVED], False
    return [name for name in found if name not in RESERVED], True
