"""Distillation in a plain PyTorch loop. Two lines changed. A comment after each shows the line before.

Run it: python examples/plain_loop.py
"""

import torch
from torch import nn

from fastkd.losses import KDLoss


def train(student: nn.Module, teacher: nn.Module, batches, epochs: int = 2, lr: float = 0.05) -> list[float]:
    """Train the student and return the mean loss of each epoch.

    batches: pairs of images [B, 3, H, W] and labels [B]. It is iterated once per epoch.
    """
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
    """A small network for 10 classes."""
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


if __name__ == "__main__":  # random networks and images
    random = [(torch.randn(32, 3, 16, 16), torch.randint(10, (32,))) for _ in range(8)]
    print("mean loss of each epoch:", train(small(), small(), random))
