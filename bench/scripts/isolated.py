"""Runs a job in a process of its own, with a time limit, so that a GPU that breaks does not break the next job.

After a CUDA error every later call of the same process fails. So each job is forked from a parent that has imported
everything and never touches CUDA: it gets a fresh CUDA context, and no job pays for the imports (5 s each). What the
job keeps along the way survives its end by force.
"""

import ctypes
import gc
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from fastkd.bench import Record, first_line, write_json

Keep = Callable[[Record], None]
Work = Callable[[Keep], Record]
"""`work(keep)` gives a job's record. `keep(record)` saves what there is so far."""


def run_isolated(work: Work, limit: float, log: Callable[[str], None]) -> Record:
    """The record of `work`, with the key "error" if it failed; its output goes to `log`, line by line.

    After `limit` seconds the process is killed, and the record has what was kept until then and "timed_out".
    """
    with tempfile.TemporaryDirectory() as folder:
        result, output = Path(folder) / "result.json", Path(folder) / "output.txt"
        output.touch()
        process = multiprocessing.get_context("fork").Process(target=_child, args=(work, result, output))
        process.start()
        with output.open(errors="replace") as lines:
            timed_out, last = _follow(process, lines, time.monotonic() + limit, log)
        found: Record = json.loads(result.read_text()) if result.is_file() else {}
        if timed_out:
            found |= {"error": f"timed out after {limit:.0f} s; its last line: {last}", "timed_out": True}
        elif process.exitcode:
            found.setdefault("error", f"its process ended with status {process.exitcode}; its last line: {last}")
        return found


def _follow(process, lines, end: float, log: Callable[[str], None]) -> tuple[bool, str]:  # type: ignore[no-untyped-def]
    """Log the lines of the process until it ends or its time is up: (whether it was killed, its last line)."""
    last, rest, alive = "none", "", True
    while alive:
        process.join(0.05)
        alive = process.is_alive()
        *whole, rest = (rest + lines.read()).split("\n")
        for line in filter(str.strip, whole):
            log(line)
            last = line.strip()
        if alive and time.monotonic() > end:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join()
            return True, last
    return False, last


def die_with_parent() -> None:
    """The kernel kills this process when its parent ends, also if that is killed."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG


def _child(work: Work, result: Path, output: Path) -> None:
    os.setsid()  # so that the processes it starts are killed with it
    die_with_parent()
    gc.freeze()  # a collection here must not free what the parent has made
    sys.stdout = sys.stderr = output.open("a", buffering=1)
    os.dup2(sys.stdout.fileno(), 1)  # for what does not print by way of Python
    os.dup2(sys.stdout.fileno(), 2)
    status = 0
    try:
        write_json(result, work(lambda record: write_json(result, record)))
    except Exception as error:
        kept = json.loads(result.read_text()) if result.is_file() else {}
        write_json(result, kept | {"error": first_line(error)})
        status = 1
    sys.stdout.flush()
    os._exit(status)  # nothing is torn down: a broken device could hang there
