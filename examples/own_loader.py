"""fastkd's Trainer on a loader of your own. Run it: python examples/own_loader.py

A training loader follows fastkd.data.base.Loader: it counts its epochs, so that a stopped run goes on with the batches
that it would have had. A loader for evaluation is any iterable of (images, labels). The order of an epoch here depends
on its number alone. The digits take the place of your images.
"""

import torch
from torch import Tensor

from fastkd import Result, Trainer, TrainOptions, create_model
from fastkd.data.digits import read_digits
from fastkd.methods import CE, KD, Method

EPOCHS, BATCH_SIZE, LR = 3, 64, 0.1


class ShuffledLoader:
    """Images [N, 3, H, W] and labels [N] in batches, in another order in each epoch."""

    def __init__(self, images: Tensor, labels: Tensor, classes: tuple[str, ...]):
        self.images, self.labels, self.classes = images, labels, classes
        self.samples = len(labels)  # of an epoch
        self.epoch = 0  # epochs that were begun

    def __len__(self) -> int:
        return -(-self.samples // BATCH_SIZE)

    def __iter__(self):
        order = torch.randperm(self.samples, generator=torch.Generator().manual_seed(self.epoch))
        self.epoch += 1
        for numbers in order.split(BATCH_SIZE):
            yield self.images[numbers], self.labels[numbers]

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch = state["epoch"]


def main(folder: str = "runs/own", samples: int = 512) -> Result:
    """Train a teacher and then the student on the first `samples` digits; the runs go into `folder`.

    A run that is there already goes on where it was, or is finished.
    """
    images, labels = read_digits()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images, labels = images[:, None].repeat(1, 3, 1, 1).to(device), labels.to(device)
    val_loader = list(zip(images[-128:].split(64), labels[-128:].split(64), strict=True))

    def fit(method: Method, name: str) -> Result:
        train_loader = ShuffledLoader(images[:samples], labels[:samples], tuple("0123456789"))
        options = TrainOptions(EPOCHS, LR, out=f"{folder}/{name}", resume=True)
        return Trainer(method, train_loader, val_loader, options).fit()

    teacher, student = create_model("resnet14", 10), create_model("resnet8", 10)
    fit(CE(teacher), "teacher")
    return fit(KD(student, teacher), "student")


if __name__ == "__main__":
    print("top-1 %:", main().top1)
