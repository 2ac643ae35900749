"""The runs of peer.py: the images, the teacher, and one training by timm or by fastkd. Each is a process of its own."""

import contextlib
import io
import json
import tempfile
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from PIL import Image
from torch import Tensor, nn

from fastkd import bench
from fastkd.bench import Record
from fastkd.bench.fashion import CLASSES, read_part
from fastkd.commands import train as command
from fastkd.data.base import IMAGENET_MEAN, IMAGENET_STD
from fastkd.methods import KD
from fastkd.models import create_model
from fastkd.network_options import NetworkOptions
from fastkd.train import Trainer

HAS_CACHE = "teacher_cache" in {option.name for option in fields(NetworkOptions)}
LR, MOMENTUM, DECAY = 0.05, 0.9, 1e-4  # learning rate and momentum are the defaults of timm's train.py
KD_OPTIONS = KD.Options()


@dataclass(frozen=True)
class Pair:
    """Two networks and what they are trained on. `images` are [training, evaluation]."""

    teacher: str
    student: str
    image_size: int
    images: tuple[int, int]
    epochs: int
    teacher_epochs: int
    batch_size: int = 64
    side: int = 112  # pixels of the JPEG files
    workers: int = 2
    views: int = 2  # of the cache


PAIRS = {
    "small": Pair("resnet56", "resnet20", 32, (2000, 500), epochs=5, teacher_epochs=4),
    "large": Pair("timm/resnet50", "timm/resnet18", 64, (1500, 500), epochs=4, teacher_epochs=3),
}


def make_folder(pair: Pair, folder: Path) -> Path:
    """`folder`/train and /val of Fashion-MNIST as colour JPEGs of quality 90, made once."""
    done = folder / "done"
    if not done.is_file():
        for part, count in zip(("train", "val"), pair.images, strict=True):
            images = read_part(part == "train", count)
            for number, (image, label) in enumerate(zip(images.images, images.target.tolist(), strict=True)):
                place = folder / part / CLASSES[label].replace(" ", "-")
                place.mkdir(parents=True, exist_ok=True)
                picture = Image.fromarray(image[:, :, 0].numpy()).resize((pair.side,) * 2, Image.Resampling.BICUBIC)
                picture.convert("RGB").save(place / f"{number:05}.jpg", quality=90)
        done.touch()
    return folder


def words_of(pair: Pair, folder: Path, seed: int, epochs: int) -> list[str]:
    """The options of fastkd that all of its trainings share; the learning rate falls as a cosine, to 0."""
    return [
        *("--data", str(folder), "--image-size", str(pair.image_size), "--batch-size", str(pair.batch_size)),
        *("--epochs", str(epochs), "--lr", str(LR), "--opt", "nesterov", "--momentum", str(MOMENTUM)),
        *("--weight-decay", str(DECAY), "--no-decay-norms", "--seed", str(seed), "--workers", str(pair.workers)),
        *("--no-baseline", "--device", "cpu"),
    ]


def train_teacher(pair: Pair, folder: Path, out: Path) -> Path:
    """The weights of the teacher of all runs, trained by fastkd with the labels alone unless they are there."""
    weights = out / "student.safetensors"
    if not weights.is_file():
        words = words_of(pair, folder, 0, pair.teacher_epochs)
        command.run([*words, "--method", "ce", "--student", pair.teacher, "--out", str(out), *_resume(out)])
    return weights


def _resume(out: Path) -> list[str]:
    return ["--resume"] if (out / "config.yaml").is_file() else []


def run_way(way: str, name: str, pair: Pair, folder: Path, weights: Path, seed: int) -> Record:
    """One training in this process; a way that fails has an "error"."""
    with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as out:
        try:
            if way == "timm":
                found = run_timm(pair, folder, weights, seed, Path(out))
            else:
                found = run_fastkd(way, pair, folder, weights, seed, Path(out))
        except Exception as error:
            found = {"error": bench.first_line(error)}
    return found | {"load_average": bench.load_average(), "commit": bench.commit()}


