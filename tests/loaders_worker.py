"""What each process of test_distributed.py runs on DataLoaders of the user: 11 images, which carry their number."""

import sys

import torch
from tiny import TinyNet
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from fastkd import Trainer, TrainOptions, distributed
from fastkd.data.adapter import adapt
from fastkd.engine.precision import Precision
from fastkd.errors import UserError
from fastkd.evaluate import evaluate
from fastkd.html_report.compare import compare
from fastkd.methods import CE
from fastkd.run.random_state import seed_all

CPU = torch.device("cpu")


class Images(Dataset):
    classes = tuple("abcd")

    def __len__(self):
        return 11

    def __getitem__(self, number):
        return torch.full((3, 8, 8), float(number)), int(number) % 4


class Whole(Images):
    """Its items are batches."""

    def __getitem__(self, number):
        return torch.full((1, 3, 8, 8), float(number)), torch.tensor([number % 4])


class Own(DataLoader):
    pass


DATA, WEIGHTS = Images(), [1.0] * 11
DATA_OF_ALL = DataLoader(DATA, batch_size=3)


def val_loaders() -> dict[str, DataLoader]:
    own_numbers = range(distributed.rank(), 11, 2)
    return {
        "in order": DataLoader(DATA, batch_size=3),
        "shuffled": DataLoader(DATA, batch_size=3, shuffle=True),
        "last batch dropped": DataLoader(DATA, batch_size=3, drop_last=True),
        "subset": DataLoader(DATA, batch_size=3, sampler=SubsetRandomSampler(torch.arange(3, 10))),
        "padded": DataLoader(DATA, batch_size=3, sampler=DistributedSampler(DATA, shuffle=False)),
        "in batches": DataLoader(DATA, batch_sampler=BatchSampler(DistributedSampler(DATA), 3, False)),
        "whole batches": DataLoader(Whole(), batch_size=None),
        "a data set for each": DataLoader(Subset(DATA, own_numbers), batch_size=4),
        "of one's own": Own(Subset(DATA, own_numbers), batch_sampler=[[0, 1], [2, 3], [*range(4, len(own_numbers))]]),
    }


def train_loaders() -> dict[str, DataLoader]:
    return {
        "shuffled": DataLoader(DATA, shuffle=True),
        "in order": DataLoader(DATA),
        "in batches": DataLoader(DATA, batch_sampler=BatchSampler(RandomSampler(DATA), 3, False)),
        "part": DataLoader(DATA, sampler=SubsetRandomSampler(torch.arange(5))),
        "weighted once": DataLoader(DATA, sampler=WeightedRandomSampler(WEIGHTS, 11, replacement=False)),
        "one seed": DataLoader(
            DATA, sampler=WeightedRandomSampler(WEIGHTS, 11, generator=torch.Generator().manual_seed(1))
        ),
    }


def adapted(train: DataLoader, val: DataLoader, said: list[str] | None = None) -> tuple:
    return adapt(train, val, None, CPU, torch.contiguous_format, (said if said is not None else []).append)


def evaluated(val: DataLoader) -> tuple[int, int, list[int]]:
    """(images of the accuracy, images of the report, the numbers of the images of this process)"""
    torch.manual_seed(0)
    net, precision = TinyNet(), Precision("float32", CPU)
    loader = adapted(DataLoader(DATA, sampler=DistributedSampler(DATA)), val)[1]
    found = compare({"student": net}, loader, precision)
    assert loader.classes == DATA.classes and len(list(loader)) == len(loader)
    seen = [int(image[0, 0, 0]) for images, _ in loader for image in images]
    return evaluate(net, loader, precision)["images"], len(found.target), seen


def refused(train: DataLoader, val: DataLoader) -> str:
    try:
        adapted(train, val)
    except UserError as error:
        return str(error)
    return ""


def resumed(folder: str) -> list[str]:
    """Each process has images of its own. Begun, resumed, and refused where the second process has others."""
    said = []
    for other in (0.0, 0.0, float(distributed.rank())):
        data = TensorDataset(torch.full((16, 3, 8, 8), other), torch.arange(16) % 4)
        loader = DataLoader(Subset(data, range(distributed.rank(), 16, 2)), batch_size=4, shuffle=True)
        options = TrainOptions(epochs=1, out=f"{folder}/run", resume=True, report=False, device="cpu")
        torch.manual_seed(0)
        try:
            said.append(f"{Trainer(CE(TinyNet()), loader, DATA_OF_ALL, options, classes=list('abcd')).fit().top1:.0f}")
        except UserError as error:
            said.append(str(error))
    return said


def main(folder: str) -> None:
    distributed.device_for("cpu")
    torch.set_num_threads(1)
    shared = DataLoader(DATA, sampler=DistributedSampler(DATA))
    own = torch.Generator().manual_seed(distributed.rank())
    for sampler in (
        SubsetRandomSampler(range(distributed.rank(), 10, 2)),
        WeightedRandomSampler(WEIGHTS, 5, True, own),
    ):
        adapted(DataLoader(DATA, sampler=sampler), shared)
    said: list[str] = []
    weighted = adapted(DataLoader(DATA, sampler=WeightedRandomSampler(WEIGHTS, 11)), shared, said)[0]
    state = {
        "val": {name: evaluated(loader) for name, loader in val_loaders().items()},
        "refused": {name: refused(loader, shared) for name, loader in train_loaders().items()},
        "said": said,
        "resumed": resumed(folder),
    }
    seed_all(distributed.rank())  # as the trainer does
    state["drawn"] = [int(image[0, 0, 0]) for images, _ in weighted for image in images]
    state["refused"]["padded"] = refused(shared, Own(DATA, sampler=DistributedSampler(DATA, shuffle=False)))
    state["refused"]["with replacement"] = refused(shared, DataLoader(DATA, sampler=RandomSampler(DATA, True)))
    torch.save(state, f"{folder}/rank{distributed.rank()}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
