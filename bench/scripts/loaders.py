"""Images per second of the training loaders, from JPEG files to normalised float32 batches on the device.

    python bench/scripts/loaders.py
    python bench/scripts/loaders.py --threads 8 --device cuda --json bench/results/data.json

Six ways, each with as many worker processes (torchvision) or threads (DALI):
    recipe   what torchvision documents: ImageFolder (PIL), v2 transforms on uint8 tensors, ToDtype and Normalize in the
             workers; they persist and prefetch 4 batches each
    folder   fastkd's own loader on torchvision: its fast (deprecated) decoder, uint8 to the device, normalised there
    first    fastkd's loader on NVIDIA DALI, in the first epoch: each file is checked before it is decoded
    dali     the same in later epochs
    reader   DALI's own file reader, crops and flips in the place of ours; on the CPU only
    packed   fastkd's loader of packed images (`fastkd pack`, squares of 256 pixels), with as many threads

The files are made here: about 500x375 pixels, smooth colour with grain, quality 90, 4:2:0, around 100 KB as ImageNet's.
They stay in the page cache, so this measures decoding and cropping and not the disk. Each round builds every loader
anew, in rotating order. A loader first gives the batches that it had prefetched, then batches are counted for
`--seconds`. The consumer does nothing with them. A line says how fast the images were packed.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import nvidia.dali.fn as fn
import torch
from nvidia.dali import Pipeline, pipeline_def
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from fastkd.bench import environment, script_parser, show_table, summary, write_json
from fastkd.data import DataOptions
from fastkd.data.dali import DaliLoader
from fastkd.data.folder import FolderLoader
from fastkd.data.pack import Packing, pack
from fastkd.data.pack_format import PackedPart, packed_parts
from fastkd.data.pack_source import part_of
from fastkd.data.packed import PackedLoader
from fastkd.data.scan import Split, scan

WARM_BATCHES = 16  # more than any loader here holds ready when it starts


def make_images(folder: Path, images: int) -> None:
    """`images` JPEGs in 4 classes, sizes within a tenth of 500x375 pixels."""
    random = np.random.default_rng(0)
    for i in range(images):
        width, height = (int(side * random.uniform(0.9, 1.1)) for side in (500, 375))
        coarse = Image.fromarray(random.integers(0, 256, (13, 17, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
        grain = random.normal(0, 17, (height, width, 1)).astype(np.float32)
        (folder / str(i % 4)).mkdir(parents=True, exist_ok=True)
        pixels = (smooth + grain).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / str(i % 4) / f"{i:05}.jpg", quality=90)


def recipe(split: Split, options: DataOptions, device: torch.device) -> DataLoader:
    """torchvision's own way, with what its documentation advises for speed."""
    steps = [v2.ToImage(), v2.RandomResizedCrop(options.image_size, antialias=True), v2.RandomHorizontalFlip()]
    steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(options.mean, options.std)]
    images = ImageFolder(Path(split.files[0]).parents[1], v2.Compose(steps))
    images.samples = list(zip(split.files, split.labels, strict=True))
    return DataLoader(
        images,
        options.batch_size,
        shuffle=True,
        num_workers=options.workers,
        persistent_workers=True,
        prefetch_factor=4,
        pin_memory=device.type == "cuda",
        drop_last=True,
    )


def later(split: Split, options: DataOptions, device: torch.device) -> DaliLoader:
    """In its second epoch."""
    loader = DaliLoader(split, options, device, train=True)
    loader.load_state_dict({"loader": "dali", "epoch": 1, "step": 0})
    return loader


class OwnReader(DaliLoader):
    """DALI's file reader shuffles, and its decoder draws the crops."""

    def _define(self, source: Iterator[Any], batch_size: int, side: int) -> Pipeline:
        files, threads = self.source.files, self.options.workers
        return own_reader(files, batch_size=batch_size, num_threads=threads, device_id=None, exec_dynamic=True)


@pipeline_def
def own_reader(files: list[str]) -> Any:
    encoded, labels = fn.readers.file(files=files, random_shuffle=True, initial_fill=4096)
    crop: dict[str, Any] = {"random_area": (0.08, 1.0), "random_aspect_ratio": (3 / 4, 4 / 3)}
    images = fn.decoders.image_random_crop(encoded, device="cpu", adjust_orientation=False, **crop)
    return images, fn.random.coin_flip(), fn.reshape(labels, shape=[])


