"""The CUDA paths on a device on which nothing is computed: each job of tests/null_device/ in a process of its own.

Skipped where g++ or CUDA's headers are missing, unless FASTKD_NULL_DEVICE=required is set, as .ci/run does.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent
JOBS = HERE / "null_device"
MISSING = 77  # exit status of `run`: something is not installed

# One case of each test with the mark "gpu". Left out: tests that compile, as compiled-step does, or draw many shapes,
# each of which compiles kernels; one that measures memory on 4 GB of values; DALI, which brings its own CUDA runtime.
GPU_TESTS = [
    *("tests/kernels", "tests/engine", "tests/data", "-m", "gpu", "--any-values", "--sample=1000"),
    *("-k", "not compile and not anything and not memory_of_eager", "--ignore=tests/data/test_dali.py"),
]

RUNS = {
    "every-method-as-graphs": ["tests/null_device/graphs.py"],
    "every-method-eager": [f"tests/null_device/{job}.py" for job in ("steps", "rules", "losses")],
    "launches-within-budget": ["tests/null_device/launches.py"],
    "options-and-teacher-forms": ["tests/null_device/options.py"],
    "recomputed-blocks": ["tests/null_device/recomputed.py"],
    "faults-stay-fixed": ["tests/null_device/faults.py"],
    "fastkd-train": ["tests/null_device/training.py"],
    "compiled-step": ["tests/null_device/compiling.py"],
    "gpu-tests-with-any-values": GPU_TESTS,
}


def on_null_device(*arguments: str) -> subprocess.CompletedProcess:
    """pytest with these arguments on the null device."""
    paths = os.pathsep.join(map(str, (ROOT, HERE)))
    environment = os.environ | {"PYTHONPATH": paths, "NULL_QUIET": "1", "OMP_NUM_THREADS": "1"}
    for name in [name for name in environment if name.startswith("PYTEST_")]:  # of this process
        del environment[name]
    options = ["-q", "-p", "no:cacheprovider", "-p", "null_device.values", "--assert=plain", "-rfE"]
    command = [JOBS / "run", sys.executable, "-m", "pytest", *options, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="session")
def null_device() -> None:
    """Skips if the device cannot be built."""
    built = subprocess.run([JOBS / "run", sys.executable, "-c", ""], capture_output=True, text=True)
    if built.returncode == MISSING and os.environ.get("FASTKD_NULL_DEVICE") != "required":
        pytest.skip(built.stderr.strip())
    assert built.returncode == 0, built.stderr


@pytest.mark.parametrize("name", RUNS)
def test_on_the_null_device(name, null_device):
    result = on_null_device(*RUNS[name])
    assert result.returncode == 0, result.stdout[-20_000:] + result.stderr[-2_000:]
