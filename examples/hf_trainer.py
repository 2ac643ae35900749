"""Distillation with transformers' Trainer: compute_loss is overridden. Run it: python examples/hf_trainer.py

The digits take the place of your images, and the teacher has random weights: use
AutoModelForImageClassification.from_pretrained for yours.
"""

from torch import nn
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from fastkd.data.digits import read_digits
from fastkd.losses import KDLoss

EPOCHS, BATCH_SIZE, LR = 3, 64, 2e-3


class DistillationTrainer(Trainer):
    """A Trainer whose model learns from `teacher` too. Teacher and model take pixel_values [B, 3, H, W]."""

    def __init__(self, *arguments, teacher: nn.Module, **settings):
        super().__init__(*arguments, **settings)
        self.teacher = teacher.to(self.args.device).eval().requires_grad_(False)
        self.criterion = KDLoss(temperature=4.0, ce_weight=0.1, kd_weight=0.9)
        self.model_accepts_loss_kwargs = False  # KDLoss is a mean, so accumulated gradients must be divided

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["labels"]
        outputs = model(pixel_values=inputs["pixel_values"])  # without labels: the model computes no loss of its own
        teacher_logits = self.teacher(pixel_values=inputs["pixel_values"]).logits
        loss = self.criterion(outputs.logits, teacher_logits, labels)
        return (loss, outputs) if return_outputs else loss


def vit(width: int, layers: int) -> ViTForImageClassification:
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
    return ViTForImageClassification(
        ViTConfig(image_size=32, patch_size=8, num_attention_heads=4, num_labels=10, **sizes)
    )


def main(folder: str = "runs/hf", samples: int = 512) -> list[float]:
    """Train on the first `samples` digits and return the mean loss of each epoch."""
    settings = {"num_train_epochs": EPOCHS, "per_device_train_batch_size": BATCH_SIZE, "learning_rate": LR}
    arguments = TrainingArguments(folder, logging_strategy="epoch", save_strategy="no", report_to="none", **settings)
    digits = zip(*(part[:samples] for part in read_digits()), strict=True)
    dataset = [{"pixel_values": image.expand(3, -1, -1), "labels": label} for image, label in digits]
    trainer = DistillationTrainer(vit(32, 2), arguments, train_dataset=dataset, teacher=vit(64, 4))
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


if __name__ == "__main__":
    print("mean loss of each epoch:", main())
