"""The files of a run: each is written whole or not at all, and none can run code when it is read."""

import hashlib
import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .errors import UserError
from .paths import utf8_path

FORMAT = 1

# Options that may differ when a run is resumed: they do not change what is computed.
# (`load_run` checks that a data folder in another place holds as many images and the same classes.)
FREE_TO_CHANGE: tuple[str, ...] = ("data", "data_dir", "download", "unlabelled", "resume", "out", "workers")
FREE_TO_CHANGE += ("tensorboard", "hw_decoder_load", "device", "graph")


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a temporary file, flush it to the disk and rename it to `path`. Readers see the old file or the new one.

    Raises UserError if it cannot be written; the old file is then untouched.
    """
    content = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"cannot write {path} ({len(content):,} bytes): {error.strerror}; what was there before is untouched; "
            "make room or permission and go on with --resume, or choose another --out"
        ) from None


def load(path: Path) -> dict[str, Any]:
    """The state that `save_run` wrote, on the CPU. Raises UserError if the file is not a checkpoint of this format."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that is no checkpoint
        raise UserError(f"{path} is not a readable checkpoint: {str(error).splitlines()[0]}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path} is not a fastkd checkpoint of format {FORMAT}; start again in another --out")
    return state


@dataclass(frozen=True)
class Result:
    """What a run leaves: one row of figures per epoch, and the folder of its files."""

    history: list[dict[str, Any]]
    out: Path

    @property
    def top1(self) -> float:
        """Accuracy of the saved student after the last epoch, in per cent."""
        return self.history[-1]["top1"]

    @property
    def student(self) -> Path:
        """The student's weights, a safetensors file."""
        return self.out / "student.safetensors"


