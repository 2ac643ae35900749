"""A long run of a tiny network: nothing grows. The long form is `python tests/faults/soak.py`."""

import subprocess
import sys

import pytest
import soak

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def test_a_leak_is_found_and_a_warm_up_is_none():
    """One object more per sample, beside a noise of 0.1 %, and a start at half the level."""
    noise = [1000 + number % 2 for number in range(100)]
    assert abs(soak.drift(noise)) < 0.001
    assert abs(soak.drift([500] * 20 + noise)) < 0.005
    assert soak.drift([value + number for number, value in enumerate(noise)]) > 0.05
    assert soak.drift([0] * 50) == 0 and soak.drift([0] * 50 + [1] * 50) > soak.ALLOWED


def test_a_sample_counts_what_is_opened():
    before = soak.sample(0)
    with open("/dev/null"), subprocess.Popen(["sleep", "100"]) as child:
        after = soak.sample(1)
        child.kill()
    assert after["handles"] == before["handles"] + 1 and after["children"] == before["children"] + 1
    assert before["rss_mb"] >= before["uss_mb"] > 1


@pytest.mark.every
@pytest.mark.parametrize("launcher, steps", [([], 40_000), (TORCHRUN, 20_000)], ids=["one process", "two"])
def test_nothing_grows(launcher, steps):
    command = [sys.executable, *launcher, soak.__file__, "--steps", str(steps), "--minutes", "10"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
