"""Two gloo processes: equal weights, and an epoch in which each image is seen once."""

import json
import os
import re
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from fastkd import rendezvous
from fastkd.distributed import device_for, earlier_failure

WORKER = Path(__file__).parent / "distributed_worker.py"
LOADERS_WORKER = Path(__file__).parent / "loaders_worker.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def torchrun(*arguments: str) -> subprocess.CompletedProcess:
    done = subprocess.run([*TORCHRUN, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def states(folder: Path) -> list[dict]:
    """What the two processes of WORKER have written."""
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The states of both processes after a training under torchrun."""
    folder = tmp_path_factory.mktemp("torchrun")
    torchrun(str(WORKER), str(folder))
    return states(folder)


@pytest.mark.xdist_group("torchrun")
def test_weights_are_bit_equal_and_each_image_is_seen_once(trained):
    first, second = trained
    assert first["weights"].keys() == second["weights"].keys()
    assert all(torch.equal(value, second["weights"][name]) for name, value in first["weights"].items())
    for one, two in zip(first["seen"], second["seen"], strict=True):  # one list of image numbers per epoch
        assert sorted(one + two) == list(range(45))
        assert abs(len(one) - len(two)) <= 1
    assert first["seen"][0] != first["seen"][1]
    assert first["top1"] == second["top1"]


@pytest.mark.xdist_group("torchrun")
def test_rank_0_alone_calls_the_callbacks(trained):
    assert [each["calls"] for each in trained] == [["on_end", "on_epoch", "on_step"], []]


def test_dataloaders_of_the_user_are_shared_out(tmp_path):
    """11 images over two processes: in evaluation each counts once; in training no two processes have the same."""
    torchrun(str(LOADERS_WORKER), str(tmp_path))
    first, second = states(tmp_path)
    assert first["val"].keys() == second["val"].keys() and len(first["val"]) == 9
    for name, (images, compared, seen) in first["val"].items():
        wanted = {"last batch dropped": range(9), "subset": range(3, 10)}.get(name, range(11))
        assert sorted(seen + second["val"][name][2]) == [*wanted], name
        assert images == compared == len(wanted), name
        assert seen and second["val"][name][2]
    assert first["refused"] == second["refused"]
    for name, words in {
        "padded": r"val_loader \(Own with DistributedSampler\) gives 1 images more than once over the 2 processes",
        "with replacement": r"val_loader \(DataLoader with RandomSampler\) gives \d+ images more than once",
        "shuffled": r"the same images to each of the 2 processes \(RandomSampler\): .*DistributedSampler",
        "in order": r"the same images to each of the 2 processes \(SequentialSampler\)",
        "in batches": r"the same images to each of the 2 processes \(RandomSampler\)",
        "part": r"the same images to each of the 2 processes \(SubsetRandomSampler\)",
        "weighted once": r"the same images to each of the 2 processes \(WeightedRandomSampler\)",
        "one seed": "has one seed in several processes, so that they would draw the same images",
    }.items():
        assert re.search(words, first["refused"].pop(name)), name
    assert not first["refused"]
    assert first["said"][0] == "train_loader: each of the 2 processes draws 11 images of its own in an epoch, in all 22"
    assert first["said"][1] == "val_loader: each of the 2 processes evaluates its share of the 11 images"
    assert first["drawn"] != second["drawn"] and len(first["drawn"]) == 11
    assert first["resumed"] == second["resumed"] and first["resumed"][0] == first["resumed"][1]
    assert "the training images (names, sizes or labels) are not those of the run" in first["resumed"][2]


@pytest.mark.xdist_group("torchrun")
def test_tasks_of_srun_train_the_bits_of_torchrun(trained, tmp_path):
    step = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "3", "SLURM_NTASKS": "2", "SLURM_NNODES": "1"}
    tasks = []
    for number in ("0", "1"):
        environment = os.environ | step | {"SLURM_PROCID": number, "SLURM_LOCALID": number, "OMP_NUM_THREADS": "1"}
        tasks.append(subprocess.Popen([sys.executable, str(WORKER), str(tmp_path)], env=environment))
    assert [task.wait(timeout=300) for task in tasks] == [0, 0]
    for one, other in zip(trained, states(tmp_path), strict=True):
        assert one["seen"] == other["seen"] and one["top1"] == other["top1"]
        assert all(torch.equal(value, other["weights"][name]) for name, value in one["weights"].items())


def test_the_command_under_torchrun(tmp_path):
    options = ["--epochs", "1", "--teacher-epochs", "1", "-b", "128", "--no-baseline", "--warmup-epochs", "0"]
    done = torchrun("-m", "fastkd", "train", *options, "--out", str(tmp_path / "run"))
    assert done.stdout.count("everything is in") == 1  # rank 0 alone prints
    (row,) = [json.loads(line) for line in (tmp_path / "run/history.jsonl").read_text().splitlines()]
    assert row["epoch"] == 1 and load_file(tmp_path / "run/student.safetensors")
    page = (tmp_path / "run/report.html").read_text()  # both processes had a part of the validation images
    cells = re.findall(r"<title>(\d), predicted (\d): (\d+) of", page)
    counts = [(int(count), true == predicted) for true, predicted, count in cells]
    images, right = sum(count for count, _ in counts), sum(count for count, is_right in counts if is_right)
    assert images == 355 and 100 * right / images == pytest.approx(row["top1"])


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
    done = subprocess.run([*TORCHRUN, worker, kind, ranks], capture_output=True, text=True, timeout=300)
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
    monkeypatch.setattr(rendezvous, "prefix_of_this_start", "of a node that restarted because of another one")
    assert [failure(1, 2), failure(0, 1)] == [0, 2]
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
    place = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", lambda number: None)
    monkeypatch.setattr("torch.distributed.init_process_group", lambda *kinds, **more: given.append((kinds, more)))
    cuda = torch.device("cuda", 1)
    assert device_for("auto") == cuda and device_for("cpu") == torch.device("cpu")
    waits = {"timeout": timedelta(seconds=1800)}
    assert given == [(("nccl",), {"device_id": cuda, **waits}), (("gloo",), waits)]
