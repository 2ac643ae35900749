"""Training from a teacher cache against training with the teacher: images/s of whole epochs, in one run.

    python bench/scripts/cached_teacher.py
    python bench/scripts/cached_teacher.py --rounds 9 --json bench/results/cached_teacher.json

    online      each step runs the teacher, as `fastkd train` does
    cached      each step reads the teacher's logits from the disk: --teacher-cache, whole logits in fp32

Each pair of networks takes its turns in each round: one epoch online, one epoch cached. An epoch is what a trainer
does: the loader of images in memory (noise), crops and flips, the logits, forward, kd loss, backward, SGD. The networks
have random weights, whose logits may be too large for fp16. The first round is not counted. The cache is in the page
cache of the operating system, for it was written just before. Pairs: resnet110 to resnet20 at 32 pixels, timm/resnet50
to timm/resnet18 at 64 pixels.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import torch

from fastkd.bench import default_device, environment, script_parser, show_table, summary, write_json
from fastkd.data.base import samples_of
from fastkd.data.order import Shard
from fastkd.data.resident import Augmentation, ResidentLoader, ResidentSet
from fastkd.engine import Step, TrainOptions, graphed
from fastkd.engine.launch import Runner, uses_graphs
from fastkd.methods import KD
from fastkd.methods.frozen import AbsentTeacher
from fastkd.models import create_model
from fastkd.teacher_cache import Lessons, TeacherCache

PAIRS = {"small": ("resnet110", "resnet20", 32, 100), "large": ("timm/resnet50", "timm/resnet18", 64, 100)}
"""By name: teacher, student, side of the images in pixels, classes."""


def noise_loader(
    images: int, side: int, classes: int, batch: int, device: torch.device, dtype: torch.dtype
) -> ResidentLoader:
    held = torch.randint(256, (images, side, side, 3), dtype=torch.uint8)
    images_of = ResidentSet(tuple(map(str, range(classes))), held, torch.arange(images) % classes)
    crops, shard = Augmentation("pad-crop", 4, "reflect", True), Shard(views=1, dtype=dtype)
    mean, std = (0.5,) * 3, (0.25,) * 3
    return ResidentLoader(images_of, crops, batch, device, shard, train=True, mean=mean, std=std, image_size=side)


class Way:
    """One way to train a pair: `epoch()` makes an epoch and gives its images/s."""

    def __init__(self, pair: str, args: argparse.Namespace, folder: Path | None, absent: bool = False):
        teacher, student, side, classes = PAIRS[pair]
        torch.manual_seed(0)
        nets = [create_model(name, classes, image_size=side) for name in (student, teacher)]
        self.device = torch.device(args.device)
        options = TrainOptions(lr=0.01, device=args.device)
        self.method = KD(nets[0], AbsentTeacher() if absent else nets[1]).to(self.device)
        self.method.to(memory_format=torch.channels_last).train()
        step = Step(self.method, options, self.device, flat=uses_graphs(options, self.device))
        self.runner: Runner = graphed(step, "auto", self.device, lambda line: None)
        self.loader = noise_loader(args.images, side, classes, args.batch_size, self.device, step.precision.dtype)
        self.lessons: Lessons | None = None
        if folder is not None:
            about = {"samples": args.images, "classes": list(self.loader.classes), "views": 1, "precision": "fp32"}
            cache = TeacherCache.open(folder, about, {}, 1)
            self.lessons = Lessons(cache, self.method, step.precision.autocast)

    def epoch(self) -> float:
        """Images/s."""
        start, lessons, epoch = time.perf_counter(), self.lessons, self.loader.epoch
        if lessons:
            lessons.start(0)
        for step, (images, target) in enumerate(self.loader):
            _, samples = samples_of(self.loader, epoch, step, len(images), 0)
            self.runner(images, target, None, lessons(images, samples) if lessons else ())
        if lessons:
            lessons.finish()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return self.loader.samples / (time.perf_counter() - start)


def measure(pair: str, args: argparse.Namespace) -> dict[str, list[float]]:
    """Images/s of each way, one number a round."""
    with tempfile.TemporaryDirectory() as folder:
        Way(pair, args, Path(folder)).epoch()  # fills the cache
        ways = {"online": Way(pair, args, None), "cached": Way(pair, args, Path(folder), absent=True)}
        found: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(args.rounds + 1):
            for name, way in ways.items():
                rate = way.epoch()
                if turn:
                    found[name].append(rate)
    return found


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", default=str(default_device()))
    parser.add_argument("--json", help="where to write the figures")
    args = parser.parse_args()
    rows, record = [], {"environment": environment(), "options": vars(args)}
    for pair in args.pairs:
        found = measure(pair, args)
        figures = {name: summary(values) for name, values in found.items()}
        ratio = summary([b / a for a, b in zip(found["online"], found["cached"], strict=True)])
        record[pair] = {"images_per_second": figures, "cached_over_online": ratio}
        teacher, student, side, _ = PAIRS[pair]
        rates = [f"{figures[name]['median']:,.0f}" for name in ("online", "cached")]
        spread = f"{ratio['median']:.2f} ({ratio['p20']:.2f} to {ratio['p80']:.2f})"
        rows.append([f"{teacher} to {student}, {side} px", *rates, spread])
    threads, cpus = torch.get_num_threads(), len(os.sched_getaffinity(0))
    print(f"{args.images} images, batch {args.batch_size}, {args.rounds} rounds, {threads} threads, {cpus} CPUs")
    show_table(["", "online, img/s", "cached, img/s", "ratio, median (p20 to p80)"], rows, numbers=3)
    if args.json:
        write_json(args.json, record)


if __name__ == "__main__":
    main()
