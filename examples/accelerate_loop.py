"""Distillation in a loop of Hugging Face's Accelerate. Two lines changed. A comment after each shows the line before.

The teacher is not trained, so `prepare` does not get it: it would be wrapped in DDP. It is only moved to the device.
The digits take the place of your images, and the teacher has random weights: load those of yours.
Run it: python examples/accelerate_loop.py, or: accelerate launch examples/accelerate_loop.py
"""

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

from fastkd.data.digits import read_digits
from fastkd.losses import KDLoss
from fastkd.models import create_model

EPOCHS, BATCH_SIZE, LR = 2, 64, 0.05


def main(samples: int = 512) -> list[float]:
    """Train on the first `samples` digits and return the mean loss of each epoch over all processes."""
    accelerator = Accelerator()
    images, labels = (part[:samples] for part in read_digits())
    student = create_model("resnet8", 10)
    teacher = create_model("resnet20", 10).to(accelerator.device).eval()
    optimizer = torch.optim.SGD(student.parameters(), LR, momentum=0.9)
    loader = DataLoader(TensorDataset(images[:, None].repeat(1, 3, 1, 1), labels), BATCH_SIZE, shuffle=True)
    student, optimizer, loader = accelerator.prepare(student, optimizer, loader)
    criterion = KDLoss(temperature=4.0, ce_weight=0.1, kd_weight=0.9)  # was: nn.CrossEntropyLoss()
    history = []
    for _ in range(EPOCHS):
        student.train()
        total = torch.zeros((), device=accelerator.device)
        for batch, target in loader:
            with torch.no_grad(), accelerator.autocast():
                teacher_logits = teacher(batch)
            loss = criterion(student(batch), teacher_logits, target)  # was: criterion(student(batch), target)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            total += loss.detach()
        history.append(accelerator.reduce(total, "mean").item() / len(loader))
    accelerator.print("mean loss of each epoch:", history)
    return history


if __name__ == "__main__":
    main()