def save_run(folder: Path, state: dict[str, Any]) -> None:
    """Write last.pt, and best.pt too if the last epoch of `state["history"]` has the best top1.

    `state` holds tensors, numbers, strings and containers of them.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    accuracies = [row["top1"] for row in state["history"]]
    for name in ["best.pt", "last.pt"] if accuracies[-1] >= max(accuracies) else ["last.pt"]:
        write_atomic(folder / name, buffer.getvalue())


def load_run(folder: Path, data: dict[str, Any], processes: int) -> dict[str, Any] | None:
    """The state in last.pt; None if there is no such file.

    Raises UserError if the run had other `data` (images and classes) or another number of processes.
    """
    path = folder / "last.pt"
    if not path.exists():
        return None
    state = load(path)
    if len(state["loaders"]) != processes:
        raise UserError(
            f"{path} was written by {len(state['loaders'])} processes, now there are {processes}; "
            "an exact continuation needs the same number"
        )
    if state["data"] != data:
        raise UserError(f"{path} was written on other data: {state['data']}, now {data}")
    return state


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


def claim_folder(path: Path, config: dict, resume: bool) -> None:
    """Make the run folder with its config.yaml.

    Raises UserError if the folder holds anything, unless it is a run with these options and `resume` is true.
    """
    try:
        if path.exists() and not path.is_dir():
            raise UserError(f"--out {path} is a file; choose a folder")
        path.mkdir(parents=True, exist_ok=True)
        # The temporary file of a run that was killed does not count.
        holds_something = any(not file.name.endswith(".tmp") for file in path.iterdir())
    except OSError as error:
        raise UserError(f"cannot use --out {path}: {error.strerror}; choose another folder") from None
    run = (path / "config.yaml").exists()
    if holds_something and not resume:
        hint = "; add --resume to go on with the run in it or" if run else " and holds no run;"
        raise UserError(f"--out {path} is not empty{hint} choose another folder")
    if holds_something and not run:
        raise UserError(f"--resume: {path} holds files but no run (no config.yaml); choose another --out")
    # The loader changes what is computed, but the loaders' own states refuse another one (data/base.py),
    # and with "auto" an option may be needed to get the one from before.
    free = (*FREE_TO_CHANGE, "loader")
    changed = differences(path, config, free) if holds_something else []
    if changed:
        raise UserError(
            f"--resume: {path} was started with other options: {', '.join(changed)}; give the old ones to go on, or "
            "begin a new run with the new ones: drop --resume and choose another --out"
        )
    config = {key: value for key, value in config.items() if key != "resume"}
    write_atomic(path / "config.yaml", yaml.safe_dump(config, sort_keys=False))


def add_missing_options(path: Path, defaults: dict) -> None:
    """Write the options that a run of an older version lacks into its config.yaml: they were at their `defaults`."""
    file = path / "config.yaml"
    if file.is_file():
        saved = yaml.safe_load(file.read_text()) or {}
        missing = {name: value for name, value in defaults.items() if name not in saved and name != "resume"}
        if missing:
            write_atomic(file, yaml.safe_dump(saved | missing, sort_keys=False))


def differences(path: Path, config: dict, free: tuple[str, ...], defaults: dict | None = None) -> list[str]:
    """The options in which a run folder differs from `config`, as "name was X, now Y"; `free` ones are left out.

    `defaults`: the values of options that the folder lacks.
    """
    saved = (defaults or {}) | (yaml.safe_load((path / "config.yaml").read_text()) or {})
    for name, value in saved.items():  # options that take several values now took one in older versions
        if isinstance(value, str) and isinstance(config.get(name), list):
            saved[name] = [value] if value else []
        if name in ("image_size", "mean", "std") and not value:  # those of the data: a run writes which ones
            saved[name] = config.get(name)
    changed = [name for name in saved | config if name not in free and saved.get(name) != config.get(name)]
    return [f"{name} was {saved.get(name)!r}, now {config.get(name)!r}" for name in changed]


def find_finished(folders: list[Path], config: dict, data: dict, defaults: dict | None = None) -> Path | None:
    """The student's weights in the first of `folders` with a finished run of these options on this data.

    Options that a folder of an older version lacks were at their `defaults`.
    A file of initial weights counts by its content (`student_sha256`), not by its name.
    """
    free = tuple(name for name in FREE_TO_CHANGE if name not in ("data", "unlabelled"))
    if config.get("student_sha256"):
        free = (*free, "student_weights")
    for folder in folders:
        weights = folder / "student.safetensors"
        same_data = (folder / "config.yaml").exists() and read_about(weights).get("data") == data
        if same_data and not differences(folder, config, free, defaults):
            return weights
    return None


def about_input(options: dict[str, Any]) -> dict[str, Any]:
    """What has to be as in training when a network is evaluated: options of the images, and what was held out.

    `data`: the name of a data set with files of its own. `resident`: the images were kept in memory at their own size.
    """
    resident = {"resident": True} if options.get("loader") == "resident" else {}
    if options.get("data") == "digits" and not resident:
        return {}  # of an older version, which did not use these options for the digits
    always = resident | {name: options[name] for name in ("image_size", "mean", "std") if name in options}
    if options.get("data_dir"):
        always["data"] = options["data"]
    return always | {name: options[name] for name in ("exif", "val_fraction", "split_seed") if options.get(name)}


def read_about(weights: Path) -> dict:
    """The `about` that `save_network` wrote into a safetensors file, or that of a run's checkpoint; else empty."""
    if weights.suffix == ".pt" and weights.is_file():
        return _about_checkpoint(weights)
    if weights.suffix != ".safetensors" or not weights.is_file():
        return {}
    try:
        with utf8_path(weights) as path, safe_open(path, framework="pt") as file:
            return json.loads((file.metadata() or {}).get("fastkd", "{}"))
    except SafetensorError as error:
        raise UserError(f"{weights} is not a whole safetensors file: {error}") from None


def _about_checkpoint(path: Path) -> dict:
    """Of last.pt or best.pt: the data it was trained on and, from config.yaml beside it, the network and its input."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        options = yaml.safe_load((path.parent / "config.yaml").read_text())
    except Exception:  # of torch, for a file that is no checkpoint; loading the weights will tell
        return {}
    if not (isinstance(state, dict) and state.get("format") == FORMAT and isinstance(options, dict)):
        return {}
    return {"model": options.get("student", ""), "data": state["data"], "input": about_input(options)}


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal; of a folder, that of the weights files in it; else empty."""
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    files = sorted(file for kind in ("*.safetensors", "*.bin") for file in path.glob(kind))
    hashes = "".join(f"{file.name} {sha256_of(file)}\n" for file in files)
    return hashlib.sha256(hashes.encode()).hexdigest() if files else ""


def new_folder(stem: str) -> Path:
    """Make the folder `stem`, or the first of `stem-2`, `stem-3`... that does not exist. Safe between processes."""
    path, number = Path(stem), 1
    while True:
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            number += 1
            path = Path(f"{stem}-{number}")
        except OSError as error:
            raise UserError(f"cannot make {path}: {error.strerror}; choose another folder with --out") from None
