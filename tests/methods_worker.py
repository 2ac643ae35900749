"""What each process of the DDP test in methods/test_contract.py runs: some steps of every method."""

import copy
import sys
from functools import partial
from pathlib import Path

import torch
from every_method import NAMES, batch, build, freeze_statistics, prepare

from fastkd import TrainOptions, distributed
from fastkd.engine import Step

CPU = torch.device("cpu")


def as_in_life(name: str, folder: Path) -> dict:
    """BatchNorm in train mode, the method's own preparation in parallel, other images and other starts per process."""
    method = build(name, seed=distributed.rank(), taught=False)
    step = Step(method, TrainOptions(lr=0.05, grad_accum=2), CPU)
    prepare(method, folder / name, parallel=partial(distributed.parallel, device=CPU))
    for number in range(2):
        for plan in method.plans(number):
            step(*batch(2 * number + distributed.rank(), 8), plan)
    distributed.average_buffers(method)
    return copy.deepcopy(method.state_dict())


def exactly(name: str) -> dict:
    """BatchNorm in eval mode: two halves of a batch must train as the whole batch does in one process."""
    method = build(name, seed=5 + distributed.rank(), taught=False)
    step = Step(method, TrainOptions(lr=0.02, weight_decay=0.5), CPU)
    prepare(method)
    freeze_statistics(method)
    for number in range(3):
        images, target = (part.chunk(distributed.world_size())[distributed.rank()] for part in batch(number))
        for plan in method.plans(number):
            step(images, target, plan)
    return copy.deepcopy(method.state_dict())


def main(folder: Path) -> None:
    distributed.device_for("cpu")
    torch.set_num_threads(1)
    for name in NAMES:
        (folder / name).mkdir(exist_ok=True)
        try:
            state = {"life": as_in_life(name, folder), "exact": exactly(name)}
        except Exception as error:
            raise RuntimeError(f"method {name} in two processes") from error
        torch.save(state, folder / name / f"rank{distributed.rank()}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
