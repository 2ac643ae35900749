"""Networks in safetensors files, and what the metadata of such a file says about them."""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .errors import UserError, check_side
from .files import write_atomic
from .foreign import parse_json, read_mapping
from .paths import utf8_path
from .run.checkpoint import FORMAT
from .torch_files import Damaged, load_torch

EVALUATION = ("exif", "crop_pct", "val_fraction", "split_seed")  # options that are noted if they are given
LONGEST_NOTE = 16 << 20  # characters; the names of 100,000 classes have 3 million


def save_network(path: Path, net: nn.Module, about: dict) -> None:
    """Write the network's state dict as safetensors. `about` goes into the metadata, for `read_about`.

    Every key is in the file with a tensor of its own, because the format has no tensors under two names and readers
    (timm, torchvision, `load_state_dict`) want every key. `shared` in the metadata names the tied ones: {key: the key
    of the same tensor}. The metadata is one entry: safetensors writes several in random order, and equal runs would
    leave different files.
    """
    check_savable(net)
    state = net.state_dict()
    if shared := shared_keys(state):
        about = about | {"shared": shared}
    storages: set[int] = set()
    tensors = {}
    for name, tensor in state.items():
        tensors[name] = tensor.detach().contiguous().cpu()
        storage = tensors[name].untyped_storage().data_ptr()
        if storage in storages:  # safetensors refuses tensors that share memory
            tensors[name] = tensors[name].clone()
        storages.add(storage)
    write_atomic(path, safetensors_bytes(tensors, metadata={"fastkd": json.dumps(about)}))


def shared_keys(state: Mapping[str, Tensor]) -> dict[str, str]:
    """For each key of a tied tensor but the first, that first key."""
    first: dict[tuple, str] = {}
    shared = {}
    for name, tensor in state.items():
        if tensor.numel():
            place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            if first.setdefault(place, name) != name:
                shared[name] = first[place]
    return shared


def check_savable(net: nn.Module, role: str = "network") -> None:
    """Raise UserError if `save_network` cannot write the state dict of `net`. `role` names it: student, teacher."""
    kind = f"the {role} ({type(net).__name__}) cannot be saved"
    dtypes: dict[torch.dtype, str] = {}
    for name, tensor in net.state_dict().items():
        if not isinstance(tensor, Tensor):
            raise UserError(f"{kind}: {name} is a {type(tensor).__name__}, and a safetensors file holds tensors alone")
        if is_lazy(tensor):
            raise UserError(f"{kind}: {name} has no shape yet; run the network once before it is trained")
        if tensor.is_meta:
            raise UserError(f"{kind}: {name} is on the meta device, without values; make the network on the CPU")
        if tensor.layout != torch.strided:
            raise UserError(f"{kind}: {name} is {tensor.layout}; convert it with to_dense()")
        dtypes.setdefault(tensor.dtype, name)
    for dtype, name in dtypes.items():
        try:
            safetensors_bytes({name: torch.empty(0, dtype=dtype)})
        except Exception as error:  # safetensors raises several kinds for a dtype that it does not know
            raise UserError(f"{kind}: {name} is {dtype}, which safetensors cannot hold ({error})") from None


def fingerprint(net: nn.Module) -> str:
    """SHA-256 of a network's weights and statistics; it does not depend on device and memory format."""
    digest = hashlib.sha256()
    for name, tensor in net.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def about_input(options: dict[str, Any]) -> dict[str, Any]:
    """What has to be as in training when a network is evaluated: options of the images, and what was held out.

    `data`: the name of a data set. `resident`: the images were kept in memory at their own size.
    """
    resident = {"resident": True} if options.get("loader") == "resident" else {}
    if options.get("data") == "digits" and not resident:
        return {}  # of an older version, which did not use these options for the digits
    always = resident | {name: options[name] for name in ("image_size", "mean", "std") if name in options}
    if options.get("data_dir") or options.get("data") == "digits":
        always["data"] = options["data"]
    if options.get("interpolation", "bilinear") != "bilinear":
        always["interpolation"] = options["interpolation"]
    return always | {name: options[name] for name in EVALUATION if options.get(name)}


def about_accuracy(history: Any, epochs: Any, network: str = "student") -> dict[str, Any]:
    """What the last row of a history says of a network's weights: top-1 in %, and after which epoch of how many."""
    row = history[-1] if isinstance(history, list) and history else {}
    name = "top1" if network == "student" else f"{network}_top1"
    known = isinstance(row, dict) and name in row and "epoch" in row
    return {"top1": row[name], "epoch": row["epoch"], "epochs": epochs} if known else {}


