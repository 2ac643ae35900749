"""Signal trainings at random moments, go on with the same command, and compare as kills.py does.

    python tests/faults/stops.py --signals 200 --minutes 20 --seed 1

A signal comes at a random time, or right after a chosen one of the thousands of events that Python's audit hooks see:
an import, a file that is opened, a thread that starts. Each process must be gone within 20 seconds with status 75, or
outside of a training with that of the signal; nothing may be left, and no step may be lost that was made.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

from kills import SETTINGS, TRAININGS, Attempt, Kills, Setting  # first: it sets the threads
from left import content, difference

SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
GONE_S = 20
SAFE = 75
LOST_PEER = 1


def interrupted(work: Callable[[], int], last: int, name: str) -> int:
    """Work in this process, which sends itself a signal at audit event number `last`; 0: never."""
    ours, seen = os.getpid(), 0
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have set it to be ignored

    def audit(event: str, arguments: tuple) -> None:
        nonlocal seen
        if os.getpid() == ours:
            seen += 1
            if seen == last:
                os.kill(ours, signal.Signals[name])

    sys.addaudithook(audit)
    status = work()
    Path("audited").write_text(str(seen))
    return status


class Stops:
    """Runs, their signals and the comparison."""

    def __init__(self, kills: Kills):
        self.kills, self.random, self.audited = kills, kills.random, dict[str, int]()
        self.statuses, self.seconds, self.problems = Counter[tuple[str, int]](), list[float](), list[str]()
        self.signals = self.ends = self.equal = 0

    def run(self, setting: Setting, signals: int) -> None:
        """One run with at most so many signals, and its comparison."""
        work = setting.work("kd", False)
        key = (setting.name, "kd", False)
        if key not in self.kills.references:
            place = Path(tempfile.mkdtemp(dir=self.kills.folder / "runs"))
            taken = self.kills._once(partial(interrupted, work, 0, ""), place, setting.ranks)
            self.audited[setting.name] = int((place / "audited").read_text())
            self.kills.references[key] = (content(place), *taken)
            shutil.rmtree(place)
        wanted, seconds, _ = self.kills.references[key]
        place = Path(tempfile.mkdtemp(dir=self.kills.folder / "runs"))
        steps: dict[str, int] = {}
        self.kills.shared.clear()
        for turn in range(signals + 1):
            for training in TRAININGS:
                self.kills.shared[f"{training} begun"] = -1
            attempt, name, said = self._attempt(work, setting, place, seconds, turn < signals)
            problem = self._problem(attempt, name, said) or self._lost(attempt, steps)
            if set(attempt.statuses.values()) == {0}:
                self.ends += 1
                problem = problem or difference(wanted, content(place), "")
                self.equal += not problem
            if problem:
                self.problems.append(f"{setting.name}, {name}: {problem}; {attempt.log}\n{said}")
                return
            if set(attempt.statuses.values()) == {0}:
                break
        shutil.rmtree(place)

    def _attempt(
        self, work: Callable[[], int], setting: Setting, place: Path, seconds: float, send: bool
    ) -> tuple[Attempt, str, str]:
        """Work on, and with `send` get a signal: (attempt, name of the signal, what was printed)."""
        name, log, shared = self.random.choice(SIGNALS), place / "log", self.kills.shared
        before = log.stat().st_size if log.exists() else 0
        at_event = send and self.random.random() < 0.5
        last = self.random.randint(1, int(0.8 * self.audited[setting.name])) if at_event else 0
        attempt = Attempt(partial(interrupted, work, last, name), place, shared, setting.ranks)
        if send and not at_event:
            attempt.wait(self.random.uniform(0, 0.8 * seconds))
            start = time.monotonic()
            self.signals += len(attempt.statuses) < setting.ranks
            one = self.random.choice([None, *range(setting.ranks)])  # torchrun signals all, a shell may signal one
            attempt.end(one, signal.Signals[name])
            self._wait(attempt, 60)
            self.seconds.append(time.monotonic() - start)
        else:
            self.signals += at_event
            self._wait(attempt, 120)
        return attempt, name, log.read_text()[before:]

    def _wait(self, attempt: Attempt, seconds: float) -> None:
        """Wait for the end, and end the others as torchrun does when one of them has ended early."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and len(attempt.statuses) < len(attempt.pids):
            attempt.wait(0.1, any_killed=False)
            if any(attempt.statuses.values()):
                attempt.wait(1, any_killed=False)
                attempt.end(number=signal.SIGTERM)
                attempt.wait(until - time.monotonic(), any_killed=False)

    def _problem(self, attempt: Attempt, name: str, said: str) -> str:
        """What is wrong with the end of an attempt, or ""."""
        ended = [value for number in (signal.Signals[name], signal.SIGTERM) for value in (128 + number, -number)]
        for rank in range(len(attempt.pids)):
            status = attempt.statuses.get(rank, "running")
            self.statuses[name, status] += 1
            alone = status == LOST_PEER and len(attempt.pids) > 1 and "another process of this job has ended" in said
            if not alone and status not in (0, SAFE, *ended):
                attempt.end()
                attempt.wait(10)
                return f"status {status} of rank {rank}"
        if "Traceback" in said:
            return "a traceback"
        if self.seconds and self.seconds[-1] > GONE_S:
            return f"gone after {self.seconds.pop():.1f} s"
        left = attempt.left(5)
        return f"still there: {left}" if left else ""

    def _lost(self, attempt: Attempt, steps: dict[str, int]) -> str:
        """What is wrong with the steps that a training went on from: a signal must lose none that was made."""
        problem = ""
        for training in TRAININGS:
            begun, done = (self.kills.shared[f"{training} {note}"] for note in ("begun", "done"))
            if begun >= 0 and steps.get(training, begun) != begun:
                problem = f"{training} made {steps[training]} steps, and went on after step {begun}"
            steps |= {training: done} if done >= 0 else {}
        return problem


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--signals", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="the settings whose names hold this")
    given = parser.parse_args()
    folder, until = Path(tempfile.mkdtemp(prefix="fastkd-stops-")), time.monotonic() + 60 * given.minutes
    (folder / "runs").mkdir()
    stops, number = Stops(Kills(folder, given.seed)), 0
    settings = [each for each in SETTINGS if given.only in each.name]
    while stops.signals < given.signals and time.monotonic() < until:
        stops.run(settings[number % len(settings)], 6)
        number += 1
        print(stops.signals, "signals", stops.ends, "ends", stops.equal, "equal", flush=True)
    print(
        *(f"{name} -> {status}: {times}" for (name, status), times in sorted(stops.statuses.items(), key=str)), sep="\n"
    )
    print(f"slowest: {max(stops.seconds, default=0):.1f} s")
    print(*stops.problems, sep="\n\n")
    if not stops.problems:
        shutil.rmtree(folder)
    return int(bool(stops.problems))


if __name__ == "__main__":
    random.seed(0)
    sys.exit(main())
