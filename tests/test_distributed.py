"""Two gloo processes: equal weights, and an epoch in which each image is seen once."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from fastkd.distributed import device_for, earlier_failure

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


@pytest.mark.parametrize(
    "kind, ranks, line",
    [
        ("bad-option", "0,1", "fastkd: bad-option caf\\udce9"),
        ("bad-file", "1", "fastkd: bad-file caf\\udce9"),
    ],
)
def test_a_job_that_fails_says_why_once(kind, ranks, line):
    """The peer that loses its connection is silent."""
    worker = str(Path(__file__).parent / "failing_worker.py")
    done = subprocess.run([*TORCHRUN, worker, kind, ranks], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "exitcode: 2" in done.stderr  # torchrun's own status; it reports the process's
    assert [text for text in done.stderr.splitlines() if text.startswith("fastkd:")] == [line]
    assert done.stderr.count("Traceback") == 1, done.stderr  # torchrun's own


def test_the_first_failure_of_an_attempt_is_the_one_that_counts(monkeypatch):
    def failure(rank: int, status: int) -> int:
        monkeypatch.setenv("RANK", str(rank))
        return earlier_failure(status)

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_RESTART_COUNT": "0"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert [failure(1, 2), failure(0, 1), failure(2, 130)] == [0, 2, 2]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert [failure(0, 130), failure(1, 1)] == [0, 130]
    monkeypatch.delenv("MASTER_ADDR")  # no torchrun: nothing is hidden
    assert [failure(0, 1), failure(1, 1)] == [0, 0]


@pytest.mark.parametrize(
    "error, lost",
    [
        (RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer"), True),
        (dist.DistBackendError("NCCL communicator was aborted"), True),
        (dist.DistNetworkError("the client socket has timed out"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("gloo/transport"), False),
    ],
)
def test_a_lost_peer_is_one_line(fastkd, monkeypatch, error, lost):
    def run(arguments):
        raise error

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setattr("fastkd.commands.methods.run", run)
    if lost:
        status, _, text = fastkd("methods")
        assert status == 1 and text.startswith("fastkd: another process of this job has ended") and len(text) < 200
        monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(type(error)):
        fastkd("methods")


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
