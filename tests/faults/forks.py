"""Trainings in forked processes that a test kills: at a moment, or before the n-th thing that a training does.

A parent imports everything once. An attempt is a fork of it, so that it begins in a tenth of a second. What an attempt
has done is noted in memory that both share: the parent reads it after the kill.
"""

import contextlib
import io
import mmap
import os
import signal
import socket
import struct
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import torch

import fastkd.cli
import fastkd.commands.train
import fastkd.report
from fastkd import create_model, distributed, files
from fastkd.commands.cached import open_cache
from fastkd.config import Config
from fastkd.data import create_loaders
from fastkd.engine.precision import Precision
from fastkd.methods import find_method
from fastkd.models import load_weights
from fastkd.run import checkpoint
from fastkd.train import Trainer

torch.set_num_threads(1)

TRAININGS = ("teacher", "alone", "run")  # of a job, by the names of their folders
NOTES = ("begun", "done", "written")  # steps: where a training began, which are made, which are on the disk
AUDITED = ("os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir")
PATIENCE_S = 600


class Shared:
    """Named integers in memory that a process and its forks share. A step's number that is not known is -1."""

    def __init__(self) -> None:
        self.names = ("events", *(f"{training} {note}" for training in TRAININGS for note in NOTES))
        self.memory = mmap.mmap(-1, 8 * len(self.names))
        self.clear()

    def clear(self) -> None:
        for name in self.names:
            self[name] = -1

    def __getitem__(self, name: str) -> int:
        return struct.unpack_from("q", self.memory, 8 * self.names.index(name))[0]

    def __setitem__(self, name: str, value: int) -> None:
        struct.pack_into("q", self.memory, 8 * self.names.index(name), value)


class Attempt:
    """`work()` in forked processes, one for each rank, in a process group of their own. Rank 0 notes what it does.

    The process of rank `victim` kills itself before thing number `last` that it does; 0: never.
    """

    def __init__(
        self, work: Callable[[], int], folder: Path, shared: Shared, ranks: int = 1, last: int = 0, victim: int = 0
    ):
        self.folder, self.log, self.group = folder, folder / "log", 0
        port, self.statuses = free_port() if ranks > 1 else 0, dict[int, int]()
        self.pids: list[int] = []
        for rank in range(ranks):
            pid = os.fork()
            if pid:
                self.group = self.group or pid
                with contextlib.suppress(OSError):  # the child may have done it
                    os.setpgid(pid, self.group)
                self.pids.append(pid)
                continue
            try:
                os.setpgid(0, self.group)
                self._begin(rank, ranks, port)
                observe(shared if rank == 0 else Shared(), last if rank == victim else 0)
                status = work()
                (folder / "modules").write_text(" ".join(sys.modules))
            except BaseException:
                traceback.print_exc()
                status = 1
            sys.stdout.flush()
            fastkd.cli.kill_workers()
            os._exit(status)

    def _begin(self, rank: int, ranks: int, port: int) -> None:
        """In the child: its folder, its output and its place among the processes."""
        os.chdir(self.folder)
        output = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if ranks > 1:
            values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            values |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in values.items()})

    def wait(self, seconds: float, any_killed: bool = True) -> list[int]:
        """Exit statuses by rank, negative for a signal, of those that have ended by then, or until `any_killed` is."""
        until = time.monotonic() + seconds
        while len(self.statuses) < len(self.pids):
            for rank, pid in enumerate(self.pids):
                if rank not in self.statuses:
                    ended, status = os.waitpid(pid, os.WNOHANG)
                    if ended:
                        self.statuses[rank] = os.waitstatus_to_exitcode(status)
            if time.monotonic() > until or any_killed and -signal.SIGKILL in self.statuses.values():
                break
            time.sleep(0.002)
        return [self.statuses[rank] for rank in sorted(self.statuses)]

    def end(self, rank: int | None = None, number: int = signal.SIGKILL) -> None:
        """Signal the process of one rank, or all that are left."""
        for each, pid in enumerate(self.pids):
            if each not in self.statuses and rank in (None, each):
                os.kill(pid, number)

    def left(self, seconds: float) -> list[str]:
        """The processes of the group, such as workers, that are still there after the seconds."""
        until = time.monotonic() + seconds
        while (found := group(self.group)) and time.monotonic() < until:
            time.sleep(0.02)
        return found


def written(write: Callable[[BinaryIO], object]) -> bytes:
    """What a function writes into a file."""
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


