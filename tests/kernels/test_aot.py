"""What the compiler makes of the kernels for three generations of GPUs, without one: see bench/scripts/aot.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

SCRIPT = Path(__file__).parents[2] / "bench" / "scripts" / "aot.py"

pytestmark = pytest.mark.aot


@pytest.fixture(scope="module")
def rows():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, SCRIPT, "--json"], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.skipif(
    tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8), reason="Triton 3.6 spills up to 204 bytes in some"
)
def test_no_register_is_spilled(rows):
    assert {row["figures"]["sm"] for row in rows} == {80, 90, 100}
    assert [row for row in rows if row["figures"]["spilled"]] == []


def test_accesses_are_wide_where_the_classes_are_a_multiple_of_8(rows):
    wide = [
        row["figures"]
        for row in rows
        if row["case"].startswith(("KD", "DML", "SOKD", "DKD")) and not row["case"].endswith((" 100", "21841"))
    ]
    assert len(wide) >= 24
    assert {(figures["load bits"], figures["store bits"]) for figures in wide} == {(128, 128)}
