"""Files that are either whole or absent, and nothing in them that could run code."""

import io
import itertools
import json
import os
from pathlib import Path

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import nn

from .errors import UserError

FORMAT = 1

# Options that may differ when a run is resumed: they say where and how fast, not what is computed.
# (A moved data folder must still hold the same number of images and the same classes: the trainer checks that.)
FREE_TO_CHANGE = ("data", "resume", "out", "workers", "tensorboard", "hw_decoder_load", "device", "graph")


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write beside the file, flush to the disk, then rename: whoever looks sees the old file or the new one, whole."""
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


def save(paths: list[Path], state: dict) -> None:
    """The same state under each name; `state` holds tensors, numbers, strings and containers of them."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    for path in paths:
        write_atomic(path, buffer.getvalue())


def load(path: Path) -> dict:
    """A checkpoint written by `save`, on the CPU, through `weights_only=True`."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that is no checkpoint
        raise UserError(f"{path} is not a readable checkpoint: {str(error).splitlines()[0]}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path} is not a fastkd checkpoint of format {FORMAT}; start again in another --out")
    return state


def save_network(path: Path, net: nn.Module, about: dict) -> None:
    """safetensors with the plain network's keys; `about` (see read_about) lets `fastkd eval` rebuild it.

    One entry of metadata: safetensors writes several in random order, and equal runs would leave unequal files.
    """
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in net.state_dict().items()}
    write_atomic(path, safetensors_bytes(tensors, metadata={"fastkd": json.dumps(about)}))


def claim_folder(path: Path, config: dict, resume: bool) -> None:
    """Make the run folder with its config.yaml; refuse one that holds anything, unless that run is to be resumed."""
    try:
        if path.exists() and not path.is_dir():
            raise UserError(f"--out {path} is a file; choose a folder")
        path.mkdir(parents=True, exist_ok=True)
        # What a kill leaves of a file that was being written does not count.
        holds_something = any(not file.name.endswith(".tmp") for file in path.iterdir())
    except OSError as error:
        raise UserError(f"cannot use --out {path}: {error.strerror}; choose another folder") from None
    if holds_something and not resume:
        run = (path / "config.yaml").exists()
        hint = "; add --resume to go on with the run in it or" if run else " and holds no run;"
        raise UserError(f"--out {path} is not empty{hint} choose another folder")
    if holds_something:
        _refuse_other_run(path, config)
    config = {key: value for key, value in config.items() if key != "resume"}
    write_atomic(path / "config.yaml", yaml.safe_dump(config, sort_keys=False))


def _refuse_other_run(path: Path, config: dict) -> None:
    if not (path / "config.yaml").exists():
        raise UserError(f"--resume: {path} holds files but no run (no config.yaml); choose another --out")
    changed = differences(path, config, FREE_TO_CHANGE)
    if changed:
        raise UserError(f"--resume: {path} was started with other options: {', '.join(changed)}; choose another --out")


def differences(path: Path, config: dict, free: tuple[str, ...]) -> list[str]:
    """Options, but for the `free` ones, in which a run folder differs from `config`, as "name was X, now Y"."""
    saved = yaml.safe_load((path / "config.yaml").read_text()) or {}
    names = [name for name in saved | config if name not in free]
    return [
        f"{name} was {saved.get(name)!r}, now {config.get(name)!r}"
        for name in names
        if saved.get(name) != config.get(name)
    ]


def finished(path: Path, config: dict, data: dict) -> bool:
    """Whether a run with these options, on this data (images and classes), has ended there."""
    weights = path / "student.safetensors"
    if not (weights.exists() and (path / "config.yaml").exists()):
        return False
    if read_about(weights).get("data") != data:
        return False
    return not differences(path, config, tuple(name for name in FREE_TO_CHANGE if name != "data"))


def read_about(weights: Path) -> dict:
    """What `save_network` noted in a safetensors file; nothing for other kinds of files."""
    if weights.suffix != ".safetensors" or not weights.is_file():
        return {}
    try:
        with safe_open(weights, framework="pt") as file:
            return json.loads((file.metadata() or {}).get("fastkd", "{}"))
    except SafetensorError as error:
        raise UserError(f"{weights} is not a whole safetensors file: {error}") from None


def new_folder(stem: str) -> Path:
    """Make `stem`, or `stem-2`, `stem-3`...: the first that nobody has, also when two ask at once."""
    for number in itertools.count(1):
        path = Path(stem if number == 1 else f"{stem}-{number}")
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"cannot make {path}: {error.strerror}; choose another folder with --out") from None
