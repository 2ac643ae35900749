"""Start-up, memory and the boxes of a batch for 1.28 million images, without any image.

    python bench/scripts/many_images.py

The names are those of an ImageNet folder. A kept index holds made sizes, the answer of the file system is made too, and
everything else is what a run does: the index is read from the disk and matched to the names, the DALI source makes the
order of an epoch and gives its first batches. Each number is of one run of this script; take the median of several.
"""

import json
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

import fastkd.data.image_index as image_index
from fastkd.bench import environment, script_parser, write_json
from fastkd.data import DataOptions
from fastkd.data.augment import crops_and_flips, resized_boxes
from fastkd.data.dali_files import FirstPass
from fastkd.data.dali_source import Source
from fastkd.data.index_file import merged, write
from fastkd.data.order import Shard, training_slices
from fastkd.data.scan import Split
from fastkd.data.walk import INDEX


def resident_mb() -> float:
    """Memory of this process without the mapped libraries: those of torch alone are 0.4 GB."""
    with open("/proc/self/status") as file:
        lines = dict(line.split(":", 1) for line in file)
    return int(lines["RssAnon"].split()[0]) / 1e3


def make_split(root: str, images: int) -> Split:
    """1,000 classes of equal size."""
    each = -(-images // 1000)
    files = [f"{root}/train/n{i // each:08}/n{i // each:08}_{i}.JPEG" for i in range(images)]
    return Split(tuple(f"n{k:08}" for k in range(1000)), files, [i // each for i in range(images)])


def make_index(split: Split, root: str) -> None:
    rows = image_index._stat_all(split.files, root)
    random = np.random.default_rng(0)
    rows["height"], rows["width"] = random.integers(200, 600, (2, len(rows)))
    write(os.path.join(root, f"{INDEX}.npz"), merged(rows))


def no_files(files: list[str]) -> tuple[np.ndarray, list[image_index.Bad]]:
    """Stands for the answer of the file system."""
    return np.full((len(files), 2), 100_000), []


def box_milliseconds(sizes: torch.Tensor, batch: int = 256, times: int = 200) -> float:
    """Median time of the boxes and flips of a batch."""
    found = []
    for view in range(times):
        numbers = torch.randint(len(sizes), (batch,))
        start = time.perf_counter()
        resized_boxes(0, view, numbers, sizes[numbers]).int()
        crops_and_flips(0, view, numbers, 0, True)
        found.append(time.perf_counter() - start)
    return float(np.median(found)) * 1e3


def measure(images: int, root: str) -> dict[str, float]:
    image_index._stat = no_files
    if not os.path.exists(os.path.join(root, f"{INDEX}.npz")):
        make_index(make_split(root, images), root)
    before = resident_mb()
    split = make_split(root, images)
    names = resident_mb()
    start = time.perf_counter()
    sizes = image_index.sizes_of(split.files, DataOptions(data=root))
    index = time.perf_counter()
    with ThreadPoolExecutor(1) as threads:
        first_pass = FirstPass(split.files, None, 0, threads)
        first_pass.checked.fill_(True)
        batches = Source(split, training_slices(images, 256, 0, 1), Shard(), sizes, first_pass).batches(3, 500)
        next(batches)
    found = {"index_s": index - start, "first_batch_s": time.perf_counter() - index}
    found |= {"before_mb": before, "names_mb": names - before, "resident_mb": resident_mb()}
    return found | {"boxes_ms": box_milliseconds(sizes)}


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--images", type=int, default=1_281_167)
    parser.add_argument("--folder", default="", help="where the made index is, or is made; it keeps it for another run")
    parser.add_argument("--json", help="where to write the figures")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as other:
        found = measure(args.images, args.folder or other)
    print(json.dumps({name: round(value, 3) for name, value in found.items()}))
    if args.json:
        write_json(args.json, {"environment": environment(), "images": args.images, "figures": found})


if __name__ == "__main__":
    main()
