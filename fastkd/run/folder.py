"""The folder of a run: who may use it, and what it was started with."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ..errors import UserError, shown
from ..files import write_atomic
from ..foreign import read_mapping
from ..weights_file import read_about
from . import lock
from .checkpoint import candidates, place_of_newest

# Options that may differ when a run is resumed: they do not change what is computed.
# (`load_run` checks that a data folder in another place holds as many images and the same classes.)
FREE_TO_CHANGE: tuple[str, ...] = ("data", "data_dir", "download", "unlabelled", "resume", "out", "workers")
FREE_TO_CHANGE += ("extend", "report", "log", "log_interval", "hw_decoder_load", "device", "graph", "max_bad_steps")
FREE_TO_CHANGE += ("checkpoint_every", "keep_checkpoints", "worker_timeout", "peer_timeout", "max_pixels")
FREE_TO_CHANGE += ("grad_checkpointing",)

# What a trainer notes of its student and its images where the caller does not say it.
NOTED: tuple[str, ...] = ("student", "model_kwargs", "image_size", "mean", "std")

# Options that `--resume --extend` may change: the networks, the images and what the optimizer keeps stay as they are.
EXTENDABLE: tuple[str, ...] = ("epochs", "lr", "sched", "min_lr", "warmup_epochs", "warmup_lr", "decay_epochs")
EXTENDABLE += ("decay_milestones", "decay_rate", "weight_decay", "clip_grad", "smoothing")


def claim_folder(
    path: Path,
    config: dict,
    resume: bool,
    log: Callable[[str], None] = print,
    extend: bool = False,
    defaults: dict | None = None,
) -> bool:
    """Make the run folder with its config.yaml, and lock it; gives whether the lock is new to this process.

    Raises UserError if another process holds the lock (see lock.py), or if the folder holds anything, unless it is a
    run with these options and `resume` is true. `extend`: those of EXTENDABLE may differ. `defaults`: the values of
    options that the folder lacks. A run that has states keeps its config.yaml until `write_settings` is called.
    """
    try:
        if path.exists() and not path.is_dir():
            raise UserError(f"--out {path} is a file; choose a folder")
        path.mkdir(parents=True, exist_ok=True)
        # The temporary file of a run that was killed does not count.
        holds_something = any(not file.name.endswith((".tmp", lock.NAME)) for file in path.iterdir())
        if holds_something and not has_run(path):
            if resume:
                raise UserError(f"--resume: {path} holds files but no run (no config.yaml); choose another --out")
            raise UserError(f"--out {path} is not empty and holds no run; choose another folder")
        is_new = lock.hold(path, log)
    except OSError as error:
        raise UserError(f"cannot use --out {path}: {error.strerror}; choose another folder") from None
    try:
        _check_run(path, config, resume, log, extend, defaults)
        if not candidates(path):
            write_settings(path, config)
    except UserError:
        if is_new:
            lock.release(path)
        raise
    return is_new


def has_run(path: Path) -> bool:
    """Whether a run has begun in this folder."""
    return (path / "config.yaml").exists()


def _check_run(
    path: Path, config: dict, resume: bool, log: Callable[[str], None], extend: bool, defaults: dict | None
) -> None:
    """Raise UserError if the folder holds a run, and it is not to go on, or would go on with other options."""
    if not has_run(path):
        if extend:
            raise UserError(f"--extend: there is no run in {path} (no config.yaml); check the path")
        if resume:
            log(f"--resume: there is no run in {path} yet, so a new one starts")
        return
    if not resume:
        raise UserError(
            f"--out {path} is not empty; add --resume to go on with the run in it, or choose another folder"
        )
    # The loader changes what is computed, but the loaders' own states refuse another one (data/base.py),
    # and with "auto" an option may be needed to get the one from before.
    free = (*FREE_TO_CHANGE, "loader", *(EXTENDABLE if extend else ()))
    if changed := differences(path, config, free, defaults):
        raise UserError(
            f"--resume: {path} was started with other options: {', '.join(changed)}; give the old ones to go on, "
            f"{extend_hint(changed_options(path, config, free, defaults))}or begin a new run with the new ones: drop "
            "--resume and choose another --out"
        )
    if extend:
        check_length(path, config)


def check_length(path: Path, config: dict) -> None:
    """Raise UserError if the run in this folder has begun more epochs than `config` has."""
    now = config.get("epochs")
    if now is None or not has_run(path) or options_of(path).get("epochs") == now:
        return
    epoch, step = place_of_newest(path)
    if epoch + bool(step) > now:
        place = f"step {step} of epoch {epoch + 1}" if step else f"epoch {epoch}"
        raise UserError(
            f"--extend --epochs {now}: the newest state of the run in {path} is after {place}; give --epochs "
            f"{epoch + bool(step)} or more"
        )


def write_settings(path: Path, config: dict) -> None:
    """Write config.yaml."""
    write_atomic(path / "config.yaml", yaml.safe_dump(config, sort_keys=False))


def extend_hint(changed: Iterable[str]) -> str:
    """A part of a message, if `--extend` allows all that changed."""
    return "add --extend to go on with the new ones, " if set(changed) <= set(EXTENDABLE) else ""


def add_missing_options(path: Path, defaults: dict) -> None:
    """Write the options that a run of an older version lacks into its config.yaml: they were at their `defaults`."""
    file = path / "config.yaml"
    if file.is_file():
        saved = options_of(path)
        missing = {name: value for name, value in defaults.items() if name not in saved and name != "resume"}
        if missing:
            write_atomic(file, yaml.safe_dump(saved | missing, sort_keys=False))


def options_of(folder: Path) -> dict[str, Any]:
    """The options in a run folder's config.yaml. Raises UserError if it cannot be read."""
    try:
        return read_mapping(folder / "config.yaml")
    except ValueError as error:
        raise UserError(
            f"{folder / 'config.yaml'} cannot be used ({error}): repair it, or choose another folder"
        ) from None


