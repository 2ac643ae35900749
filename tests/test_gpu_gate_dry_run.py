"""The whole gate, small, on a device that computes nothing; in a copy without git and without an installation."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
START = ROOT / "tests" / "null_device" / "run"
STAGES = ("tests", "steps", "forms", "losses")
LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv", "results", "runs", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis"
)


@pytest.fixture
def gate(tmp_path):
    """`gate()` starts the dry run in a copy of the tree; gives the process."""
    built = subprocess.run([START, sys.executable, "-c", ""], capture_output=True, text=True)
    if built.returncode == 77 and os.environ.get("FASTKD_NULL_DEVICE") != "required":
        pytest.skip(built.stderr.strip())
    assert built.returncode == 0, built.stderr
    shutil.copytree(ROOT, tmp_path / "tree", symlinks=True, ignore=LEFT_OUT)
    words = [START, sys.executable, tmp_path / "tree" / "bench" / "scripts" / "gpu_gate.py", "--dry-run"]
    words += ["--file", tmp_path / "out" / "gate.json"]
    settings = os.environ | {"PYTHONPATH": str(tmp_path / "tree"), "OMP_NUM_THREADS": "1", "NULL_QUIET": "1"}
    for name in ("TRITON_INTERPRET", "PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"):
        settings.pop(name, None)

    def start(*more):
        return subprocess.Popen([*words, *more], cwd=tmp_path, env=settings, stdout=subprocess.PIPE, text=True,
                                stderr=subprocess.STDOUT)  # fmt: skip

    return start


def test_the_dry_run_is_green_though_killed_in_each_stage(gate, tmp_path):
    """What was finished is not run again; the copy has no git, so the commit is the given one, later the file's."""
    path, logs, finished = tmp_path / "out" / "gate.json", [], set()
    for number, stage in enumerate((*STAGES, None)):
        process, lines = gate(*["--commit", "abc"] * (not number)), []
        for line in process.stdout:
            lines.append(line)
            if stage and line.startswith(f"{stage}: "):
                process.kill()
                break
        process.stdout.close()
        status = process.wait()
        logs.append("".join(lines))
        assert status == (-9 if stage else 0), "".join(logs)[-6000:]
        begun = {line.strip() for line in lines if line.startswith(STAGES) and line.count(": ") == 1}
        assert not begun & finished, logs
        if path.exists():
            finished = {key.replace(" ", ": ", 1) for key in json.loads(path.read_text())["seconds"]}
    found, text = json.loads(path.read_text()), path.with_suffix(".md").read_text()
    assert all(found[stage] for stage in STAGES) and found["commit"] == "abc" and found["dry_run"]
    assert "Dry run on a device that computes nothing: no figure here is a measurement." in text
    assert not any("AccumulateGrad" in log for log in logs)  # torch's warning: a backward pass drawn to another stream
    ways = found["steps"]["kd resnet56 -> resnet20 bfloat16"]["contenders"]
    assert 0 < ways["fastkd graph"]["kernels"] < ways["fastkd eager"]["kernels"] and not ways["fastkd graph"]["syncs"]
    assert not (tmp_path / "tree" / "bench" / "results").exists()
