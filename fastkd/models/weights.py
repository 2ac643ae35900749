"""Weights from a file: safetensors, or a torch checkpoint, whose code is never run."""

import argparse
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import UserError

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar", ".ckpt")
# Keys under which trainers save the state dict, in the order in which they are tried. Averaged weights come last: they
# are used only if the file has no others.
WRAPPERS = ("state_dict", "model_state_dict", "model", "student", "state_dict_ema")
SHOWN = 5  # keys per error message


def read_state_dict(path: str | os.PathLike) -> dict[str, Tensor]:
    """The state dict in a file, name -> tensor, on the CPU, in the file's dtypes.

    Wrapping dicts (`WRAPPERS`) are opened, also nested ones. The prefixes of DistributedDataParallel (`module.`) and
    torch.compile (`_orig_mod.`) are removed. Torch checkpoints are read with `weights_only`, so that no code in them
    runs; objects other than `argparse.Namespace` are refused. Raises UserError if there is no readable state dict.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a directory: name a weights file ({', '.join(SUFFIXES)})")
    if not path.is_file():
        raise UserError(f"there is no weights file {path}")
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: weights files end in {', '.join(SUFFIXES)}, this one in {path.suffix!r}")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty: it was not written completely")
    table = _unwrap(_read(path), path)
    renamed = {without_prefixes(key): tensor for key, tensor in table.items()}
    if len(renamed) < len(table):
        raise UserError(f"{path}: several entries have the same name after removing 'module.' and '_orig_mod.'")
    return renamed


def load_weights(model: nn.Module, path: str | os.PathLike) -> None:
    """Copy the weights in a file into `model`. Keys and shapes must match exactly. Partial loading is an error.

    Keys are compared without the prefixes of `read_state_dict`; floating tensors must stay floating. Only
    `num_batches_tracked` may be missing, as in files older than torch 0.4.1: batch normalisation with a fixed momentum
    does not use it. On UserError the model is unchanged.
    """
    table = read_state_dict(path)
    wanted = {without_prefixes(key): (key, tensor) for key, tensor in model.state_dict().items()}
    missing = [name for name in wanted if name not in table and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in table if name not in wanted]
    both = [(name, table[name], wanted[name][1]) for name in table if name in wanted]
    misfits = [
        f"{name} (file {_form(new)}, model {_form(old)})"
        for name, new, old in both
        if new.shape != old.shape or new.is_floating_point() != old.is_floating_point()
    ]
    complaints = [_listed("missing", missing), _listed("unexpected", unexpected), _listed("different", misfits)]
    if any(complaints):
        raise UserError(f"{path} does not fit this {type(model).__name__}: {'; '.join(filter(None, complaints))}")
    model.load_state_dict({wanted[name][0]: new for name, new, _ in both}, strict=False)


def without_prefixes(key: str) -> str:
    """A key without the prefixes of torch.compile (at any depth) and DistributedDataParallel (at the start)."""
    return re.sub(r"^(module\.)+", "", key.replace("_orig_mod.", ""))


def _read(path: Path) -> object:
    from pickle import UnpicklingError

    safe = path.suffix == ".safetensors"
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; errors are reported below
            return load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        marks = ("GLOBAL", "Unsupported", "Can only")  # of the line in torch's long message that names the object
        lines = [line.strip()[:160] for line in str(error).splitlines() if any(mark in line for mark in marks)]
        raise UserError(
            f"{path} is damaged or holds more than tensors ({lines[0] if lines else 'no detail'}) and was refused; "
            "none of its code was run: save model.state_dict(), or a .safetensors file"
        ) from error
    except Exception as error:  # torch's readers raise many kinds of errors on damaged bytes
        kind, reason = "safetensors" if safe else "torch", f"{type(error).__name__}: {error}".splitlines()[0][:160]
        raise UserError(f"{path} is not a {kind} file, or it is incomplete ({reason})") from error


def _unwrap(content: object, path: Path) -> dict[str, Tensor]:
    while isinstance(content, Mapping):
        if content and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()):
            return dict(content)
        inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    found = f"its content is a {type(content).__name__}"
    if isinstance(content, Mapping):
        entries = [f"{k!r} ({type(v).__name__})" for k, v in content.items()]
        found = _listed("entries", entries) or "it has no entries"
    raise UserError(
        f"{path} holds no state dict: {found}; looked for names and tensors, also under {', '.join(WRAPPERS)}"
    )


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _listed(title: str, items: list[str]) -> str:
    """`"missing 7: a, b, c, d, e, +2 more"`, or the empty string."""
    more = [f"+{len(items) - SHOWN} more"] if len(items) > SHOWN else []
    return f"{title} {len(items)}: {', '.join(items[:SHOWN] + more)}" if items else ""
