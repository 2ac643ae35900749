"""`fastkd methods`: the methods by name, with their papers and what they need."""

from dataclasses import make_dataclass

from ..methods import METHODS
from ..parser import run_parser
from ..report import log_rank0, show_table

SUMS = """\
Sums: --method iekd+kd adds the losses of both, on one teacher and one forward pass of each network.
The options then begin with the method's name (--kd-temperature); --kd-weight is kd's factor.
In a sum the cross-entropy with the labels is counted once, as its first method has it.
Staged: one of fastkd's own networks, or a ResNet, MobileNet, VGG, ... of timm or torchvision.
Peers: networks that learn beside the student, by default one of its kind.
`fastkd train --method NAME --help` explains the options."""

ABOUT = "The methods by name, with their papers and what they need. No options."


def run(arguments: list[str]) -> None:
    """The command: a table of METHODS. Any option but --help is an error."""
    run_parser(make_dataclass("Nothing", [], namespace={"__doc__": ABOUT}), arguments, "fastkd methods")
    rows = []
    for name, kind in METHODS.items():
        wanted = [(kind.needs_teacher, "teacher"), (kind.needs_peers, "peers"), (kind.needs_stages, kind.needs_stages)]
        needs = "; ".join(text for needed, text in wanted if needed) or "-"
        rows.append([name, (kind.__doc__ or "").splitlines()[0], kind.paper or "-", needs])
    show_table(["method", "what it is", "paper", "needs"], rows)
    log_rank0(SUMS)
