"""torchvision's training loop (references/classification/train.py) with MixUp, CutMix, AMP, EMA and its schedule.

Three lines changed. A comment after each shows the line before. The digits take the place of ImageNet's images, and the
teacher has random weights: load those of yours. Run it: python examples/torchvision_loop.py
"""

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset, default_collate
from torchvision.models import resnet18, resnet34
from torchvision.transforms import v2

from fastkd.data.digits import read_digits
from fastkd.losses import KDLoss

EPOCHS, WARMUP_EPOCHS, BATCH_SIZE, LR, CLASSES = 3, 1, 64, 0.05, 10


def train_one_epoch(model, teacher, criterion, optimizer, data_loader, device, model_ema):  # was: without teacher
    model.train()
    total = torch.zeros((), device=device)
    for image, target in data_loader:
        image, target = image.to(device), target.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = criterion(model(image), teacher(image), target)  # was: criterion(model(image), target)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        model_ema.update_parameters(model)
        total += loss.detach()
    return total.item() / len(data_loader)


def main(samples: int = 512) -> list[float]:
    """Train on the first `samples` digits and return the mean loss of each epoch."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images, labels = (part[:samples] for part in read_digits())
    mix = v2.RandomChoice([v2.MixUp(alpha=0.2, num_classes=CLASSES), v2.CutMix(alpha=1.0, num_classes=CLASSES)])
    dataset = TensorDataset(images[:, None].repeat(1, 3, 1, 1), labels)
    data_loader = DataLoader(dataset, BATCH_SIZE, shuffle=True, collate_fn=lambda batch: mix(*default_collate(batch)))
    model = resnet18(num_classes=CLASSES).to(device)
    teacher = resnet34(num_classes=CLASSES).to(device).eval().requires_grad_(False)
    criterion = KDLoss(temperature=1.0, ce_weight=0.5, kd_weight=0.5, label_smoothing=0.1)  # was: CrossEntropyLoss(...)
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9, weight_decay=1e-4)
    warmup = LinearLR(optimizer, 0.01, total_iters=WARMUP_EPOCHS)
    cosine = CosineAnnealingLR(optimizer, EPOCHS - WARMUP_EPOCHS)
    scheduler = SequentialLR(optimizer, [warmup, cosine], milestones=[WARMUP_EPOCHS])
    model_ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99), use_buffers=True)
    history = []
    for _ in range(EPOCHS):
        history.append(train_one_epoch(model, teacher, criterion, optimizer, data_loader, device, model_ema))
        scheduler.step()
    return history


if __name__ == "__main__":
    print("mean loss of each epoch:", main())
