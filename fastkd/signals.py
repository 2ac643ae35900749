"""Signals that ask a command to end, and processes that outlive the one that started them.

While a student is trained, SIGTERM, SIGINT, SIGUSR1 (SLURM's warning) and SIGHUP only set a name: the trainer reads it
at the end of a step, saves, and raises Stopped. Everywhere else they end the command at once, by an exception.
A signal that is ignored stays ignored: `nohup` ignores SIGHUP, and a shell's `&` may ignore SIGINT.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import FrameType

EXIT_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: the run is not finished, start the same command again
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
REPEAT_S = 1.0  # Ctrl-C reaches torchrun and its processes, and torchrun sends it on: within this time it is one signal
ORPHAN_S = 20.0  # a process whose torchrun has died may finish its step and save for so long
POLL_S = 0.5
PR_SET_PDEATHSIG = 1  # linux/prctl.h
END = b"\0"
TORCHRUN_DIED = threading.Event()
raised: list[str] = []  # names of the signals that have raised Ended


class Stopped(Exception):
    """The run ended because of a signal, and can go on.

    name: of the signal, such as "SIGTERM". place: such as "after step 120 of 900". again: the command that goes on.
    agreed: every process of the job stops at this place.
    """

    def __init__(self, name: str, place: str, again: str = "", agreed: bool = True) -> None:
        where = f" {place}" if place else ""
        super().__init__(f"stopped by {name}{where}" + (f"; go on with `{again}`" if again else ""))
        self.name, self.place, self.again, self.agreed = name, place, again, agreed
        self.__notes__ = ["In Python, the same Trainer with TrainOptions(out=..., resume=True) goes on"]


class Ended(KeyboardInterrupt):
    """A signal came while nothing is to be saved. `name` is that of the signal."""

    def __init__(self, name: str = "SIGINT") -> None:
        super().__init__()
        self.name = name


@dataclass
class StopRequest:
    """What the trainer reads at the end of each step."""

    name: str = ""
    """The first signal, such as "SIGTERM", or an empty string: go on."""

    def note(self, number: int, frame: FrameType | None = None) -> None:
        """Keep the name of the first signal; a handler for `signal.signal`."""
        self.name = self.name or signal.Signals(number).name


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Inside, a first signal sets the request's name. A second one, a second or more later, ends the process at once.

    A thread hears signals too, so that the second one counts while the main thread waits for a GPU or another process.
    Outside of the main thread, where Python allows no handlers, the request stays empty.
    """
    if raised:
        raise Ended(raised[0])
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    with _handlers(request.note, SIGNALS), _thread_that_hears(Repeated(request)):
        yield request
    if request.name:  # it came after the last look
        raise Ended(request.name)


@contextmanager
def end_on_signals() -> Iterator[None]:
    """Inside, a signal raises Ended. For the main thread.

    Modules in C, such as a reader of files, may turn it into an error of their own: that becomes Ended again. In a
    callback, such as one of a fork, Python drops it: then the next training raises it.
    """
    unraisable, sys.unraisablehook = sys.unraisablehook, _not_of_signals
    try:
        with _handlers(_end, SIGNALS):
            yield
    except Exception as error:
        if isinstance(error, Stopped) or not raised:
            raise
        raise Ended(raised[0]) from None
    finally:
        sys.unraisablehook = unraisable
        raised.clear()


@contextmanager
def names_the_command(again: str, place: str = "") -> Iterator[None]:
    """Inside, a signal raises Stopped with the command `again` that goes on. Stopped gets that command too.

    `place`: such as "before the training began".
    """
    try:
        yield
    except Stopped as stop:
        raise Stopped(stop.name, stop.place, again, stop.agreed) from None
    except (Exception, KeyboardInterrupt) as error:
        if not (name := signal_of(error)):
            raise
        raise Stopped(name, place, again, agreed=False) from None


@contextmanager
def exit_on_signals(status: int = 0) -> Iterator[None]:
    """Inside, a signal ends the process at once, with `status`, or for 0 with that of the signal. For the main thread.

    This is for imports. An exception in the middle of one may be lost in a callback, or become another error: modules
    in C report it as an ImportError.
    """
    with _handlers(partial(_exit, status), SIGNALS):
        yield


