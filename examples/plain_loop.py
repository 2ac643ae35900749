"""A plain PyTorch loop that distills: the line with KDLoss is the one that changed."""

import torch
from torch import nn

from fastkd.losses import KDLoss


def train(student: nn.Module, teacher: nn.Module, batches, epochs: int = 2, lr: float = 0.05) -> list[float]:
    """Mean loss of each epoch. `batches`: (images [B, 3, H, W], labels [B]) as often as it is iterated."""
    criterion = KDLoss(temperature=4.0, ce_weight=0.1, kd_weight=0.9)  # was: nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(student.parameters(), lr=lr, momentum=0.9)
    student.train()
    teacher.eval()
    history = []
    for _ in range(epochs):
        total = torch.zeros((), device=next(student.parameters()).device)
        for images, labels in batches:
            with torch.no_grad():
                teacher_logits = teacher(images)
            loss = criterion(student(images), teacher_logits, labels)  # was: criterion(student(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()
        history.append(total.item() / len(batches))
    return history


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


if __name__ == "__main__":  # networks and images of random numbers, to see it run
    random = [(torch.randn(32, 3, 16, 16), torch.randint(10, (32,))) for _ in range(8)]
    print("mean loss of each epoch:", train(small(), small(), random))
