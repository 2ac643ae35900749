"""Whether a state on the disk is whole, and whether it belongs to this run: its teacher, its data, its options."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from .. import distributed
from ..data.base import EpochLoader, Loader, describe, position_of
from ..environment import changes, environment
from ..errors import UserError, count_of, shown
from ..files import second_name, sync_folder
from ..methods.frozen import AbsentTeacher
from ..weights_file import fingerprint
from .checkpoint import State, candidates, load
from .folder import EXTENDABLE, FREE_TO_CHANGE, counted, extend_hint
from .problems import identity_problem
from .ranks import loaders_for, what_changes

NOT_COMPARED = ("command", "variables", "platform", "processes")  # of the environment: `own_state` names the processes


def identity_of(teacher: nn.Module | None, loader: Loader, options: Mapping[str, Any]) -> dict[str, Any]:
    """What a state must have been made from to be continued: hashes of the teacher and the images, the options.

    The software and the devices are there as well: they change the last digits alone. `teacher`: the network itself.
    """
    return {
        "data": describe(loader),
        "images": getattr(loader, "fingerprint", str)(),
        "sampler": getattr(loader, "sampler", ""),
        "steps": len(loader),
        "teacher": "" if teacher is None or isinstance(teacher, AbsentTeacher) else fingerprint(teacher),
        "options": json.loads(json.dumps(dict(options), default=str)),
        "environment": {name: value for name, value in environment().items() if name not in NOT_COMPARED},
    }


def check_identity(
    before: Mapping[str, Any], now: Mapping[str, Any], log: Callable[[str], None], extend: bool = False
) -> None:
    """Raise UserError if a state is of another teacher, other data or other options; log what is harmless.

    `extend`: the options of EXTENDABLE may be others.
    """
    _check_data(before, now)
    for part, words in (("images", "training images (names, sizes or labels)"), ("teacher", "teacher's weights")):
        if before[part] and now[part] and before[part] != now[part]:
            raise UserError(
                f"--resume: the {words} are not those of the run: their hash was {before[part][:12]}, now "
                f"{now[part][:12]}; give the old ones, or begin a new run with another --out"
            )
    samplers = before.get("sampler", ""), now["sampler"]
    if all(samplers) and samplers[0] != samplers[1]:
        raise UserError(
            f"--resume: the run drew its images by a {samplers[0]}, and train_loader has a {samplers[1]}: give the "
            "loader of before, or begin a new run with another --out"
        )
    was, are = before["options"], now["options"]
    free = (*FREE_TO_CHANGE, "loader", *(EXTENDABLE if extend else ()))
    if changed := [name for name in was if name in are and name not in free and was[name] != are[name]]:
        named = ", ".join(f"{name} was {shown(was[name])}, now {shown(are[name])}" for name in changed)
        raise UserError(
            f"--resume: the state was written with other options than config.yaml and the command have: {named}; give "
            f"the old ones, {extend_hint(changed)}or begin a new run with another --out"
        )
    for change in changes(before.get("environment", {}), now["environment"]):
        digits = "" if "code has changed" in change else "the last digits of "
        log(f"--resume: {change}: {digits}the result may differ")


def _check_data(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise OtherRun if the number of images or the classes differ."""
    was, are = before["data"], now["data"]
    if was == are:
        return
    differ = [
        f"class {number} was {shown(old)}, now {shown(new)}"
        for number, (old, new) in enumerate(zip(was["classes"], are["classes"], strict=False))
        if old != new
    ]
    raise OtherRun(
        f"--resume: the run was written on other data: {counted(was)}, now {counted(are)}"
        f"{''.join(f'; {each}' for each in differ[:1])}; give the images of before, or begin a new run with another "
        "--out"
    )