WAYS: dict[str, Callable[..., Iterable[Any]]] = {
    "recipe": recipe,
    "folder": partial(FolderLoader, train=True),
    "first": partial(DaliLoader, train=True),
    "dali": later,
    "reader": partial(OwnReader, train=True),
    "packed": partial(PackedLoader, train=True),
}


def packed(split: Split, root: Path, threads: int) -> PackedPart:
    """The same images, packed into one shard."""
    start = time.perf_counter()
    pack(str(root), Packing(), split.classes, {"train": part_of(split, "")}, threads, lambda new, old: None)
    print(f"packed {len(split.files) / (time.perf_counter() - start):.0f} images/s, by one process")
    parts = packed_parts(str(root))
    assert parts is not None
    return parts["train"]


def images_per_second(loader: Iterable[Any], device: torch.device, seconds: float) -> float:
    """Over at least `seconds` of one epoch, after its first batches; each batch has reached the device."""
    images, start, elapsed = 0, 0.0, 0.0
    for number, batch in enumerate(loader, 1):
        images += len(batch[0].to(device, non_blocking=True))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number == WARM_BATCHES:
            images, start = 0, time.perf_counter()
        elapsed = time.perf_counter() - start
        if number > WARM_BATCHES and elapsed >= seconds:
            break
    return images / elapsed


def measure(split: Split, part: PackedPart, args: argparse.Namespace) -> dict[str, list[float]]:
    """Images per second of each way, one number a round."""
    # the same files over and over, so that no window meets the end of an epoch (20,000 images/s at most)
    times = -(-int(args.seconds * 20_000 + WARM_BATCHES * args.batch_size) // len(split.files))
    split = Split(split.classes, split.files * times, split.labels * times)
    labels, sizes = part.labels.repeat(times), part.sizes.repeat(times, 1)
    part = replace(part, labels=labels, sizes=sizes, shards=part.shards * times)
    found: dict[str, list[float]] = {name: [] for name in WAYS if name != "reader" or args.device == "cpu"}
    names, device = [name for name in WAYS if name in found], torch.device(args.device)
    options = DataOptions(batch_size=args.batch_size, workers=args.threads).for_large_images()
    for turn in range(args.rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            loader = WAYS[name](part if name == "packed" else split, options, device)
            found[name].append(images_per_second(loader, device, args.seconds))
    return found


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--images", type=int, default=256, help="files made")
    parser.add_argument("--seconds", type=float, default=4.0, help="length of one window")
    parser.add_argument("--rounds", type=int, default=5, help="windows of each loader")
    parser.add_argument("--threads", type=int, default=2, help="DALI threads; torchvision gets one worker more")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", default="cpu", help="cpu, or cuda: DALI then decodes on the GPU")
    parser.add_argument("--json", help="where to write the figures")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        make_images(Path(root, "images"), args.images)
        split = scan(str(Path(root, "images")))
        kilobytes = sum(os.path.getsize(file) for file in split.files) / len(split.files) / 1000
        part = packed(split, Path(root, "packed"), args.threads)
        figures = {name: summary(values) for name, values in measure(split, part, args).items()}
    ratios = {name: figures["packed"]["median"] / row["median"] for name, row in figures.items()}
    print(
        f"{args.images} made JPEGs, mean {kilobytes:.0f} KB; batch {args.batch_size}, 224 px, to {args.device}; "
        f"{args.threads} workers or threads, {len(os.sched_getaffinity(0))} CPUs"
    )
    rows = [[name, *(f"{row[key]:.0f}" for key in ("median", "p20", "p80", "n")), f"{ratios[name]:.2f}x"]
            for name, row in figures.items()]  # fmt: skip
    show_table(["loader", "img/s median", "p20", "p80", "n", "packed is"], rows, numbers=5)
    if args.json:
        about = {"environment": environment(), "options": vars(args), "kilobytes": kilobytes}
        write_json(args.json, about | {"images_per_second": figures, "packed_is_faster_by": ratios})


if __name__ == "__main__":
    main()
