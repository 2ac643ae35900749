"""Processes of a job under torchrun."""

import subprocess

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def processes(word: str) -> list[tuple[int, str]]:
    """(pid, command line) of the processes that have `word` in their command line."""
    listed = subprocess.run(["ps", "-ww", "-eo", "pid,args"], capture_output=True, text=True).stdout.splitlines()
    return [(int(line.split()[0]), line) for line in listed if word in line]
