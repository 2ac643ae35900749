"""Under torchrun: a command in which one process fails while the others wait for it. Arguments: the kind, the ranks."""

import os
import sys

import fastkd.commands.methods as command
from fastkd.cli import main
from fastkd.distributed import barrier, device_for
from fastkd.errors import UserError

kind, ranks = sys.argv[1], sys.argv[2].split(",")


def run(arguments: list[str]) -> None:
    if kind != "bad-option":  # options are read before the process group starts
        device_for("cpu")
        barrier()
    if os.environ["RANK"] in ranks:
        raise UserError(f"{kind} caf\udce9")
    barrier()


command.run = run
sys.argv = ["fastkd", "methods"]
main()
