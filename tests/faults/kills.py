"""Kill trainings at random moments, go on with the same command, and compare what they leave with a run of one piece.

    python tests/faults/kills.py --kills 1000 --minutes 30 --seed 1

Half of the kills come at a random time, from the first line of the program to the last. The others come right before
a chosen one of all things that a training does: an operation on a file, half of a write, a backward pass of any phase,
a batch of an evaluation. With two processes one of them is killed, and the other one either as well, or it gets SIGTERM
as from torchrun.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy is imported: a process with threads must not be forked

import numpy as np
import torch
from forks import PATIENCE_S, TRAININGS, Attempt, Shared, command, import_modules, trainer
from left import content, difference
from PIL import Image

from fastkd import create_model
from fastkd.config import parse
from fastkd.weights_file import save_network

INTERVAL = 2  # steps, --checkpoint-every
BASE = [
    *("--student", "resnet8", "--no-baseline", "--warmup-epochs", "0", "--device", "cpu", "--image-size", "16"),
    *("-b", "4", "--epochs", "2", "--checkpoint-every", str(INTERVAL), "--out", "run", "--resume", "auto"),
]
TEACHER = ("--teacher", "resnet14", "--teacher-weights", "../../teacher.safetensors")
TRAINED = ("--teacher", "resnet8", "--teacher-epochs", "1")
CACHED = ["--teacher-cache", "cache", "--views", "1"]
ROTATION = "ce iakd iekd sokd dcm dml ft at fitnet dkd dist rkd sp hardkd ofd iedml iekd+kd".split()
MORE = {"iekd": ["--ae-epochs", "1"], "ft": ["--ae-epochs", "1"], "iekd+kd": ["--iekd-ae-epochs", "1"]}
ALONE = ("ce", "dcm", "dml", "iedml")  # methods without a teacher


@dataclass(frozen=True)
class Setting:
    """One kind of run. `teacher`: the options of its teacher. `rotates`: other methods than kd as well."""

    name: str
    options: list[str]
    ranks: int = 1
    teacher: tuple[str, ...] = TEACHER
    rotates: bool = True
    draws: bool = False
    """Whether the command draws curves.png."""
    short: bool = False
    """Whether it belongs to the short form."""

    def arguments(self, method: str) -> list[str]:
        teacher = [] if method in ALONE else [*self.teacher]
        return ["train", *BASE, *self.options, *teacher, "--method", method, *MORE.get(method, [])]

    def work(self, method: str, direct: bool) -> Callable[[], int]:
        """What a process does: the command, or the training alone."""
        arguments = self.arguments(method)
        return (
            partial(trainer, parse(arguments[1:], lambda line: None))
            if direct
            else partial(command, arguments, self.draws)
        )


FOLDER = ["--data", "../../jpeg", "--loader", "folder", "--workers"]
DALI = ["--data", "../../jpeg", "--loader", "dali", "--workers", "1"]
PACKED = ["--data", "../../packed", "--workers", "1"]
RESIDENT = ["--data", "../../small", "--loader", "resident"]
SETTINGS = [
    Setting("folder", [*FOLDER, "0"], draws=True, short=True),
    Setting("folder, 2 workers", [*FOLDER, "2"]),
    Setting("dali", DALI, short=True),
    Setting("packed", PACKED, short=True),
    Setting("resident", RESIDENT),
    Setting("cached", [*RESIDENT, *CACHED], rotates=False, short=True),
    Setting("cached, packed", [*PACKED, *CACHED], rotates=False),
    Setting("teacher trained first", RESIDENT, teacher=TRAINED),
    Setting("folder, 2 processes", [*FOLDER, "0"], 2),
    Setting("dali, 2 processes", DALI, 2),
    Setting("packed, 2 processes", PACKED, 2),
    Setting("resident, 2 processes", RESIDENT, 2, short=True),
    Setting("cached, 2 processes", [*RESIDENT, *CACHED], 2, rotates=False),
    Setting("teacher trained first, 2 processes", RESIDENT, 2, teacher=TRAINED),
]


@dataclass
class Row:
    """What the kills of a setting have shown."""

    kills: int = 0
    ends: int = 0
    equal: int = 0
    losses: list[int] = field(default_factory=list)  # steps, one for each time that a training went on
    above: int = 0  # losses of more than the interval; a state was then being written
    problems: list[str] = field(default_factory=list)


def make_inputs(folder: Path) -> None:
    """The images, in all forms, and a teacher."""
    numbers = np.random.default_rng(0)
    for name, side, count in (("jpeg", 24, 27), ("small", 16, 27)):
        for number in range(count + 9):
            place = folder / name / ("train" if number < count else "val") / "abc"[number % 3]
            place.mkdir(parents=True, exist_ok=True)
            pixels = numbers.integers(0, 256, (3, 3, 3), np.uint8)
            Image.fromarray(pixels).resize((side, side)).save(place / f"{number}.jpg", quality=95)
    torch.manual_seed(5)
    save_network(folder / "teacher.safetensors", create_model("resnet14", 3), {})


class Kills:
    """Runs, their kills and the comparison, in a folder for temporary files."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.random, self.shared = folder, random.Random(seed), Shared()
        self.references: dict[tuple[str, str, bool], tuple[dict[str, Any], float, int]] = {}
        make_inputs(folder)
        (folder / "packing").mkdir()
        self._once(partial(command, ["pack", "../jpeg", "../packed", "--size", "20"]), folder / "packing")

    def _once(self, work: Callable[[], int], folder: Path, ranks: int = 1) -> tuple[float, int]:
        """Work to the end: (seconds, number of things that rank 0 did)."""
        start = time.monotonic()
        attempt = Attempt(work, folder, self.shared, ranks)
        if attempt.wait(PATIENCE_S) != [0] * ranks:
            attempt.end()
            raise SystemExit(f"exit statuses {attempt.statuses}: {attempt.log.read_text()}")
        seconds = time.monotonic() - start
        import_modules(attempt)
        return seconds, self.shared["events"]

    def reference(
        self, key: tuple[str, str, bool], work: Callable[[], int], ranks: int
    ) -> tuple[dict[str, Any], float, int]:
        """What a run of one piece leaves, its seconds, and the number of things that it did."""
        if key not in self.references:
            place = Path(tempfile.mkdtemp(dir=self.folder / "runs"))
            taken = self._once(work, place, ranks)
            self.references[key] = (content(place), *taken)
            shutil.rmtree(place)
        return self.references[key]

    def run(self, setting: Setting, method: str, direct: bool, row: Row, kills: int) -> None:
        """One run with at most so many kills, and its comparison."""
        work = setting.work(method, direct)
        wanted, seconds, events = self.reference((setting.name, method, direct), work, setting.ranks)
        place = Path(tempfile.mkdtemp(dir=self.folder / "runs"))
        steps: dict[str, tuple[int, int]] = {}  # of a training, by its folder: made, and on the disk
        self.shared.clear()
        while True:
            attempt = self._attempt(work, setting.ranks, place, (seconds, events), kills > 0)
            problem = self._lost(row, steps)
            if kills and -signal.SIGKILL in attempt.statuses.values():
                row.kills, kills = row.kills + 1, kills - 1
            elif any(attempt.statuses.values()):
                problem = problem or f"exit status {attempt.statuses}"
            else:
                row.ends += 1
                problem = problem or difference(wanted, content(place), "")
                row.equal += not problem
                kills = -1
            if left := attempt.left(5):
                problem = problem or f"still there: {left}"
            if problem:
                row.problems.append(f"{method}: {problem}; {attempt.log}")
                return
            if kills < 0:
                shutil.rmtree(place)
                return

    def _attempt(
        self, work: Callable[[], int], ranks: int, place: Path, whole: tuple[float, int], kill: bool
    ) -> Attempt:
        """Work on, and with `kill` be killed within the (seconds, things) that a whole run takes."""
        for training in TRAININGS:
            self.shared[f"{training} begun"] = -1
        victim, last, moment = self.random.randrange(ranks), 0, float(PATIENCE_S)
        if kill and self.random.random() < 0.5:
            moment = self.random.uniform(0, 0.6 * whole[0])
        elif kill:
            last = self.random.randint(1, max(1, int(0.6 * whole[1])))
        attempt = Attempt(work, place, self.shared, ranks, last, victim)
        attempt.wait(moment)
        if kill and len(attempt.statuses) < ranks:
            attempt.end(victim)
            if self.random.random() < 0.5:
                attempt.end(number=signal.SIGTERM)
                attempt.wait(20, any_killed=False)
        attempt.end()
        attempt.wait(10, any_killed=False)
        return attempt

    def _lost(self, row: Row, steps: dict[str, tuple[int, int]]) -> str:
        """Note how many steps each training lost that went on in the last attempt; what is wrong with that, or ""."""
        problem = ""
        for training in TRAININGS:
            begun, done, written = (self.shared[f"{training} {note}"] for note in ("begun", "done", "written"))
            if begun >= 0 and training in steps:
                made, safe = steps[training]
                row.losses.append(made - begun)
                row.above += made - begun > INTERVAL
                if begun < safe:
                    problem = f"{training} went on after step {begun}, and step {safe} was on the disk"
                if made - begun > 2 * INTERVAL:
                    problem = f"{training} lost {made - begun} steps"
            if done >= 0:
                steps[training] = done, written
        return problem


