"""Weights from a file: safetensors, or a torch checkpoint, whose code is never run."""

import argparse
import os
import re
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..errors import UserError
from ..paths import utf8_path
from .classifier import classifier_keys

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar", ".ckpt")
# Keys under which trainers save the state dict, in the order in which they are tried. Averaged weights come last: they
# are used only if the file has no others.
WRAPPERS = ("state_dict", "model_state_dict", "model", "student", "state_dict_ema")
SHOWN = 5  # keys per error message
HINT = (
    "only the classifier differs: fine-tune it, by --student-weights, by --teacher-weights with --teacher-epochs N, "
    "or in Python by new_classifier=True"
)


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


class NewClassifier(NamedTuple):
    """What weights of another class count left as it was."""

    keys: list[str]  # of the state dict; they keep their initial values
    classes: int  # of the weights; 0 if they have no classifier


def load_weights(model: nn.Module, path: str | os.PathLike, new_classifier: bool = False) -> list[str]:
    """Copy the weights in a file into `model`. Returns the keys that keep their initial values, usually none.

    Keys and shapes must match exactly. Partial loading is an error. With `new_classifier`, the weights may be of
    another number of classes, or without a classifier: then all keys of the classifier keep their initial values, and
    every other key must match as before. Keys are compared without the prefixes of `read_state_dict`; floating tensors
    must stay floating. Only `num_batches_tracked` may be missing, as in files older than torch 0.4.1: batch
    normalisation with a fixed momentum does not use it. On UserError the model is unchanged.
    """
    return copy_weights(model, read_state_dict(path), str(path), new_classifier)


def copy_weights(model: nn.Module, table: Mapping[str, Tensor], source: str, new_classifier: bool = False) -> list[str]:
    """`load_weights` from the state dict `table`. Errors name the `source`."""
    state = model.state_dict()
    wanted = {without_prefixes(key): (key, tensor) for key, tensor in state.items()}
    own = {name: tensor for name, (_, tensor) in wanted.items()}
    complaints, note = _complaints(own, table), None
    if complaints:
        other = _other_classes(model, own, table)
        rest = _complaints(own, table, other.keys) if other else complaints
        if other and not rest and new_classifier:
            note = other
        else:
            words = "; ".join((rest if new_classifier else complaints) or complaints)
            hint = f"; {HINT}" if other and not rest else ""
            raise UserError(f"{source} does not fit this {type(model).__name__}: {words}{hint}")
    fresh = note.keys if note else []
    values = OrderedDict((wanted[name][0], new) for name, new in table.items() if name in wanted and name not in fresh)
    # The versions of the modules, which safetensors does not hold; torchvision's MNASNet refuses weights without one.
    setattr(values, "_metadata", getattr(state, "_metadata", {}))  # noqa: B010, not in torch's types
    model.load_state_dict(values, strict=False)
    object.__setattr__(model, "_fastkd_new_classifier", note)  # for new_classifier_of
    return fresh


def new_classifier_of(net: nn.Module) -> NewClassifier | None:
    """What the weights of `net` left as it was when they were loaded with `new_classifier`; None if they fitted."""
    return getattr(net, "_fastkd_new_classifier", None)


def _complaints(own: Mapping[str, Tensor], table: Mapping[str, Tensor], fresh: Sequence[str] = ()) -> list[str]:
    """Why the state dict `table` does not fit `own`, as phrases; the keys in `fresh` are not compared."""
    both = [(name, table[name], tensor) for name, tensor in own.items() if name in table and name not in fresh]
    first = {_place(tensor): name for name, _, tensor in reversed(both)}  # of the names of a tied tensor
    missing = [
        name
        for name, tensor in own.items()
        if name not in table and name not in fresh and not name.endswith("num_batches_tracked")
        if _place(tensor) not in first  # a tied tensor has its value from another name
    ]
    misfits = [
        f"{name} (file {_form(new)}, model {_form(old)})"
        for name, new, old in both
        if new.shape != old.shape or new.is_floating_point() != old.is_floating_point()
    ]
    ties = [(name, first[_place(tensor)], new) for name, new, tensor in both if first.get(_place(tensor), name) != name]
    apart = [f"{name} and {other}" for name, other, new in ties if not torch.equal(new, table[other])]
    unexpected = [name for name in table if name not in own]
    listed = [_listed("missing", missing), _listed("unexpected", unexpected), _listed("different", misfits)]
    return [*filter(None, [*listed, _listed("one tensor in the model, two in the file", apart)])]


def _place(tensor: Tensor) -> tuple:
    """The memory of a tensor, equal for tied tensors alone."""
    return (tensor.data_ptr() or id(tensor), tensor.shape, tensor.stride())


def _other_classes(model: nn.Module, own: Mapping[str, Tensor], table: Mapping[str, Tensor]) -> NewClassifier | None:
    """The classifier's keys if `table` has another number of rows in each of them, or none of them; else None."""
    try:
        keys = [without_prefixes(key) for key in classifier_keys(model)]
    except UserError:  # a network whose classifier is not known must fit as it is
        return None
    found = [(table[key].shape, own[key].shape) for key in keys if key in table]
    if not found:
        return NewClassifier(keys, 0)
    rows = {new[:1] for new, old in found if new[1:] == old[1:] and new[:1] != old[:1]}
    differ = len(found) == len(keys) and all(new[1:] == old[1:] and new[:1] != old[:1] for new, old in found)
    return NewClassifier(keys, rows.pop()[0]) if differ and len(rows) == 1 else None


def without_prefixes(key: str) -> str:
    """A key without the prefixes of torch.compile (at any depth) and DistributedDataParallel (at the start)."""
    return re.sub(r"^(module\.)+", "", key.replace("_orig_mod.", ""))


def _read(path: Path) -> object:
    from pickle import UnpicklingError

    safe = path.suffix == ".safetensors"
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; errors are reported below
            return _read_safetensors(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
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


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file. Names that safetensors' `save_model` notes as the same tensor as another are there too."""
    with utf8_path(path) as name, safe_open(name, framework="pt") as file:
        table = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, it is no dict
        aliases = file.metadata() or {}
    return table | {name: table[kept] for name, kept in aliases.items() if kept in table and name not in table}


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