def _check_steps(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise OtherRun if an epoch has another number of steps."""
    was, are = before.get("steps"), now["steps"]
    if isinstance(was, int) and was != are:
        raise OtherRun(
            f"--resume: an epoch of the run had {count_of(was, 'step')}, and train_loader has {are:,}: give the batch "
            "size of before, or begin a new run with another --out"
        )


def check_newest(folder: Path, identity: Mapping[str, Any], extend: bool) -> None:
    """`check_identity` of the newest state that can be read, if there is one. Nothing is written, nothing logged."""
    for path in candidates(folder):
        with suppress(UserError):
            state = load(path)
            if not identity_problem(state):
                break
    else:
        return
    check_identity(state["identity"], identity, lambda line: None, extend)


def state_to_resume(
    folder: Path,
    check: Callable[[State], str],
    identity: Mapping[str, Any],
    loader: Loader,
    log: Callable[[str], None],
    extend: bool,
) -> tuple[State, dict[str, Any]] | None:
    """The newest state that this run may go on from, and what this process has of it; None if there are no states.

    Raises UserError, and leaves the folder as it is, if the state is of another run. See `newest`.
    """
    own: dict[str, Any] = {}

    def problem(state: State) -> str:
        """What fits another run alone would look like damage here, and is refused first."""
        if not identity_problem(state):
            _check_data(state["identity"], identity)
            if len(state.get("ranks", ())) == distributed.world_size():
                _check_steps(state["identity"], identity)
        return check(state)

    def accept(state: State) -> None:
        own.update(own_state(state, distributed.rank(), distributed.world_size(), loader, log))
        check_identity(state["identity"], identity, log, extend)

    state = newest(folder, problem, log, accept)
    return None if state is None else (state, own)


class OtherRun(UserError):
    """A state is of another run. What of it does not fit this one is no damage."""


class Found(NamedTuple):
    """A state that a run can go on from, and its file."""

    state: State
    path: Path


def newest(
    folder: Path,
    check: Callable[[State], str],
    log: Callable[[str], None],
    accept: Callable[[State], None] = lambda state: None,
) -> State | None:
    """The newest state in the folder that is whole and in which `check` finds no problem; None if there are no states.

    `accept(state)` may refuse it by UserError, before any file is renamed. Says which files are damaged; they get other
    names, so that no later state takes their place among the good ones. Every process must call it. Raises UserError if
    none of the states can be used, or if the processes find others.
    """
    try:
        found, problem = _newest(folder, check, log), ""
    except UserError as error:
        found, problem = None, str(error)
    _raise_first(problem)
    places = distributed.gather(found and (found.path.name, found.state["epoch"], found.state["step"]))
    if any(place != places[0] for place in places):
        raise UserError(f"the processes find different states in {folder}: {places}; all must see the same folder")
    if found:
        try:
            accept(found.state)
        except UserError as error:
            problem = str(error)
        _raise_first(problem)
    if found and distributed.rank() == 0:
        _tidy(folder, found.path, check, log)
    return found and found.state


def _raise_first(problem: str) -> None:
    """Raise UserError in all processes if one of them has a problem. Every process must call it."""
    if problems := [each for each in distributed.gather(problem) if each]:
        raise UserError(problems[0])


def _newest(folder: Path, check: Callable[[State], str], log: Callable[[str], None]) -> Found | None:
    bad: list[str] = []
    for path in candidates(folder):
        problem, state = _examined(path, check)
        if not problem:
            for line in bad:
                log(f"WARNING: {line}; going on from {path.name}, an earlier state")
            return Found(state, path)
        bad.append(problem)
    if bad:
        raise UserError(f"{'; '.join(bad)}; no earlier state is left: begin a new run with another --out")
    return None


def _examined(path: Path, check: Callable[[State], str]) -> tuple[str, State]:
    """(what is wrong with the file or "", the state)"""
    try:
        state = load(path)
        problem = check(state)
    except OtherRun:
        raise
    except UserError as error:
        problem, state = str(error), {}
    except Exception as error:  # a file that was made on purpose, which the checks do not foresee
        problem, state = f"its content is odd ({type(error).__name__}: {error!s:.100})", {}
    return problem and (problem if str(path) in problem else f"{path}: {problem}"), state


def _tidy(folder: Path, good: Path, check: Callable[[State], str], log: Callable[[str], None]) -> None:
    """Let the state `good` be last.pt, and give every damaged one another name, which is logged."""
    found = candidates(folder)
    for number, path in enumerate(found):
        problem = "" if path == good else _examined(path, check)[0]
        if problem:
            aside = next(name for name in _names(f"{path}.damaged") if not os.path.lexists(name))
            path.rename(aside)
            is_said = number < found.index(good)
            log(f"{path.name} is now {aside.name}" if is_said else f"WARNING: {problem}; it is now {aside.name}")
    if not (folder / "last.pt").exists():
        if good.name == "best.pt":
            second_name(good, folder / "last.pt")
        else:
            good.replace(folder / "last.pt")  # one file under two names would look like two states
    sync_folder(folder)


def _names(stem: str) -> Iterator[Path]:
    """`stem`, `stem-2`, `stem-3` and so on."""
    yield Path(stem)
    yield from (Path(f"{stem}-{number}") for number in count(2))


def own_state(state: State, rank: int, processes: int, loader: Loader, log: Callable[[str], None]) -> dict[str, Any]:
    """What process `rank` of `processes` goes on from. Raises UserError if a state of other processes does not do."""
    ranks = state["ranks"]
    if isinstance(loader, EpochLoader):
        position_of(ranks[0]["loader"], loader.name)  # another kind of loader is the reason for whatever else differs
    if len(ranks) == processes:
        return ranks[rank]
    loaders = loaders_for([each["loader"] for each in ranks], processes)
    size = getattr(loader, "batch_size", 0)
    log(what_changes(len(ranks), processes, size, loader.samples))
    return {"loader": loaders[rank]}
