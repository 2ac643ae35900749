"""timm's task for distillation, LogitDistillationTask (timm 1.0.27 and newer), with the fused loss in place of its own.

The rest is timm's: the teacher by name or as a module, images normalised as the teacher wants them, DDP, torch.compile,
and its train.py, which calls the task. Run it: python examples/timm_task.py
"""

import timm
import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.task import LogitDistillationTask

from fastkd.losses import KDLoss

CROSS_ENTROPIES = torch.nn.CrossEntropyLoss, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy


class FusedDistillationTask(LogitDistillationTask):
    """CE and KD in one kernel, in place of a criterion that is a cross-entropy, with its smoothing.

    Weights and temperature: those of LogitDistillationTask. Images are [B, 3, H, W], labels [B] or soft, [B, classes].
    Raises TypeError for another criterion, such as a binary cross-entropy.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if not isinstance(self.criterion, CROSS_ENTROPIES):
            raise TypeError(f"the fused loss takes the place of a cross-entropy, got {self.criterion}")
        smoothing = getattr(self.criterion, "smoothing", getattr(self.criterion, "label_smoothing", 0.0))
        weights = self.temperature, self.task_loss_weight, self.distill_loss_weight
        self.fused = KDLoss(*weights, label_smoothing=smoothing)

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        """The loss and the student's logits, under timm's names."""
        output = self.trainable_module(input)
        with torch.no_grad():
            wanted = self.teacher(self.teacher.normalize_input(input, self.student_mean, self.student_std))
        return {"loss": self.fused(output, wanted, target), "output": output}


def main(classes: int = 3, steps: int = 20) -> list[float]:
    """Train a small network on random images whose colour is their class; gives the loss of each step."""
    student, teacher = (timm.create_model("resnet10t", num_classes=classes) for _ in range(2))
    task = FusedDistillationTask(student, teacher, torch.nn.CrossEntropyLoss(), temperature=4.0, task_loss_weight=0.5)
    task.train()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05)
    target = torch.randint(classes, (16,))
    images = torch.randn(16, 3, 32, 32) + target[:, None, None, None]
    history = []
    for _ in range(steps):
        loss = task(images, target)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    return history


if __name__ == "__main__":
    print("loss of each step:", *(f"{loss:.3f}" for loss in main()))
