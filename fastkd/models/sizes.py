"""What is noted on a network when it is made: its name, and its image size, at which shapes are probed."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError, count_of

SIZE = 64  # pixels; shapes are probed at this size if nothing says which size the network gets


def note_image_size(net: nn.Module, size: int) -> None:
    """Store the height and width, in pixels, of the images that `net` will get."""
    object.__setattr__(net, "_fastkd_image_size", size)


def note_name(net: nn.Module, name: str, kwargs: Mapping[str, Any]) -> None:
    """Store by which name and arguments `create_model` made `net`. Copies keep it."""
    words = [f"{key}={value}" for key, value in kwargs.items()]
    object.__setattr__(net, "_fastkd_name", (name, words))


def name_of(net: nn.Module) -> tuple[str, list[str]]:
    """(name, arguments as `--model-kwargs` takes them) of a network of `create_model`; ("", []) of another."""
    return getattr(net, "_fastkd_name", ("", []))


def image_size_of(*nets: nn.Module) -> int:
    """The height of the images [3, H, H] that `nets` get: all of them get the same.

    It is the first size that is noted on one of them, else the size of a network of a fixed size, else 64.
    """
    noted = [size for net in nets if (size := getattr(net, "_fastkd_image_size", None)) is not None]
    return int(next(iter([*noted, *(size for net in nets if (size := _fixed_size(net)))]), SIZE))


def _fixed_size(net: nn.Module) -> int:
    """The image size that the network says it is made for; 0 if it does not say."""
    embedding = getattr(net, "patch_embed", None)  # timm
    places: list[Any] = [getattr(embedding, "img_size", None), getattr(net, "image_size", None)]  # torchvision's ViT
    places.append(getattr(getattr(net, "config", None), "image_size", None))  # transformers
    cfg = getattr(net, "pretrained_cfg", None)  # timm
    if isinstance(cfg, dict) and cfg.get("fixed_input_size"):
        places.append(cfg["input_size"][-1])
    sizes = [place[0] if isinstance(place, Sequence) else place for place in places if place]
    return int(sizes[0]) if sizes else 0


def check_image_size(net: nn.Module, name: str, size: int, build: Callable[[int], nn.Module]) -> None:
    """Note the size on `net` and try one image. Raises UserError if the network cannot take it, with one that works.

    `build` makes such a network for an image size.
    """
    note_image_size(net, size)
    patch = _patch_size(net)
    if rest := size % patch:
        lost = f"{count_of(rest, 'row')} and {count_of(rest, 'column')}"
        raise UserError(
            f"{name} cuts images into patches of {patch} x {patch} pixels, and {size} is no multiple: "
            f"{lost} would be lost; use {size - size % patch or patch} or {size + patch - size % patch}"
        )
    try:
        probe(net, [net], size)
    except UserError as error:
        reason = str(error).removeprefix(type(net).__name__)
        raise UserError(f"{name}{reason}{_hint(size, build)}") from error


def _patch_size(net: nn.Module) -> int:
    """The side of the patches of a transformer without a convolutional stem, in pixels; 1 for other networks."""
    embedding = getattr(net, "patch_embed", None)  # timm's ViT and its relatives
    side = getattr(embedding, "patch_size", 1)
    return int(side[0] if isinstance(side, Sequence) else side)


@contextmanager
def blaming_size(name: str, size: int | None, build: Callable[[int], nn.Module]) -> Iterator[None]:
    """If an image size is given, errors other than UserError within the block are taken to be about it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the library's own code
        if size is None:
            raise
        raise UserError(f"{name}{_refusal(size, error)}{_hint(size, build)}") from error


def _refusal(size: int, error: Exception) -> str:
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
    return f" cannot take images of {size} x {size} ({reason})"


def _hint(size: int, build: Callable[[int], nn.Module]) -> str:
    """The nearest size that works, of multiples of powers of two above `size` and of common sizes, as a hint."""
    steps = {(size // step + 1) * step for step in (4, 8, 16, 32, 64)} | {224, 256, 299}
    for other in sorted(steps, key=lambda each: abs(each - size)):
        try:
            with torch.device("meta"), torch.no_grad():  # shapes alone: neither memory nor time
                build(other).eval()(torch.zeros(1, 3, other, other))
        except Exception:  # the library's own code; this size does not work either
            continue
        return f"; {other} x {other} works"
    return ""


@torch.no_grad()
def probe(net: nn.Module, modules: Sequence[nn.Module], size: int) -> list[Tensor]:
    """The outputs of these modules of `net`, run one after another on an image of zeros, in eval mode.

    Weights, statistics, modes and random numbers stay as they are. Raises UserError, in one line, if the network
    cannot take images of this size.
    """
    first = next(net.parameters())
    x, outputs = torch.zeros(1, 3, size, size, dtype=first.dtype, device=first.device), []
    with _evaluating(net), torch.random.fork_rng(devices=[]):
        for module in modules:
            try:
                x = module(x)
            except UserError:
                raise
            except Exception as error:  # the network's own code
                raise UserError(f"{type(net).__name__}{_refusal(size, error)}") from error
            outputs.append(x)
    return outputs


@contextmanager
def _evaluating(net: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in net.modules()}
    net.eval()
    try:
        yield
    finally:
        net.train()  # some networks drop what they have computed for eval mode (LeViT its attention biases)
        for module, mode in modes.items():
            module.training = mode
