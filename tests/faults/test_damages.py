"""Damaged states of a run: the newest good one is taken and the damaged one named, or one line says that none is left.

A run is stopped within its second epoch. It leaves last.pt, last-1.pt and best.pt, which are damaged in about 200 ways.
After each, the state that a resume goes on from must be one of those that were saved, bit by bit.
"""

import copy
import io
import os
import pickle
import shutil
import socket
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from replays import same
from sealing import sealed
from stopped_run import StoppedRun

from fastkd.errors import UserError
from fastkd.run import checkpoint
from fastkd.run.problems import problem_of
from fastkd.run.resume import newest

NAMES = ("last.pt", "last-1.pt", "best.pt")
SAVES = 7  # after steps 1, 2, 3, before and after the evaluation, after steps 5 and 6


class Run(StoppedRun):
    """The run, and the states that it left."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, **options):
        super().__init__(folder, patch, SAVES, **options)
        self.states = {name: checkpoint.load(folder / name) for name in NAMES}
        trainer = self.trainer(folder.parent / "whole")
        self.check = partial(problem_of, step=trainer.step, loader=trainer.train_loader, epochs=2)
        trainer.report.release()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        yield Run(tmp_path_factory.mktemp("run") / "r", patch, opt="adamw", ema_decay=0.9, amp_dtype="float16")


@pytest.fixture
def folder(run, tmp_path) -> Path:
    """A copy of the run."""
    return Path(shutil.copytree(run.folder, tmp_path / "r"))


def test_the_run_was_stopped_within_an_epoch(run):
    places = {name: (state["epoch"], state["step"]) for name, state in run.states.items()}
    assert places == {"last.pt": (1, 2), "last-1.pt": (1, 1), "best.pt": (1, 0)}
    assert all(run.check(state) == "" for state in run.states.values())


def found(run: Run, folder: Path) -> tuple[str, list[str]]:
    """(the name under which the state was saved that a resume goes on from, or the error; the lines of the log)"""
    lines: list[str] = []
    try:
        state = newest(folder, run.check, lines.append)
    except UserError as error:
        assert "\n" not in str(error)
        return str(error), lines
    assert state is not None
    (name,) = [name for name in NAMES if same(run.states[name], state)]
    assert same(checkpoint.load(folder / "last.pt"), state)
    return name, lines


def check_damages(run: Run, folder: Path, damages: dict, monkeypatch) -> None:
    """Each damage, to each of the files: another state is taken, the damaged file is named, and nothing else is."""
    for words, damage in damages.items():
        for name in NAMES:
            copied = Path(shutil.copytree(run.folder, folder / words.replace("/", "_") / name))
            damage(copied / name)
            taken, lines = found(run, copied)
            assert taken == ("last-1.pt" if name == "last.pt" else "last.pt"), (words, name, lines)
            warnings = [line for line in lines if line.startswith("WARNING: ")]
            assert len(warnings) == 1 and str(copied / name) in warnings[0] and len(warnings[0]) < 700, (words, lines)
            assert any(f"{name}.damaged" in line for line in lines) and os.path.lexists(copied / f"{name}.damaged")
            assert (copied / name).exists() == (name == "last.pt"), words
            shutil.rmtree(copied)


# Damage of the bytes


def cut(path: Path, random: np.random.Generator) -> None:
    os.truncate(path, int(random.integers(path.stat().st_size)))


def flip(path: Path, random: np.random.Generator) -> None:
    data = bytearray(path.read_bytes())
    for place in random.integers(len(data), size=int(random.integers(1, 20))):
        data[place] ^= 1 << int(random.integers(8))
    replace(path, bytes(data))


def flip_one(path: Path, random: np.random.Generator) -> None:
    data = bytearray(path.read_bytes())
    data[int(random.integers(len(data)))] ^= 1 << int(random.integers(8))
    replace(path, bytes(data))


def clear(path: Path, random: np.random.Generator) -> None:
    data = bytearray(path.read_bytes())
    start = int(random.integers(len(data) - 600))  # a part that is not zero before
    while not any(data[start : start + 512]):
        start = int(random.integers(len(data) - 600))
    data[start : start + 512] = bytes(512)
    replace(path, bytes(data))


def shift(path: Path, random: np.random.Generator) -> None:
    data, start = path.read_bytes(), int(random.integers(path.stat().st_size))
    replace(path, data[:start] + bytes([7]) + data[start:])


def replace(path: Path, content: bytes) -> None:
    """Give the name to a new file: last.pt and best.pt may be one."""
    path.unlink()
    path.write_bytes(content)


def check_bytes(run, folder, monkeypatch, seeds) -> None:
    ways = (cut, flip, flip_one, clear, shift)
    damages = {
        f"{way.__name__}-{seed}": partial(way, random=np.random.default_rng(seed)) for way in ways for seed in seeds
    }
    check_damages(run, folder, damages, monkeypatch)


def test_random_damage(run, tmp_path, monkeypatch):
    check_bytes(run, tmp_path, monkeypatch, range(4))


@pytest.mark.every
def test_more_random_damage(run, tmp_path, monkeypatch):
    check_bytes(run, tmp_path, monkeypatch, range(100, 120))


def test_every_bit_of_the_seal_counts(run, tmp_path):
    """Also those in the comment's own words, and in the record that says how long it is."""
    whole, name = (run.folder / "last.pt").read_bytes(), tmp_path / "last.pt"
    for place in range(len(whole) - 110, len(whole)):
        data = bytearray(whole)
        data[place] ^= 1 << place % 8
        name.write_bytes(data)
        with pytest.raises(UserError, match="not a readable checkpoint"):
            checkpoint.load(name)


