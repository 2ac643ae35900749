"""The command line: dispatch to commands/. Bad input gives one line and exit status 2, never a traceback."""

import atexit
import errno
import io
import os
import sys
from importlib import import_module
from typing import NoReturn

from . import slurm
from .errors import UserError, lost_worker, nearest, printable
from .signals import (
    EXIT_AGAIN,
    Ended,
    Stopped,
    end_on_signals,
    exit_on_signals,
    exit_status,
    kill_workers,
    watch_parent,
)

USAGE = """\
usage: fastkd COMMAND [OPTIONS]

  train     distill a student; with no option at all: handwritten digits, a few minutes on two CPU cores
  cache-teacher   ask the teacher once: its logits on disk, for trainings that load no teacher
  eval      top-1, top-5, loss and images/s of trained weights
  export    trained weights as files of timm, torchvision, Hugging Face, ONNX, torch.export, int8: fastkd export RUN
  predict   the classes of pictures: fastkd predict IMAGE... --weights FILE
  pack      images once decoded, or made smaller, in shards that are read fast: fastkd pack SRC DST
  check-data  which images cannot be read, are odd or are there twice: fastkd check-data DIR
  bench     how long losses and whole training steps take here, beside other ways: fastkd bench loss | step | data
  doctor    what this machine has, and which paths fastkd will take on it
  methods   the methods by name, with their papers and what they need
  recipes   the papers' settings by name: fastkd recipes [--show NAME]

`fastkd COMMAND --help` explains the options. Several GPUs: torchrun --nproc-per-node N -m fastkd train ..., or srun.
Exit status: 0 done, 1 an error of the program or of another process, 2 wrong input, 75 a training was stopped by a
signal and saved, or had not begun: run it again (`fastkd train --out DIR --resume auto ...` starts or goes on).
"""

COMMANDS: tuple[str, ...] = ("train", "cache-teacher", "eval", "export", "predict", "pack", "check-data", "bench")
COMMANDS += ("doctor", "methods", "recipes")
"""Each is a module of commands/ with `run(arguments)`. It is imported when it is asked for: torch takes seconds."""


OF_STREAMS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EBADF)
"""Errors of a disk, a terminal or a number of a file that is gone."""


def main() -> None:
    """The `fastkd` command."""
    _open_standard_streams()
    # Set before torch is loaded. OpenMP's threads spin while they wait, and block each other when another program uses
    # a core: on two shared cores the digits took 6 minutes with spinning and 2 without. Benchmarks keep the default.
    if sys.argv[1:2] != ["bench"]:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal may lack letters of a file's name
        sys.stdout.reconfigure(errors="backslashreplace")
    watch_parent()
    atexit.register(kill_workers)
    try:
        slurm.join()
        with end_on_signals():
            _run(*(sys.argv[1:] or ["--help"]))
        if sys.stdout:
            sys.stdout.flush()  # here, where an error is one line
    except UserError as error:
        _fail(f"fastkd: {error}", 2)
    except Stopped as stop:  # every process of the job knows of it, and rank 0 says so
        if not stop.agreed:
            _fail(f"fastkd: {stop}", EXIT_AGAIN)
        if os.environ.get("RANK", "0") == "0":
            _print_error(f"fastkd: {stop}")
        sys.exit(EXIT_AGAIN)
    except Ended as stop:
        _fail(f"fastkd: stopped by {stop.name}", exit_status(stop.name))
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        _drop_stdout()
        if sys.argv[1:2] == ["train"]:
            _fail("fastkd: nobody reads the output any more, so the run ends; go on with --resume", 1)
        sys.exit(1)
    except KeyboardInterrupt:
        _fail("fastkd: stopped", 130)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in OF_STREAMS and error.filename is None:
            _drop_stdout()  # files of a run have names, and errors of their own
            _fail(f"fastkd: cannot write the output: {error.strerror}", 2)
        if message := lost_worker(error):
            _fail(f"fastkd: {message}", 1)
        if status := _earlier_failure(1):
            sys.exit(status)
        if not _is_lost_peer(error):
            raise
        _print_error(f"fastkd: {import_module('.distributed', __package__).why_lost(error)}")
        sys.exit(1)
    finally:
        dist = sys.modules.get("torch.distributed")
        if dist and dist.is_initialized():
            dist.destroy_process_group()


def _open_standard_streams() -> None:
    """Put /dev/null where stdin, stdout or stderr is closed: else the next file, such as a checkpoint, gets its number,
    and what libraries print to stderr lands in that file.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one


def _run(command: str, *arguments: str) -> None:
    """Dispatch to the command's module."""
    if command in ("-h", "--help"):
        print(USAGE, end="")
    elif command == "--version":
        print(import_module(__package__).__version__)
    elif command in COMMANDS:
        with exit_on_signals(EXIT_AGAIN if command == "train" else 0):
            module = import_module(f".commands.{command.replace('-', '_')}", __package__)
        module.run([*arguments])
    else:
        near = nearest(command, [*COMMANDS, "--version", "--help"])
        raise UserError(f"unknown command {command!r}{near}; see `fastkd --help`")


def _fail(message: str, status: int) -> NoReturn:
    """Print the message, unless another process of the job has printed why it ends, and exit."""
    earlier = _earlier_failure(status)
    if not earlier:
        _print_error(message)
    sys.exit(earlier or status)


def _drop_stdout() -> None:
    """Send what is still to be printed nowhere: Python flushes stdout once more when it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print_error(message: str) -> None:
    """Print the message on one line of stderr, whatever letters it has."""
    print(printable(message, getattr(sys.stderr, "encoding", None)), file=sys.stderr, flush=True)


def _earlier_failure(status: int) -> int:
    """The exit status of another process of this job that failed before this one, or 0; `status` is this one's."""
    return import_module(".distributed", __package__).earlier_failure(status) if _is_several() else 0


def _is_lost_peer(error: Exception) -> bool:
    """True if a collective operation failed, in a job of several processes."""
    return _is_several() and import_module(".distributed", __package__).is_lost_peer(error)


def _is_several() -> bool:
    """True under torchrun or srun with more than one process."""
    return os.environ.get("WORLD_SIZE", "1") not in ("", "1")
