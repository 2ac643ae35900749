"""A plain loop that logs each term of the loss to Weights & Biases. Run it: python examples/wandb_loop.py

MODE = "offline" needs no account and no network: `wandb sync` uploads the run later. The terms are summed on the device
and read once per epoch, so that no step waits for the device.
The digits take the place of your images, and the teacher has random weights: load those of yours.
"""

import torch
import wandb
from torch.utils.data import DataLoader, TensorDataset

from fastkd.data.digits import read_digits
from fastkd.losses import KDLoss
from fastkd.models import create_model

EPOCHS, BATCH_SIZE, LR, MODE = 2, 64, 0.05, "offline"


def main(folder: str = "runs", samples: int = 512) -> list[dict[str, float]]:
    """Train on the first `samples` digits; the log goes to `folder`. Returns the logged row of each epoch."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images, labels = (part[:samples] for part in read_digits())
    loader = DataLoader(TensorDataset(images[:, None].repeat(1, 3, 1, 1), labels), BATCH_SIZE, shuffle=True)
    student, teacher = create_model("resnet8", 10).to(device), create_model("resnet20", 10).to(device).eval()
    optimizer = torch.optim.SGD(student.parameters(), LR, momentum=0.9)
    criterion = KDLoss(temperature=4.0, ce_weight=0.1, kd_weight=0.9)
    history = []
    settings = {"temperature": criterion.temperature, "ce_weight": criterion.ce_weight, "lr": LR}
    with wandb.init(project="distillation", dir=folder, mode=MODE, config=settings) as run:
        for epoch in range(EPOCHS):
            student.train()
            sums = {"ce": torch.zeros((), device=device), "kd": torch.zeros((), device=device)}
            for batch, target in loader:
                batch, target = batch.to(device), target.to(device)
                with torch.no_grad():
                    teacher_logits = teacher(batch)
                terms = criterion.terms(student(batch), teacher_logits, target)  # weighted: their sum is the loss
                optimizer.zero_grad()
                sum(terms.values()).backward()
                optimizer.step()
                for name, term in terms.items():
                    sums[name] += term.detach()
            history.append({f"train/{name}": value.item() / len(loader) for name, value in sums.items()})
            run.log(history[-1], step=epoch + 1)
    return history


if __name__ == "__main__":
    print(*main(), sep="\n")
