"""Distillation in a LightningModule. Run it: python examples/lightning_module.py

FrozenTeacher keeps the teacher out of what Lightning does to a module: it stays in eval mode and has no gradients, and
neither the optimizer, nor DDP, nor a checkpoint contains its weights. It follows the module to its device.
The digits take the place of your images, and the teacher has random weights: load those of yours.
"""

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fastkd.data.digits import read_digits
from fastkd.losses import KDLoss
from fastkd.methods.frozen import FrozenTeacher
from fastkd.models import create_model

EPOCHS, BATCH_SIZE, LR = 2, 64, 0.05


class Distiller(lightning.LightningModule):
    """Trains `student` with KD from `teacher`; both take images [B, 3, H, W] and give logits [B, C]."""

    def __init__(self, student: nn.Module, teacher: nn.Module):
        super().__init__()
        self.student = student
        self.teacher = FrozenTeacher(teacher)
        self.criterion = KDLoss(temperature=4.0, ce_weight=0.1, kd_weight=0.9)  # was: nn.CrossEntropyLoss()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = self.criterion(
            self.student(images), self.teacher(images), labels
        )  # was: ...(self.student(images), labels)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.log("val_top1", 100 * (self.student(images).argmax(1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.student.parameters(), LR, momentum=0.9)


def main(folder: str = "runs/lightning", samples: int = 512) -> Distiller:
    """Train on the first `samples` digits; the checkpoint goes into `folder`."""
    images, labels = read_digits()
    digits = TensorDataset(images[:, None].repeat(1, 3, 1, 1), labels)
    train, val = torch.utils.data.random_split(digits, [samples, len(digits) - samples])
    module = Distiller(create_model("resnet8", 10), create_model("resnet20", 10))
    trainer = lightning.Trainer(max_epochs=EPOCHS, default_root_dir=folder, logger=False, log_every_n_steps=1)
    trainer.fit(module, DataLoader(train, BATCH_SIZE, shuffle=True), DataLoader(val, BATCH_SIZE))
    return module


if __name__ == "__main__":
    main()
