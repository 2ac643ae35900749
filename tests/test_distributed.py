"""Two gloo processes: equal weights, and an epoch in which each image is seen once."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from fastkd.distributed import device_for

WORKER = Path(__file__).parent / "distributed_worker.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def torchrun(*arguments: str) -> subprocess.CompletedProcess:
    done = subprocess.run([*TORCHRUN, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_weights_are_bit_equal_and_each_image_is_seen_once(tmp_path):
    torchrun(str(WORKER), str(tmp_path))
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["weights"].keys() == second["weights"].keys()
    assert all(torch.equal(value, second["weights"][name]) for name, value in first["weights"].items())
    for one, two in zip(first["seen"], second["seen"], strict=True):  # one list of image numbers per epoch
        assert sorted(one + two) == list(range(45))
        assert abs(len(one) - len(two)) <= 1
    assert first["seen"][0] != first["seen"][1]
    assert first["top1"] == second["top1"]


def test_the_command_under_torchrun(tmp_path):
    options = ["--epochs", "1", "--teacher-epochs", "1", "-b", "128", "--no-baseline", "--warmup-epochs", "0"]
    done = torchrun("-m", "fastkd", "train", *options, "--out", str(tmp_path / "run"))
    assert done.stdout.count("everything is in") == 1  # rank 0 alone prints
    (row,) = [json.loads(line) for line in (tmp_path / "run/history.jsonl").read_text().splitlines()]
    assert row["epoch"] == 1 and load_file(tmp_path / "run/student.safetensors")


def test_nccl_is_told_its_device(monkeypatch):
    """Without it, NCCL guesses the device from the rank, and a barrier warns."""
    given = []
    for name, value in {"WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", lambda number: None)
    monkeypatch.setattr("torch.distributed.init_process_group", lambda *kinds, **more: given.append((kinds, more)))
    cuda = torch.device("cuda", 1)
    assert device_for("auto") == cuda and device_for("cpu") == torch.device("cpu")
    assert given == [(("nccl",), {"device_id": cuda}), (("gloo",), {})]
