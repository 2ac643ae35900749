"""What each process of test_distributed.py runs: a distillation in which every image carries its number."""

import os
import sys

import torch
from torch import nn

from fastkd import Trainer, TrainOptions
from fastkd.data.order import training_slices
from fastkd.methods import KD

SAMPLES, BATCH = 45, 8
# The trainer makes the process group; under srun the numbers have other names.
RANK = int(os.environ.get("RANK") or os.environ["SLURM_PROCID"])
WORLD_SIZE = int(os.environ.get("WORLD_SIZE") or os.environ["SLURM_NTASKS"])


class Net(nn.Module):
    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.conv, self.bn, self.fc = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, 4)

    def forward(self, images):
        return self.fc(self.bn(self.conv(images)).relu().mean((2, 3)))


class NumberedLoader:
    """45 images over the processes, by the rule of fastkd.data.order; notes which it has handed out."""

    classes, samples = ("a", "b", "c", "d"), SAMPLES

    def __init__(self):
        self.images = torch.randn(SAMPLES, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        self.epoch, self.seen = 0, []
        self.slices = training_slices(SAMPLES, BATCH, RANK, WORLD_SIZE)

    def __len__(self):
        return len(self.slices)

    def __iter__(self):
        order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(self.epoch))
        self.epoch += 1
        self.seen.append([])
        for start, stop in self.slices:
            numbers = order[start:stop]
            self.seen[-1] += numbers.tolist()
            yield self.images[numbers], numbers % 4

    def state_dict(self):
        return {"epoch": self.epoch}

    def load_state_dict(self, state):
        self.epoch = state["epoch"]


class Calls:
    """A callback that notes which of its methods are called."""

    def __init__(self):
        self.names = set()

    def on_step(self, step):
        self.names.add("on_step")

    def on_epoch(self, epoch):
        self.names.add("on_epoch")

    def on_end(self, end):
        self.names.add("on_end")


def main(folder: str) -> None:
    torch.set_num_threads(1)
    loader, val, calls = NumberedLoader(), NumberedLoader(), Calls()
    student = Net(seed=RANK)  # different starts: DDP must make them one
    options = TrainOptions(epochs=3, lr=0.05, device="cpu", out=f"{folder}/run", ema_decay=0.9, mixup=0.5, grad_accum=2)
    trainer = Trainer(KD(student, Net(seed=9)), loader, val, options, callbacks=[calls])
    loader.seen.clear()  # of the look at the first batch
    result = trainer.fit()
    state = {"weights": student.state_dict(), "seen": loader.seen, "top1": result.top1, "calls": sorted(calls.names)}
    torch.save(state, f"{folder}/rank{RANK}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
