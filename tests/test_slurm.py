"""Processes that srun starts, with the variables that srun sets."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fastkd import slurm
from fastkd.distributed import command, device_for
from fastkd.errors import UserError

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "examples/slurm.sh"
STEP = {  # of task 5, on the second of two nodes with 4 tasks each
    "SLURM_JOB_ID": "812345",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_NTASKS": "8",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """A program `scontrol` that knows the nodes gpu[07-08] alone."""
    program = tmp_path / "scontrol"
    program.write_text('#!/bin/sh\n[ "$*" = "show hostnames gpu[07-08]" ] || exit 1\necho gpu07\necho gpu08\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)


@pytest.fixture
def outside(monkeypatch):
    """Gives a function that sets variables; before, none of a launcher is set, and afterwards none either."""
    for name in [*os.environ]:
        if name.startswith("SLURM_") or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name)

    def set_all(variables: dict[str, str]) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_all


def test_the_place_of_a_task(scontrol):
    assert slurm.variables(STEP) == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": "17345",
    }


def test_uneven_nodes_and_a_given_address():
    given = STEP | {"SLURM_STEP_TASKS_PER_NODE": "5,3", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    found = slurm.variables(given)
    assert (found["LOCAL_WORLD_SIZE"], found["MASTER_ADDR"], found["MASTER_PORT"]) == ("3", "10.0.0.1", "29500")


@pytest.mark.parametrize(
    "change, local",
    [
        ({"SLURM_TASKS_PER_NODE": "4(x2)"}, "4"),
        ({"SLURM_TASKS_PER_NODE": "6,2"}, "2"),
        ({"SLURM_TASKS_PER_NODE": "3(x2),2", "SLURM_NODEID": "2"}, "2"),
        ({"SLURM_STEP_NUM_NODES": "1", "SLURM_NODEID": "0"}, "8"),
        ({"SLURM_TASKS_PER_NODE": "8", "SLURM_NODEID": "0"}, "8"),
        ({"LOCAL_WORLD_SIZE": "5"}, "5"),
    ],
)
def test_the_tasks_of_a_node_without_those_of_the_step(scontrol, change, local):
    environment = {name: value for name, value in STEP.items() if name != "SLURM_STEP_TASKS_PER_NODE"}
    assert slurm.variables(environment | change)["LOCAL_WORLD_SIZE"] == local


@pytest.mark.parametrize(
    "variables",
    [
        STEP | {"RANK": "0", "WORLD_SIZE": "1"},  # torchrun has set them
        {name: value for name, value in STEP.items() if name != "SLURM_STEP_ID"},  # a batch script
        STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1"},
    ],
)
def test_other_processes_stay_as_they_are(outside, variables):
    outside(variables)
    before = dict(os.environ)
    slurm.join()
    assert dict(os.environ) == before and slurm.tasks_of({}) == 1


@pytest.mark.parametrize(
    "change, message",
    [
        ({"SLURM_PROCID": None}, "SLURM_PROCID is not set"),
        ({"SLURM_LOCALID": "x"}, "SLURM_LOCALID is x"),
        ({"SLURM_STEP_NUM_TASKS": None, "SLURM_NTASKS": None}, "SLURM_NTASKS is not set"),
        ({"SLURM_PROCID": "8"}, "SLURM_PROCID is 8 and SLURM_LOCALID is 1, of 8 tasks"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but srun has started 8 tasks"),
        (
            {"SLURM_STEP_TASKS_PER_NODE": None},
            "8 tasks, but how many .* SLURM_TASKS_PER_NODE is not set.*set LOCAL_WORLD",
        ),
        ({"SLURM_STEP_TASKS_PER_NODE": "4,2"}, "is 4,2, SLURM_NODEID is 1; set LOCAL_WORLD_SIZE"),
        ({"SLURM_NODEID": None}, "SLURM_NODEID is not set"),
        ({"SLURM_NODEID": "2"}, "SLURM_NODEID is 2"),
        ({"SLURM_STEP_NODELIST": "other[1-2]"}, r"the first of the nodes other\[1-2\] is not known.*set MASTER_ADDR"),
    ],
)
def test_half_a_set_is_one_line(scontrol, change, message):
    environment = {name: value for name, value in (STEP | change).items() if value is not None}
    with pytest.raises(UserError, match=message):
        slurm.variables(environment)


def test_half_a_set_of_torchruns_variables_is_one_line(outside):
    outside({"WORLD_SIZE": "2", "RANK": "0"})
    with pytest.raises(UserError, match="WORLD_SIZE is 2, but MASTER_ADDR, MASTER_PORT not set: start"):
        device_for("cpu")


def test_the_command_line_says_what_is_missing(outside, fastkd):
    outside({"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2"})
    status, _, text = fastkd("methods")
    assert status == 2 and text.startswith("fastkd: srun has started this process") and text.count("\n") == 1


def test_a_task_with_one_device_takes_it(outside, monkeypatch):
    """As with --gpus-per-task=1: the other devices of the node are hidden."""
    outside(STEP | {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu07", "MASTER_PORT": "1"})
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.set_device", lambda number: None)
    monkeypatch.setattr("torch.distributed.init_process_group", lambda *given, **named: None)
    assert device_for("cuda") == torch.device("cuda", 0)
    assert command("train", "--resume") == "srun ... fastkd train --resume"


@pytest.mark.parametrize("status, queued", [(75, ["requeue 7"]), (0, []), (2, [])])
def test_the_job_is_queued_again_if_it_was_stopped(fastkd, tmp_path, status, queued):
    """examples/slurm.sh with programs in the place of srun and scontrol that write their arguments down."""
    for name, ends in {"srun": status, "scontrol": 0}.items():
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" > {program}.log\nexit {ends}\n')
        program.chmod(0o755)
    names = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "8"}
    names |= {"PYTHON": "python", "DATA": "digits", "OUT": str(tmp_path / "run")}
    assert subprocess.run(["bash", str(SCRIPT), "--seed", "5"], env=names).returncode == status
    log = tmp_path / "scontrol.log"
    assert (log.read_text().splitlines() if log.exists() else []) == queued
    options = (tmp_path / "srun.log").read_text().split(" -m fastkd ")[1].split()
    status, text, _ = fastkd(*options, "--print-config")
    assert status == 0 and "seed: 5" in text and "student: timm/resnet18" in text


@pytest.mark.libraries
def test_the_scripts_pass_shellcheck():
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    subprocess.run(["shellcheck", SCRIPT, *(ROOT / ".ci").glob("l*"), ROOT / "scripts/check"], check=True)
