"""The command line: dispatch to commands/. Bad input gives one line and exit status 2, never a traceback."""

import errno
import io
import os
import sys
from importlib import import_module
from typing import NoReturn

from .errors import UserError, nearest, printable

USAGE = """\
usage: fastkd COMMAND [OPTIONS]

  train     distill a student; with no option at all: handwritten digits, a few minutes on two CPU cores
  cache-teacher   ask the teacher once: its logits on disk, for trainings that load no teacher
  eval      top-1, top-5, loss and images/s of trained weights
  pack      images once decoded, or made smaller, in shards that are read fast: fastkd pack SRC DST
  check-data  which images cannot be read, are odd or are there twice: fastkd check-data DIR
  bench     how long losses and whole training steps take here, beside other ways: fastkd bench loss | step | data
  doctor    what this machine has, and which paths fastkd will take on it
  methods   the methods by name, with their papers and what they need
  recipes   the papers' settings by name: fastkd recipes [--show NAME]

`fastkd COMMAND --help` explains the options. Several GPUs: torchrun --nproc-per-node N -m fastkd train ...
"""

COMMANDS = ("train", "cache-teacher", "eval", "pack", "check-data", "bench", "doctor", "methods", "recipes")
"""Each is a module of commands/ with `run(arguments)`. It is imported when it is asked for: torch takes seconds."""


def main() -> None:
    """The `fastkd` command."""
    # Set before torch is loaded. OpenMP's threads spin while they wait, and block each other when another program uses
    # a core: on two shared cores the digits took 6 minutes with spinning and 2 without. Benchmarks keep the default.
    if sys.argv[1:2] != ["bench"]:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal may lack letters of a file's name
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        command, *arguments = sys.argv[1:] or ["--help"]
        if command in ("-h", "--help"):
            print(USAGE, end="")
        elif command == "--version":
            print(import_module(__package__).__version__)
        elif command in COMMANDS:
            import_module(f".commands.{command.replace('-', '_')}", __package__).run(arguments)
        else:
            near = nearest(command, [*COMMANDS, "--version", "--help"])
            raise UserError(f"unknown command {command!r}{near}; see `fastkd --help`")
        if sys.stdout:
            sys.stdout.flush()  # here, where an error is one line
    except UserError as error:
        _fail(f"fastkd: {error}", 2)
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        _drop_stdout()
        sys.exit(1)
    except KeyboardInterrupt as stop:  # commands/train.py adds how to go on
        _fail("; ".join(["fastkd: stopped", *stop.args]), 130)
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None:
            _drop_stdout()  # files of a run have names, and errors of their own
            _fail(f"fastkd: cannot write the output: {error.strerror}", 2)
        if status := _earlier_failure(1):
            sys.exit(status)
        if not _is_lost_peer(error):
            raise
        _print_error(f"fastkd: another process of this job has ended, so this one stops: {error}")
        sys.exit(1)
    finally:
        dist = sys.modules.get("torch.distributed")
        if dist and dist.is_initialized():
            dist.destroy_process_group()


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
    """True under torchrun with more than one process."""
    return os.environ.get("WORLD_SIZE", "1") not in ("", "1")