# What takes the place of a file


def occupy(make) -> object:
    def damage(path: Path) -> None:
        path.unlink()
        make(path)

    return damage


def bind(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # names of sockets are short
    with socket.socket(socket.AF_UNIX) as place:
        place.bind(path.name)
    os.chdir(here)


def hole(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(1 << 40)


PLACES = {
    "empty": occupy(Path.touch),
    "hole": occupy(hole),
    "text": occupy(lambda path: path.write_text("a checkpoint")),
    "folder": occupy(Path.mkdir),
    "full folder": occupy(lambda path: (path / "x").mkdir(parents=True)),
    "pipe": occupy(os.mkfifo),
    "socket": occupy(bind),
    "link to nothing": occupy(lambda path: path.symlink_to("nowhere")),
    "link to itself": occupy(lambda path: path.symlink_to(path.name)),
    "device": occupy(lambda path: path.symlink_to("/dev/zero")),
    "torch file": occupy(lambda path: torch.save({"format": checkpoint.FORMAT}, path)),
}


def test_what_takes_the_place_of_a_file(run, tmp_path, monkeypatch):
    check_damages(run, tmp_path, PLACES, monkeypatch)


# What was changed and saved again, with a checksum that fits


def write(path: Path, state: object) -> None:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    replace(path, sealed(buffer.getvalue()))


def edited(*keys, value=None, change=None, drop=False):
    """A damage: the entry at the keys is replaced, changed or dropped."""

    def damage(path: Path) -> None:
        state = place = copy.deepcopy(checkpoint.load(path))
        for key in keys[:-1]:
            place = place[key]
        if drop:
            del place[keys[-1]]
        else:
            place[keys[-1]] = change(place[keys[-1]]) if change else value
        write(path, state)

    return damage


NUMBERS = (-5, 99, "x", float("nan"), True, 10**30, None, 1.0, torch.tensor(1), [1])
KEYS = (*("format", "epoch", "step", "row", "history", "ranks", "identity", "teacher_form", "student"),)
KEYS += ("method", "optimizer", "scaler", "ema", "bad_steps", "full_batch")
WEIGHT, MOMENTS = "student.conv.weight", ("optimizer", "state", 0)


def cyclic(before: object) -> dict:
    inner: dict = {}
    inner["x"] = inner
    return inner


def quantised(tensor: torch.Tensor) -> torch.Tensor:
    return torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8)


TENSORS = {
    "shape": lambda tensor: tensor[..., :1],
    "flat": torch.Tensor.flatten,
    "double": torch.Tensor.double,
    "integers": torch.Tensor.long,
    "NaN": lambda tensor: tensor.clone().fill_(torch.nan),
    "infinite": lambda tensor: torch.full_like(tensor, torch.inf),
    "meta": lambda tensor: tensor.to("meta"),
    "sparse": torch.Tensor.to_sparse,
    "quantised": quantised,
    "complex": lambda tensor: tensor + 0j,
    "list": torch.Tensor.tolist,
    "none": lambda tensor: None,
    "cyclic": cyclic,
}
EDITS = {f"without {key}": edited(key, drop=True) for key in KEYS}
EDITS |= {f"{key} is {value!r}": edited(key, value=value) for key in ("epoch", "step") for value in NUMBERS}
EDITS |= {f"{key} is a number": edited(key, value=5) for key in KEYS if key not in ("epoch", "step", "full_batch")}
EDITS |= {f"{key} is empty": edited(key, value={}) for key in KEYS[9:-1]}
EDITS |= {f"{key} is cyclic": edited(key, change=cyclic) for key in KEYS}
EDITS |= {f"weight: {name}": edited("method", WEIGHT, change=change) for name, change in TENSORS.items()}
EDITS |= {f"average: {name}": edited("ema", WEIGHT, change=change) for name, change in TENSORS.items()}
EDITS |= {f"student: {name}": edited("student", "conv.weight", change=change) for name, change in TENSORS.items()}
EDITS |= {f"moment: {name}": edited(*MOMENTS, "exp_avg", change=change) for name, change in TENSORS.items()}
EDITS |= {
    "weight is missing": edited("method", WEIGHT, drop=True),
    "weight too many": edited("method", "more", value=torch.zeros(3)),
    "another format": edited("format", value=1),
    "another form": edited("teacher_form", value="x"),
    "full batch": edited("full_batch", value=-1),
    "full batch is a text": edited("full_batch", value="8"),
    "scale": edited("scaler", "scale", value=float("nan")),
    "scale is a text": edited("scaler", "scale", value="1"),
    "scale below zero": edited("scaler", "scale", value=-2.0),
    "no moment": edited(*MOMENTS, "exp_avg_sq", drop=True),
    "steps of the optimizer": edited(*MOMENTS, "step", value=torch.tensor(-3.0)),
    "steps are a text": edited(*MOMENTS, "step", value="3"),
    "a state too many": edited("optimizer", "state", 99, value={}),
    "no groups": edited("optimizer", "param_groups", value=[]),
    "learning rate is a text": edited("optimizer", "param_groups", 0, "lr", value="x"),
    "no learning rate": edited("optimizer", "param_groups", 0, "lr", drop=True),
    "learning rate below 0": edited("optimizer", "param_groups", 0, "lr", value=-0.1),
    "a group less": edited("optimizer", "param_groups", change=lambda groups: groups[:-1]),
    "numbers of a group": edited("optimizer", "param_groups", 0, "params", change=lambda params: params[::-1]),
    "group without numbers": edited("optimizer", "param_groups", 0, "params", drop=True),
    "counts": edited("bad_steps", "counts", value=torch.tensor([1, -1, 0, 0, 0])),
    "row of the ring": edited("bad_steps", "counts", value=torch.tensor([1, 0, 0, 0, 10**6])),
    "number of an epoch": edited("history", 0, "epoch", value=7),
    "accuracy": edited("history", 0, "top1", value=101.0),
    "accuracy is NaN": edited("history", 0, "top1", value=float("nan")),
    "accuracy is a text": edited("history", 0, "top1", value="x"),
    "no accuracy": edited("history", 0, "top1", drop=True),
    "rate": edited("history", 0, "lr", value=float("inf")),
    "a figure of many digits": edited("history", 0, "ce", value=10**5000),
    "a row too many": edited("history", change=lambda rows: rows * 2),
    "a row of figures": edited("row", value={"epoch": 2, "lr": 0.1}),
    "a row of tensors": edited("row", value=torch.ones(5)),
    "no process": edited("ranks", value=[]),
    "process is a text": edited("ranks", value=["x"]),
    "no loader": edited("ranks", 0, "loader", drop=True),
    "loader is a list": edited("ranks", 0, "loader", value=[1]),
    "epoch of the loader": edited("ranks", 0, "loader", "epoch", value=-5),
    "epoch of the loader is a text": edited("ranks", 0, "loader", "epoch", value="x"),
    "step of the loader": edited("ranks", 0, "loader", "step", value=99),
    "nothing of the images": edited("identity", "images", value=5),
    "options are a list": edited("identity", "options", value=[]),
    "no teacher": edited("identity", "teacher", drop=True),
}
WITHIN = {  # what is there only within an epoch
    **{f"no {part}": edited("ranks", 0, part, drop=True) for part in ("random", "meter", "buffers")},
    **{f"no {part} state": edited("ranks", 0, "random", part, drop=True) for part in ("torch", "python", "numpy")},
    "short torch state": edited("ranks", 0, "random", "torch", change=lambda state: state[:-8]),
    "torch state of zeros": edited("ranks", 0, "random", "torch", change=lambda state: state.float()),
    "python's state": edited("ranks", 0, "random", "python", value=(3, (1, 2), None)),
    "numpy's place": edited("ranks", 0, "random", "numpy", change=lambda state: (*state[:2], 10**6, *state[3:])),
    "numpy's keys": edited("ranks", 0, "random", "numpy", change=lambda state: (state[0], state[1][:5], *state[2:])),
    "sums": edited("ranks", 0, "meter", 0, change=lambda pair: (pair[0], pair[1][:1])),
    "names of sums": edited("ranks", 0, "meter", 0, change=lambda pair: ((5,), pair[1])),
    "sums are NaN": edited("ranks", 0, "meter", 0, change=lambda pair: (pair[0], pair[1] * torch.nan)),
    "meter is a text": edited("ranks", 0, "meter", value="x"),
}


class Code:
    def __reduce__(self):
        return os.system, ("touch touched",)


def pickled(content: object):
    def damage(path: Path) -> None:
        buffer = io.BytesIO()
        torch.save(content, buffer, pickle_module=pickle)
        replace(path, sealed(buffer.getvalue()))

    return damage


def doubled() -> list:
    part: list = []
    for _ in range(60):
        part = [part, part]
    return part


OBJECTS = {
    "code": pickled({"format": checkpoint.FORMAT, "x": Code()}),
    "list": pickled([1, 2]),
    "number": pickled(5),
    "doubled": edited("history", value=doubled()),
    "doubled in a loader": edited("ranks", 0, "loader", change=lambda state: state | {"epoch": doubled()}),
    "keys of tuples": edited("identity", value={((1, 2), 3): 4}),
    "a text of 20 MB": edited("teacher_form", value="x" * 20_000_000),
}


def share(damages: dict, part: int, parts: int = 6) -> dict:
    """Every sixth of the damages."""
    return dict(list(damages.items())[part::parts])


def check_edits(run, folder, damages, monkeypatch, names=("last.pt",)) -> None:
    for words, damage in damages.items():
        for name in names:
            copied = Path(shutil.copytree(run.folder, folder / "copy"))
            damage(copied / name)
            taken, lines = found(run, copied)
            assert taken == ("last-1.pt" if name == "last.pt" else "last.pt"), (words, taken, lines)
            assert len(lines) == 2 - (name != "last.pt") and str(copied / name) in lines[0], (words, lines)
            assert len(lines[0]) < 700 and "\n" not in lines[0] and "content is odd" not in lines[0], (words, lines)
            shutil.rmtree(copied)


PARTS = [*range(4), *(pytest.param(part, marks=pytest.mark.every) for part in (4, 5))]


@pytest.mark.parametrize("part", PARTS)
def test_edited_states(run, tmp_path, monkeypatch, part):
    monkeypatch.chdir(tmp_path)
    check_edits(run, tmp_path, share(EDITS | WITHIN | OBJECTS, part), monkeypatch)
    assert not (tmp_path / "touched").exists()


@pytest.mark.every
@pytest.mark.parametrize("name", ["last-1.pt", "best.pt"])
def test_edited_older_states(run, tmp_path, monkeypatch, name):
    damages = EDITS | OBJECTS | (WITHIN if name == "last-1.pt" else {})
    skipped = {"history is a number", "without format"} if name == "best.pt" else set()
    check_edits(run, tmp_path, {key: damages[key] for key in damages if key not in skipped}, monkeypatch, (name,))


def test_there_are_200_damages():
    """Without those of a weekly run."""
    edits = sum(len(share(EDITS | WITHIN | OBJECTS, part)) for part in range(4))
    assert len(NAMES) * (5 * 4 + len(PLACES)) + edits >= 200


# To the end


FULL = {
    "cut": partial(cut, random=np.random.default_rng(5)),
    "flipped": partial(flip_one, random=np.random.default_rng(6)),
    "folder": PLACES["full folder"],
    "pipe": PLACES["pipe"],
    "moments": EDITS["moment: shape"],
    "epoch": EDITS["epoch is 99"],
}


@pytest.mark.parametrize("damage", FULL.values(), ids=FULL)
def test_the_run_ends_as_without_the_damage(run, folder, capsys, damage):
    damage(folder / "last.pt")
    trainer = run.trainer(folder)
    result = trainer.fit()
    said = capsys.readouterr().out
    assert "going on from last-1.pt" in said and "last.pt is now last.pt.damaged" in said
    assert result.student.read_bytes() == run.result
    assert checkpoint.load(folder / "last.pt")["epoch"] == checkpoint.load(folder / "last-1.pt")["epoch"] + 1 == 2


def test_best_is_taken_if_nothing_else_is_left(run, folder, capsys):
    for name in NAMES[:2]:
        cut(folder / name, np.random.default_rng(1))
    result = run.trainer(folder).fit()
    assert "going on from best.pt" in capsys.readouterr().out and result.student.read_bytes() == run.result


def test_one_line_if_no_state_is_left(run, folder):
    for name in NAMES:
        flip_one(folder / name, np.random.default_rng(2))
    error, lines = found(run, folder)
    assert all(str(folder / name) in error for name in NAMES) and "begin a new run" in error and not lines
    assert {*NAMES} < {*os.listdir(folder)}  # they are left as they were


def test_options_of_the_optimizer_are_those_of_the_run(run, folder):
    """Whatever the file says of them."""
    groups = checkpoint.load(folder / "last.pt")["optimizer"]["param_groups"]
    changed = {"betas": (0.0, 0.0), "weight_decay": 9.0, "eps": 1.0}
    assert changed.keys() <= groups[0].keys()
    edited("optimizer", "param_groups", value=[group | changed for group in groups])(folder / "last.pt")
    assert run.trainer(folder).fit().student.read_bytes() == run.result


def test_an_edited_state_is_no_good_one(run, folder):
    """The next save never keeps a damaged state in the place of a good one."""
    EDITS["moment: shape"](folder / "last.pt")
    assert found(run, folder)[0] == "last-1.pt"
    checkpoint.save_run(folder, run.states["last.pt"])
    assert [run.check(checkpoint.load(path)) for path in checkpoint.candidates(folder)] == ["", "", ""]
