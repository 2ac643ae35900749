"""Two runs in one folder: the second one ends with a line, whatever became of the first."""

import os
import subprocess
import sys

import pytest

from fastkd.errors import UserError
from fastkd.run import lock
from fastkd.run.folder import claim_folder

HOLD = """
import sys
from pathlib import Path
from fastkd.run import lock
lock.hold(Path(sys.argv[1]))
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize("resume", [False, True], ids=["fresh", "resume"])
def test_a_second_run_is_told_who_uses_the_folder(tmp_path, other, resume):
    with pytest.raises(UserError, match=rf"in use by process {other.pid} on .*; wait for it or end it, or choose"):
        claim_folder(tmp_path, {"epochs": 1}, resume)
    assert [file.name for file in tmp_path.iterdir()] == [lock.NAME]  # nothing was written


def test_the_lock_of_a_killed_run_is_gone(tmp_path, other):
    other.kill()
    other.wait()
    assert claim_folder(tmp_path, {"epochs": 1}, resume=True)
    lock.release(tmp_path)


def test_a_folder_can_be_used_again_after_a_refusal_and_after_a_run(tmp_path):
    claim_folder(tmp_path, {"epochs": 1}, resume=False)
    assert not claim_folder(tmp_path, {"epochs": 1}, resume=True)  # the same process: a job and its trainer
    lock.release(tmp_path)
    with pytest.raises(UserError, match="not empty"):
        claim_folder(tmp_path, {"epochs": 1}, resume=False)
    done = subprocess.run([sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.DEVNULL, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_no_lock_is_left_in_a_folder_of_something_else(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="holds no run; choose"):
        claim_folder(tmp_path, {}, resume=False)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_link_at_the_name_of_the_lock_is_not_followed(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "run").mkdir()
    os.symlink(tmp_path / "victim", tmp_path / "run" / lock.NAME)
    with pytest.raises(UserError, match="cannot use --out"):
        claim_folder(tmp_path / "run", {}, resume=False)
    assert (tmp_path / "victim").read_text() == "precious"
