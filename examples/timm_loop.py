"""timm's training loop (its train.py, train_one_epoch) with mixup, AMP, EMA and its optimizer and schedule.

A comment marks each line that is new or was another one. The teacher sees the mixed images, and the loss takes the
mixed labels. Mixup smooths them; without it, KDLoss(label_smoothing=0.1) does. Run it: python examples/timm_loop.py
"""

import timm
import torch
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, ModelEmaV3

from fastkd.losses import KDLoss  # new


def train(batches, classes: int, student: str = "resnet10t", teacher: str = "resnet18", epochs: int = 2) -> list[float]:
    """Train a timm network and return the mean loss of each epoch.

    batches: pairs of images [B, 3, H, W] and labels [B], B even, as timm's mixup needs.
    student, teacher: names of timm networks.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = timm.create_model(student, num_classes=classes).to(device)
    teacher = timm.create_model(teacher, num_classes=classes).to(device).eval()  # new; yours is trained
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.02, weight_decay=1e-4)
    scheduler, _ = create_scheduler_v2(optimizer, sched="cosine", num_epochs=epochs)
    mixup = Mixup(mixup_alpha=0.2, label_smoothing=0.1, num_classes=classes)
    model_ema = ModelEmaV3(model, decay=0.99)
    train_loss_fn = KDLoss(temperature=1.0, ce_weight=0.5, kd_weight=0.5)  # was: SoftTargetCrossEntropy()
    history = []
    for epoch in range(epochs):
        losses_m = AverageMeter()
        model.train()
        for images, target in batches:
            images, target = mixup(images.to(device), target.to(device))
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                output = model(images)
                with torch.no_grad():  # new
                    wanted = teacher(images)  # new
                loss = train_loss_fn(output, wanted, target)  # was: train_loss_fn(output, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            model_ema.update(model)
            losses_m.update(loss.item(), len(images))
        scheduler.step(epoch + 1)
        history.append(losses_m.avg)
    return history


if __name__ == "__main__":  # random images
    random = [(torch.randn(8, 3, 64, 64), torch.randint(10, (8,))) for _ in range(4)]
    print("mean loss of each epoch:", train(random, classes=10))