def run_fastkd(way: str, pair: Pair, folder: Path, weights: Path, seed: int, out: Path) -> Record:
    """`fastkd train`. The cache is filled before, by `fastkd cache-teacher`, in a time of its own."""
    words = words_of(pair, folder, seed, pair.epochs)
    words += ["--method", "kd", "--student", pair.student, "--teacher", pair.teacher, "--teacher-weights", str(weights)]
    found: Record = {}
    if way == "cached":
        from fastkd.commands import cache_teacher  # type: ignore[import-not-found, attr-defined, unused-ignore]

        words += ["--views", str(pair.views)]
        start = time.perf_counter()
        cache_teacher.run([*words, "--out", str(out / "cache")])
        found["fill_seconds"] = time.perf_counter() - start
        words += ["--teacher-cache", str(out / "cache")]
    with timed_fit() as seconds:
        start = time.perf_counter()
        command.run([*words, "--out", str(out / "run")])
        whole = time.perf_counter() - start
    rows = [json.loads(line) for line in (out / "run/history.jsonl").read_text().splitlines()]
    return found | {"seconds": seconds[-1], "command_seconds": whole, "top1": rows[-1]["top1"]}


@contextlib.contextmanager
def timed_fit() -> Any:
    """A list to which each training within the block adds its seconds: all epochs, evaluations and checkpoints."""
    fit, seconds = Trainer.fit, list[float]()

    def timed(trainer: Trainer) -> Any:
        start = time.perf_counter()
        result = fit(trainer)
        seconds.append(time.perf_counter() - start)
        return result

    with patch.object(Trainer, "fit", timed):
        yield seconds


def run_timm(pair: Pair, folder: Path, weights: Path, seed: int, out: Path) -> Record:
    """timm's pieces, put together as its train.py does; see peer.py for its settings."""
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.utils import CheckpointSaver, random_seed

    random_seed(seed)
    task, student = timm_task(pair, weights)
    optimizer = create_optimizer_v2(student, "sgd", lr=LR, weight_decay=DECAY, momentum=MOMENTUM)
    start = time.perf_counter()
    train, val = (timm_loader(pair, folder, part) for part in ("train", "val"))
    updates = len(train)
    schedule, _ = create_scheduler_v2(
        optimizer, "cosine", num_epochs=pair.epochs, step_on_epochs=False, updates_per_epoch=updates
    )
    saver = CheckpointSaver(student, optimizer, checkpoint_dir=str(out), recovery_dir=str(out), max_history=1)
    top1 = 0.0
    for epoch in range(pair.epochs):
        task.train()
        for number, (images, target) in enumerate(train, epoch * updates + 1):
            loss = task(images.contiguous(memory_format=torch.channels_last), target)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step_update(num_updates=number)
        top1 = timm_validate(student, val)
        saver.save_checkpoint(epoch, metric=top1)
    return {"seconds": time.perf_counter() - start, "top1": top1}


def timm_task(pair: Pair, weights: Path) -> tuple[nn.Module, nn.Module]:
    """timm's task of logit distillation, with the weights and the temperature of fastkd's kd; and the student."""
    from timm.task import DistillationTeacher, LogitDistillationTask

    nets = [create_model(pair.student, len(CLASSES)), create_model(pair.teacher, len(CLASSES), weights)]
    for net in nets:
        net.to(memory_format=torch.channels_last)
        net.__dict__["pretrained_cfg"] = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}  # fastkd's networks have none
    task = LogitDistillationTask(
        nets[0],
        DistillationTeacher(nets[1].eval(), device=torch.device("cpu")),
        nn.CrossEntropyLoss(),
        task_loss_weight=KD_OPTIONS.ce_weight,
        distill_loss_weight=KD_OPTIONS.kd_weight,
        temperature=KD_OPTIONS.temperature,
        device=torch.device("cpu"),
        verbose=False,
    )
    return task, nets[0]


def timm_loader(pair: Pair, folder: Path, part: str) -> Any:
    """timm's loader of one part, with its prefetcher, which normalises whole batches."""
    from timm.data import create_dataset, create_loader

    return create_loader(
        create_dataset("", root=str(folder), split=part),
        (3, pair.image_size, pair.image_size),
        pair.batch_size,
        is_training=part == "train",
        color_jitter=0.0,
        interpolation="bilinear",
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        num_workers=pair.workers,
        crop_pct=0.875,
        device=torch.device("cpu"),
    )


@torch.inference_mode()
def timm_validate(student: nn.Module, loader: Any) -> float:
    """Top-1 in %, as timm's validate counts it."""
    from timm.utils import AverageMeter, accuracy

    student.eval()
    meter = AverageMeter()
    for images, target in loader:
        logits: Tensor = student(images.contiguous(memory_format=torch.channels_last))
        meter.update(accuracy(logits, target)[0].item(), len(images))
    return float(meter.avg)


def settings() -> Record:
    """What must be equal in all runs of one file."""
    pairs = {name: asdict(pair) for name, pair in PAIRS.items()}
    return {"pairs": pairs, "lr": LR, "momentum": MOMENTUM, "weight_decay": DECAY, "kd": asdict(KD_OPTIONS)}
