"""Processes that srun starts: SLURM's variables in place of those that torchrun would set.

srun gives each task SLURM_PROCID, SLURM_LOCALID, SLURM_NTASKS and others: see "OUTPUT ENVIRONMENT VARIABLES" in
`man srun`. A batch script has most of them too, but no SLURM_STEP_ID: there fastkd is one process.
"""

import os
import re
import subprocess
from collections.abc import Mapping

from .errors import UserError

FIRST_PORT, PORTS = 15000, 10000  # below Linux's ephemeral ports, which begin at 32768


def join() -> None:
    """Set torchrun's variables from srun's, if srun has started this process as one of several.

    What a launcher or the user has set stays. Raises UserError if variables are missing or contradict each other.
    """
    if "RANK" not in os.environ and tasks_of(os.environ) > 1:
        os.environ.update(variables(os.environ))


def tasks_of(environment: Mapping[str, str]) -> int:
    """The number of tasks that srun has started, or 1 outside of srun."""
    if "SLURM_STEP_ID" not in environment:
        return 1
    return _number(environment, "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS")


def variables(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT of this task of srun."""
    tasks = tasks_of(environment)
    rank, local = _number(environment, "SLURM_PROCID"), _number(environment, "SLURM_LOCALID")
    if environment.get("WORLD_SIZE", str(tasks)) != str(tasks):
        raise UserError(
            f"WORLD_SIZE is {environment['WORLD_SIZE']}, but srun has started {tasks} tasks: unset WORLD_SIZE"
        )
    if not local <= rank < tasks:
        raise UserError(f"SLURM_PROCID is {rank} and SLURM_LOCALID is {local}, of {tasks} tasks: start fastkd by srun")
    job, step = (_number(environment, name) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    on_node = _local_tasks(environment, tasks)
    found = {"RANK": rank, "WORLD_SIZE": tasks, "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": on_node}
    found["MASTER_PORT"] = FIRST_PORT + (job + 7 * step) % PORTS  # of two steps at once, each has its own
    given = {name: environment[name] for name in ("MASTER_ADDR", "MASTER_PORT") if environment.get(name)}
    named = {name: str(value) for name, value in found.items()} | given
    return named if "MASTER_ADDR" in named else named | {"MASTER_ADDR": _first_host(environment)}


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    if not text.isdecimal():
        raise UserError(
            f"srun has started this process (SLURM_STEP_ID is set), but {name} is {text or 'not set'}: start fastkd by "
            "srun, which sets it, or unset SLURM_STEP_ID for one process"
        )
    return int(text)


def _local_tasks(environment: Mapping[str, str], tasks: int) -> int:
    """The tasks of this node: an entry of SLURM_STEP_TASKS_PER_NODE or SLURM_TASKS_PER_NODE, such as 8(x3),4."""
    if environment.get("LOCAL_WORLD_SIZE"):
        return _number(environment, "LOCAL_WORLD_SIZE")
    if _nodes(environment) == "1":
        return tasks
    step, job = "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"
    words = environment.get(step) or environment.get(job, "")
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", words):
        counts += [int(count)] * int(times or 1)
    node = environment.get("SLURM_NODEID", "")
    if sum(counts) != tasks or not node.isdecimal() or int(node) >= len(counts):
        raise UserError(
            f"srun has started {tasks} tasks, but how many of them are on this node is not known: {step} or {job} is "
            f"{words or 'not set'}, SLURM_NODEID is {node or 'not set'}; set LOCAL_WORLD_SIZE to the tasks of a node"
        )
    return counts[int(node)]


def _nodes(environment: Mapping[str, str]) -> str:
    return environment.get("SLURM_STEP_NUM_NODES", environment.get("SLURM_NNODES", ""))


def _first_host(environment: Mapping[str, str]) -> str:
    """The host of task 0, as `scontrol show hostnames` gives it; with one node it is this machine."""
    if _nodes(environment) == "1":
        return "127.0.0.1"
    nodes = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_JOB_NODELIST", ""))
    try:
        command = ["scontrol", "show", "hostnames", nodes]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        raise UserError(
            f"the first of the nodes {nodes or '(SLURM_STEP_NODELIST is not set)'} is not known, because `scontrol "
            f"show hostnames` fails ({error}): set MASTER_ADDR to its name"
        ) from None
