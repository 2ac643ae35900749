"""Real processes, alone and under torchrun: signals, killed ranks and restarts leave what a run of one piece leaves."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import kills
import left
import pytest
from torchrun import TORCHRUN, processes

from fastkd.run import checkpoint

LOADERS = {"folder": [*kills.FOLDER, "2"], "dali": kills.DALI, "packed": kills.PACKED}
EPOCHS = "16"  # long enough for signals to come within the training


@pytest.fixture
def inputs(tmp_path):
    kills.make_inputs(tmp_path)
    (tmp_path / "runs").mkdir()
    command = [sys.executable, "-m", "fastkd", "pack", "jpeg", "packed", "--size", "20"]
    subprocess.run(command, cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
    return tmp_path / "runs"


def start(place: Path, loader: str, *launcher: str) -> subprocess.Popen:
    place.mkdir(exist_ok=True)
    options = kills.Setting(loader, LOADERS[loader]).arguments("kd")
    options[options.index("--epochs") + 1] = EPOCHS
    options[options.index("--out") + 1] = str(place / "run")  # by which the job's processes are found
    command = [sys.executable, *launcher, "-m", "fastkd", *options]
    return subprocess.Popen(command, cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def whole(place: Path, loader: str, *launcher: str) -> dict:
    job = start(place, loader, *launcher)
    said = job.communicate(timeout=600)[1]
    assert job.returncode == 0, said
    return left.content(place)


def training(job: subprocess.Popen, place: Path) -> None:
    """Wait until the job has saved a state that was not there before."""
    file, until = place / "run/last.pt", time.monotonic() + 300
    before = file.stat().st_mtime_ns if file.exists() else 0
    while time.monotonic() < until and job.poll() is None:
        if file.exists() and file.stat().st_mtime_ns != before:
            return
        time.sleep(0.02)
    raise AssertionError((job.poll(), job.communicate()[1]))


@pytest.mark.every
@pytest.mark.parametrize("launcher", [[], TORCHRUN], ids=["one", "torchrun"])
@pytest.mark.parametrize("loader", LOADERS)
def test_three_signals_lose_nothing(inputs, loader, launcher):
    wanted, place, steps = whole(inputs / "whole", loader, *launcher), inputs / "stopped", 0
    for name in ("SIGTERM", "SIGUSR1", "SIGINT"):
        job = start(place, loader, *launcher)
        training(job, place)
        begun = time.monotonic()
        job.send_signal(signal.Signals[name])
        said = job.communicate(timeout=20)[1]
        while processes(str(place)) and time.monotonic() < begun + 20:
            time.sleep(0.1)
        assert not processes(str(place)) and f"stopped by {'SIG' if launcher else name}" in said, said
        assert launcher or job.returncode == 75
        stopped = re.search(r"after step ([\d,]+) of ([\d,]+)", said)
        assert stopped, said
        made, all_steps = (int(number.replace(",", "")) for number in stopped.groups())
        state = checkpoint.load(place / "run/last.pt")
        assert made > steps and state["epoch"] * all_steps // int(EPOCHS) + state["step"] == made
        steps = made
    assert whole(place, loader, *launcher).keys() == wanted.keys()
    assert left.difference(wanted, left.content(place), "") == ""


@pytest.mark.every
def test_a_killed_rank_is_restarted_by_torchrun(inputs):
    wanted, place = whole(inputs / "whole", "packed", *TORCHRUN), inputs / "killed"
    job = start(place, "packed", *TORCHRUN, "--max-restarts", "2")
    for _ in range(2):
        training(job, place)
        ranks = [pid for pid, line in processes(str(place)) if "distributed.run" not in line]
        os.kill(ranks[-1], signal.SIGKILL)
    said = job.communicate(timeout=600)[1]
    assert job.returncode == 0 and not processes(str(place)), said
    assert left.difference(wanted, left.content(place), "") == ""