def differences(path: Path, config: dict, free: tuple[str, ...], defaults: dict | None = None) -> list[str]:
    """`changed_options` as "name was X, now Y"."""
    changed = changed_options(path, config, free, defaults)
    return [f"{name} was {was!r}, now {now!r}" for name, (was, now) in changed.items()]


def changed_options(
    path: Path, config: dict, free: tuple[str, ...], defaults: dict | None = None
) -> dict[str, tuple[Any, Any]]:
    """(value in a run folder, value in `config`) of the options that differ, by name; `free` ones are left out.

    `defaults`: the values of options that the folder lacks.
    """
    saved = (defaults or {}) | options_of(path)
    for name in config if "method" not in saved else NOTED:  # a run of an older version lacks them
        saved.setdefault(name, config.get(name))
    for name, value in list(saved.items()):  # options that take several values now took one in older versions
        if isinstance(value, str) and isinstance(config.get(name), list):
            saved[name] = [value] if value else []
        if name in ("image_size", "mean", "std") and not value:  # those of the data: a run writes which ones
            saved[name] = config.get(name)
    changed = [name for name in saved | config if name not in free and saved.get(name) != config.get(name)]
    return {name: (saved.get(name), config.get(name)) for name in changed}


class Misfit(NamedTuple):
    """Why a run folder cannot be taken for a finished run."""

    reason: str
    is_damaged: bool  # else it is another run, or not finished


def misfit(
    folder: Path,
    config: dict,
    data: dict,
    defaults: dict | None,
    problem_of: Callable[[Path], str],
    more_free: tuple[str, ...] = (),
) -> Misfit | None:
    """Why `folder` is no finished run of these options on this data; None if it is one.

    Options that a folder of an older version lacks were at their `defaults`. A file of initial weights counts by its
    content (`student_sha256`), not by its name. `problem_of(weights)` says what is wrong with the weights, or "".
    `more_free`: options that may differ too. The folder may be anybody's: nothing in it is believed, and no pipe in it
    is waited for.
    """
    free = tuple(name for name in FREE_TO_CHANGE if name not in ("data", "unlabelled"))
    free += more_free
    if config.get("student_sha256"):
        free = (*free, "student_weights")
    weights = folder / "student.safetensors"
    try:
        for file in (folder / "config.yaml", weights):
            if not os.path.lexists(file):
                return Misfit(f"there is no {file.name} in it", is_damaged=False)
        if changed := differences(folder, config, free, defaults):
            return Misfit(f"it has other options: {', '.join(changed)}", is_damaged=False)
        if not weights.is_file():
            return Misfit("student.safetensors is a folder, a pipe, a socket or a device", is_damaged=True)
        about = read_about(weights)
        if (found := about.get("data")) != data:
            return Misfit(f"it was trained on other data: {counted(found)}, now {counted(data)}", is_damaged=False)
        if about.get("epoch", epochs := options_of(folder).get("epochs")) != epochs:  # it was extended since
            return Misfit(f"its weights are those of epoch {about['epoch']} of {epochs}", is_damaged=False)
        problem = problem_of(weights)
    except (UserError, OSError) as error:
        problem = str(error)
    return Misfit(problem, is_damaged=True) if problem else None


def counted(data: Any) -> str:
    """A description of images without the names of the classes, of which there may be many."""
    if not isinstance(data, dict):
        return "unknown"
    return f"{shown(data.get('images'))} images of {len(data.get('classes', []))} classes"


def find_finished(
    folders: list[Path],
    config: dict,
    data: dict,
    defaults: dict | None = None,
    problem_of: Callable[[Path], str] = lambda weights: "",
    log: Callable[[str], None] = print,
    more_free: tuple[str, ...] = (),
) -> Path | None:
    """The student's weights in the first of `folders` with a finished run of these options on this data.

    `log` gets a line for each damaged folder that is passed over. See `misfit`.
    """
    for folder in folders:
        found = misfit(folder, config, data, defaults, problem_of, more_free)
        if found is None:
            return folder / "student.safetensors"
        if found.is_damaged:
            log(f"{folder} is passed over: {found.reason}")
    return None


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
