"""Everything that needs a GPU, in one go: the GPU tests, then the benchmarks of the losses.

    python bench/gpu_gate.py              bench/results/<gpu>/<date>-gate.json
    python bench/gpu_gate.py --quick      few rounds, without torch.compile

Exit status 0: all tests pass and every result of fastkd is right. 1: not so; after a red test nothing is timed, and the
file says what failed. 2: no GPU here.
"""

import argparse
import datetime
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from fastkd.bench.cases import cases
from fastkd.bench.command import show
from fastkd.bench.common import commit, environment, write_json
from fastkd.bench.report import losses
from fastkd.report import say

ROOT = Path(__file__).parent.parent
TESTS = {"gpu": ["-m", "gpu", "tests"]}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds, without torch.compile")
    return parser.parse_args()


def main() -> int:
    quick = options().quick
    if not torch.cuda.is_available():
        print("gpu_gate: no CUDA device here; nothing was run", file=sys.stderr)
        return 2
    record = {"gpu": torch.cuda.get_device_name(), "commit": commit(), "environment": environment()}
    record["tests"] = {name: run_tests(words) for name, words in TESTS.items()}
    green = all(tests["status"] == 0 for tests in record["tests"].values())
    if green:
        record["losses"] = losses(cases(torch.device("cuda")), torch.device("cuda"), quick, say)
        show(record["losses"])
    path = ROOT / "bench" / "results" / slug(record["gpu"]) / f"{datetime.date.today()}-gate.json"
    write_json(path, record)
    say(f"{'green' if green else 'a test is red, so nothing was timed'}; {path}")
    return 0 if green and all_right(record["losses"]) else 1


def run_tests(words: list[str]) -> dict:
    """Status, seconds and the end of what pytest printed."""
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "--color=no", *words]
    settings = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    start = time.perf_counter()
    run = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True)
    tail = (run.stdout + run.stderr).strip().splitlines()[-40:]
    say(f"pytest {' '.join(words)}: {tail[-1] if tail else 'printed nothing'}")
    seconds = round(time.perf_counter() - start, 1)
    return {"command": " ".join(command[1:]), "status": run.returncode, "seconds": seconds, "output": tail}


def all_right(measured: dict) -> bool:
    return all(record["contenders"]["fastkd"]["status"] == "right" for record in measured["cases"])


def slug(gpu: str) -> str:
    """NVIDIA H100 80GB HBM3 -> h100-80gb-hbm3"""
    return gpu.lower().removeprefix("nvidia ").replace(" ", "-")


if __name__ == "__main__":
    sys.exit(main())