def read_about(weights: Path) -> dict:
    """The `about` that `save_network` wrote into a safetensors file, or that of a run's checkpoint; else empty.

    Raises UserError if the note says what no note of ours says: it passes the same checks as options do.
    """
    read = {".pt": _about_checkpoint, ".safetensors": _about_safetensors}.get(weights.suffix)
    if read is None or not os.path.isfile(weights):  # False for a name that is too long, where Path.is_file raises
        return {}
    try:
        about = read(weights)
    except OSError as error:
        raise UserError(f"the weights file {weights} cannot be read: {error.strerror or error}") from None
    try:
        return checked_about(about)
    except ValueError as error:
        raise UserError(
            f"{weights}: its note of fastkd cannot be used ({error}): get the file again, or save its tensors without "
            "metadata"
        ) from None


def _about_safetensors(weights: Path) -> Any:
    try:
        with utf8_path(weights) as path, safe_open(path, framework="pt") as file:
            note = (file.metadata() or {}).get("fastkd", "{}")
        if len(note) > LONGEST_NOTE:
            raise UserError(f"{weights}: its note of fastkd has {len(note):,} characters: get the file again")
        return parse_json(note)
    except SafetensorError as error:
        raise UserError(f"{weights} is not a whole safetensors file: {str(error):.200}") from None
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{weights}: its note of fastkd is no JSON ({error}): get the file again") from None


def _about_checkpoint(path: Path) -> dict:
    """Of last.pt or best.pt: the data, the accuracy and, from config.yaml beside it, the network and its input."""
    try:
        state = load_torch(path, mmap=True)
        options = read_mapping(path.parent / "config.yaml")
    except Damaged as error:
        raise UserError(f"{path} is not a torch file, or it is damaged: {error}; it was refused unread") from None
    except OSError:
        raise
    except Exception:  # of torch, for a file that is no checkpoint; loading the weights will tell
        return {}
    if not (isinstance(state, dict) and state.get("format") == FORMAT and isinstance(state.get("identity"), dict)):
        return {}
    data, trained = state["identity"].get("data", {}), state["identity"].get("options")
    about = {"model": options.get("student", ""), "data": data, "input": about_input(options)}
    if state.get("step") == 0 and isinstance(trained, dict):  # else the weights are newer than the last row
        about |= about_accuracy(state.get("history"), trained.get("epochs"))
    return about | ({"kwargs": options["model_kwargs"]} if options.get("model_kwargs") else {})


def checked_about(about: Any) -> dict:
    """`about` if it is what `save_network` may have written. Raises ValueError with the reason."""
    if not isinstance(about, dict):
        raise ValueError(f"it is a {type(about).__name__}")
    for name, kind in (("model", str), ("data", dict), ("input", dict), ("shared", dict), ("kwargs", list)):
        if not isinstance(about.get(name, kind()), kind):
            raise ValueError(f"{name} is a {type(about[name]).__name__}")
    for name, most in (("top1", 100), ("epoch", 1 << 40), ("epochs", 1 << 40)):
        if not (_is_number(about.get(name, 1), 0) and about.get(name, 1) <= most):
            raise ValueError(f"{name} is {about[name]!r:.60}")
    classes = about.get("data", {}).get("classes", [])
    if not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
        raise ValueError("its classes are no list of names")
    if len({*classes}) < len(classes):
        raise ValueError("two of its classes have one name")
    if not all(isinstance(word, str) and len(word) < 1000 for word in about.get("kwargs", ())):
        raise ValueError("its kwargs are no list of texts")
    check_input(about.get("input", {}))
    return about


def check_input(images: dict[str, Any]) -> None:
    """Raise ValueError or UserError if this is not what a note may say of the images."""
    for name, value in images.items():
        if name not in INPUT_CHECKS or not INPUT_CHECKS[name](value):
            raise ValueError(f"input has {name!r:.60}: {value!r:.60}")
    check_side("image_size", images.get("image_size", 0))


def _is_number(value: Any, low: float = -math.inf) -> bool:
    is_finite = isinstance(value, float) and math.isfinite(value) or isinstance(value, int) and abs(value) < 1 << 63
    return is_finite and not isinstance(value, bool) and value >= low


def _are_numbers(values: Any, above: float) -> bool:
    return isinstance(values, list) and len(values) <= 16 and all(_is_number(v) and v > above for v in values)


INPUT_CHECKS: dict[str, Callable[[Any], bool]] = {
    "image_size": lambda value: isinstance(value, int) and _is_number(value, 0),
    "mean": lambda values: _are_numbers(values, -math.inf),
    "std": lambda values: _are_numbers(values, 0.0),
    "resident": lambda value: isinstance(value, bool),
    "exif": lambda value: isinstance(value, bool),
    "crop_pct": lambda value: _is_number(value, 0.1) and value <= 1,
    "interpolation": lambda value: value in ("bilinear", "bicubic"),
    "val_fraction": lambda value: _is_number(value, 0) and value < 1,
    "split_seed": lambda value: isinstance(value, int) and _is_number(value),
    "data": lambda value: isinstance(value, str) and re.fullmatch(r"[a-z0-9-]{1,40}", value) is not None,  # no path
}
"""What a note may say of the images, all of it plain values: neither a folder nor a device."""