@contextmanager
def exit_while_waiting(status: int) -> Iterator[None]:
    """The same for a wait outside of Python, such as for other processes, in which Python runs no handler."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with exit_on_signals(status), _thread_that_hears(partial(_exit, status)):
        yield


def _exit(status: int, number: int, frame: FrameType | None = None) -> None:
    name = signal.Signals(number).name
    if "TORCHELASTIC_RUN_ID" not in os.environ and os.environ.get("RANK", "0") == "0":  # torchrun says why itself
        early = " at the start: nothing was trained or written; run the same command again" * (status == EXIT_AGAIN)
        _say(f"stopped by {name}{early}")
    os._exit(status or exit_status(name))


def signal_of(error: BaseException) -> str:
    """The name of the signal behind an error, or "": the error may be what a module in C has made of it."""
    if isinstance(error, KeyboardInterrupt):
        return error.name if isinstance(error, Ended) else "SIGINT"
    return raised[0] if raised else ""


def _not_of_signals(dropped: "sys.UnraisableHookArgs") -> None:
    """Print an error that Python drops, unless it is Ended, which is not lost."""
    if not isinstance(dropped.exc_value, Ended):
        sys.__unraisablehook__(dropped)


def exit_status(name: str) -> int:
    """The status that a shell shows for a process that the signal `name` ended."""
    return 128 + signal.Signals[name]


def watch_parent() -> None:
    """Under torchrun, end this process when torchrun dies: it gets SIGTERM, and after ORPHAN_S seconds it is gone.

    torchrun ends its processes when it ends, but not when it is killed by SIGKILL, as for memory.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=_wait_for_orphan, args=(os.getppid(),), daemon=True).start()


def begin_worker() -> None:
    """Call this first in a worker process: signals for the whole job are left to the parent, and it dies with it.

    SLURM, systemd and torchrun signal each process of a job; workers are needed until the state is saved.
    """
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent and os.getppid() != parent.pid:  # it died before the line above: nobody would end this process
        os._exit(1)


def kill_workers() -> None:
    """End the worker processes that are left. For the end of the program, where Python would wait for them for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise an error for each
    for worker in multiprocessing.active_children():
        worker.kill()


def _end(number: int, frame: FrameType | None) -> None:
    raised.append(signal.Signals(number).name)
    raise Ended(raised[-1])


@contextmanager
def _handlers(handler: Callable[[int, FrameType | None], None], numbers: Iterable[signal.Signals]) -> Iterator[None]:
    """Install `handler` for those of the signals that are not ignored. The earlier handlers come back."""
    heard = [number for number in numbers if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    earlier = {number: signal.signal(number, handler) for number in heard}
    try:
        yield
    finally:
        for number, before in earlier.items():
            signal.signal(number, before)


@contextmanager
def _thread_that_hears(hear: Callable[[int], object]) -> Iterator[None]:
    """Inside, a thread calls `hear(number)` at each signal, whatever the main thread waits for."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    earlier = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    thread = threading.Thread(target=_listen, args=(read, hear), daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(earlier)
        os.write(write, END)
        thread.join()
        os.close(read)
        os.close(write)


def _listen(read: int, hear: Callable[[int], object]) -> None:
    """Hear the signals that the C handler writes into the pipe."""
    while (byte := os.read(read, 1)) not in (b"", END):
        if byte[0] in SIGNALS:
            hear(byte[0])


@dataclass
class Repeated:
    """Notes the first signal; ends the process at another one, a second or more later."""

    request: StopRequest
    first: float = 0.0

    def __call__(self, number: int) -> None:
        self.request.note(number)
        if not self.first:
            self.first = time.monotonic()
            if os.environ.get("RANK", "0") == "0":
                _say(f"{self.request.name}: saving after this step; a second signal ends at once")
        elif time.monotonic() > self.first + REPEAT_S and not TORCHRUN_DIED.is_set():
            _say(f"ended by a second signal, {signal.Signals(number).name}, before the state was saved")
            os._exit(128 + number)


def _wait_for_orphan(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_S)
    TORCHRUN_DIED.set()  # its signal is no second one: the state of the first may be on its way
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(ORPHAN_S)
    _say(f"torchrun has died, and this process was not done {ORPHAN_S:.0f} s later: it ends")
    os._exit(EXIT_AGAIN)


def _say(message: str) -> None:
    """Print a line to stderr from a thread; stderr may be closed."""
    try:
        os.write(2, f"fastkd: {message}\n".encode())
    except OSError:
        pass