def show(rows: dict[str, Row]) -> None:
    """The table, and a line of sums."""
    print(
        f"{'setting':36}{'kills':>7}{'ends':>6}{'equal':>7}{'went on':>9}{'most lost':>11}{'above ' + str(INTERVAL):>9}"
    )
    total = Row()
    for name, row in [*rows.items(), ("all", total)]:
        most = max(row.losses, default=0)
        print(f"{name:36}{row.kills:7}{row.ends:6}{row.equal:7}{len(row.losses):9}{most:11}{row.above:9}")
        total.kills, total.ends, total.equal = total.kills + row.kills, total.ends + row.ends, total.equal + row.equal
        total.above, total.losses = total.above + row.above, total.losses + row.losses
    for name, row in rows.items():
        print(*(f"{name}: {problem}" for problem in row.problems), sep="\n", end="\n" if row.problems else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=600, help="end after so many minutes, whatever was done")
    parser.add_argument("--each", type=int, default=12, help="kills of one run at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="a few of the settings, kd alone, no command line")
    parser.add_argument("--only", default="", help="the settings whose names hold this")
    given = parser.parse_args()
    settings = [each for each in SETTINGS if given.only in each.name and (each.short or not given.short)]
    rows, until = {each.name: Row() for each in settings}, time.monotonic() + 60 * given.minutes
    folder = Path(tempfile.mkdtemp(prefix="fastkd-kills-"))
    (folder / "runs").mkdir()
    kills, number = Kills(folder, given.seed), 0
    while (done := sum(row.kills for row in rows.values())) < given.kills and time.monotonic() < until:
        setting, turn = settings[number % len(settings)], number // len(settings)
        direct = given.short or turn % 2 == 0 and setting.teacher == TEACHER
        method = "kd" if given.short or turn % 3 == 0 or not setting.rotates else ROTATION[number % len(ROTATION)]
        kills.run(setting, method, direct, rows[setting.name], min(given.each, given.kills - done))
        number += 1
        if not given.short:
            print(f"{setting.name}, {method}, {'Trainer' if direct else 'command'}:", rows[setting.name], flush=True)
    show(rows)
    bad = any(row.problems for row in rows.values())
    if not bad:
        shutil.rmtree(folder)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