def group(number: int) -> list[str]:
    """The processes of a process group, but for zombies, as /proc shows them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            text = path.read_text()
            state, _, owner = text.rpartition(")")[2].split()[:3]
            if int(owner) == number and state != "Z":
                found.append(text[:60])
    return found


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def command(arguments: Sequence[str], draws: bool = False) -> int:
    """Run `fastkd ...` in this process; gives its exit status. Speeds, which no test compares, are not measured.

    Without `draws` curves.png is empty: it takes half of the time of a small run.
    """
    fastkd.commands.train.speed = lambda *_: 1.0
    if not draws:
        fastkd.report.plot = lambda history: b""
    sys.argv = ["fastkd", *arguments]
    try:
        fastkd.cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def trainer(config: Config) -> int:
    """The training of a configuration, without the command: it begins in a quarter of the time."""
    fastkd.report.plot = lambda history: b""
    options, names = config.train, config.networks
    device = distributed.device_for("cpu")
    ranks = {"rank": distributed.rank(), "world_size": distributed.world_size(), "gather": distributed.gather}
    loaders = create_loaders(config.data, device, seed=options.seed, epochs=options.epochs, **ranks)
    kind, classes = find_method(config.run.method), loaders[0].classes
    torch.manual_seed(options.seed)
    student = create_model(names.student, len(classes))
    teacher = create_model(names.teacher[0], len(classes)) if kind.needs_teacher else None
    peers = [create_model(names.student, len(classes))] if kind.needs_peers else []
    precision = Precision("float32", device)
    cache = open_cache(config, loaders[0], precision, names.weights_of_teachers) if names.teacher_cache else None
    if teacher:
        load_weights(teacher, Path(names.teacher_weights[0]))
    method = kind(student, teacher, config.method, peers)
    Trainer(method, *loaders, replace(options, resume=True), teacher_cache=cache).fit()
    return 0


def observe(shared: Shared, last: int) -> None:
    """Let this process note its steps, and die before thing number `last`: an operation on a file, half of a write, a
    backward pass of any phase, a batch of an evaluation."""
    ours, here, lengths = os.getpid(), os.getcwd(), dict[str, int]()
    shared["events"] = 0
    write_new, save_run, backward = files.write_new, checkpoint.save_run, torch.autograd.backward
    train, make_step, between = Trainer._train, Trainer._make_step, Trainer._between

    def count(before: Callable[[], object] = lambda: None) -> None:
        if os.getpid() != ours:  # a worker
            return
        shared["events"] += 1
        if shared["events"] == last:
            before()
            os.kill(ours, signal.SIGKILL)
            time.sleep(PATIENCE_S)

    def audit(event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            writes = isinstance(path, (str, Path)) and flags & (os.O_WRONLY | os.O_RDWR)
            if writes and os.path.abspath(path).startswith(here):
                count()
        elif event in AUDITED:
            count()

    def write_half(path: Path, content: bytes | Callable[[BinaryIO], object]) -> None:
        def half() -> None:
            whole = content if isinstance(content, bytes) else written(content)
            path.write_bytes(whole[: len(whole) // 2])

        count(half)
        write_new(path, content)

    def counted_backward(*arguments, **settings):
        count()
        return backward(*arguments, **settings)

    def noted_train(self: Trainer) -> None:
        name = self.report.out.name
        lengths[name] = len(self.train_loader)
        shared[f"{name} begun"] = shared[f"{name} done"] = self.steps
        train(self)

    def noted_step(self: Trainer, images: torch.Tensor, target: torch.Tensor) -> float:
        rate = make_step(self, images, target)
        shared[f"{self.report.out.name} done"] = self.steps
        return rate

    def counted_batch(self: Trainer) -> bool:
        count()
        return between(self)

    def noted_save(folder: Path, state: dict, *rest: int) -> None:
        save_run(folder, state, *rest)
        if folder.name in lengths:  # the state of a training, and not of a method's first phase
            shared[f"{folder.name} written"] = state["epoch"] * lengths[folder.name] + state["step"]

    files.write_new, checkpoint.save_run, torch.autograd.backward = write_half, noted_save, counted_backward
    checkpoint.write_new = write_half  # it is imported there by its name
    Trainer._train, Trainer._make_step, Trainer._between = noted_train, noted_step, counted_batch
    sys.addaudithook(audit)


def import_modules(attempt: Attempt) -> None:
    """Import what an attempt that has ended had imported, so that the next ones find it."""
    for name in (attempt.folder / "modules").read_text().split():
        with contextlib.suppress(BaseException):  # some are made by others, and cannot be imported by their name
            __import__(name)
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads must not be forked"
