"""A training that is killed at any moment goes on with the same command, and leaves what it leaves otherwise."""

import re
import subprocess
import sys
from pathlib import Path

import kills
import left
import pytest
import torch


def table(script: str, *options: str) -> str:
    """What a script of kills prints, after it has found nothing wrong."""
    command = [sys.executable, str(Path(__file__).with_name(script)), *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_kills_in_every_loader_leave_the_same_bits():
    rows = table("kills.py", "--kills", "50", "--each", "13", "--short").splitlines()
    name, killed, ends, equal, went_on, most, _ = re.split(r" {2,}", rows[-1].strip())
    assert (name, killed) == ("all", "50") and int(ends) == int(equal) >= 4
    assert int(went_on) >= 10 and int(most) <= 2 * kills.INTERVAL


@pytest.mark.every
def test_kills_in_every_setting_leave_the_same_bits():
    assert "all" in table("kills.py", "--kills", "400")


@pytest.mark.every
def test_signals_in_every_setting_lose_no_step():
    assert "slowest" in table("stops.py", "--signals", "100")


def test_the_comparison_sees_one_bit_one_name_and_one_figure():
    part = {"net": {"w": torch.ones(3), "n": torch.tensor(float("nan"))}, "history": [{"top1": 4.0, "train_s": 3.0}]}
    same = {"net": {"w": torch.ones(3), "n": torch.tensor(float("nan"))}, "history": [{"top1": 4.0, "train_s": 9.0}]}
    assert left.difference(left.without_times(part), left.without_times(same), "") == ""
    for changed, where in (
        ({"net": part["net"] | {"w": torch.tensor([1.0, 1.0, 1.0000001])}, "history": part["history"]}, "/net/w"),
        ({"net": part["net"] | {"w": torch.ones(3, dtype=torch.float64)}, "history": part["history"]}, "/net/w"),
        ({"net": {"w": torch.ones(3)}, "history": part["history"]}, "/net"),
        ({"net": part["net"], "history": [{"top1": 4.5}]}, "/history/0"),
    ):
        assert left.difference(part, changed, "").startswith(where)
