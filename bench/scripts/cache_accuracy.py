"""What a teacher cache costs in accuracy: views and top-k against the teacher online, by kd on Fashion-MNIST.

    python bench/scripts/cache_accuracy.py                              3 seeds, 32 epochs of 6,000 images
    python bench/scripts/cache_accuracy.py --seeds 1 --epochs 2 --images 500 --evaluate 500      a try

    online          the teacher sees a new view of each image in each epoch, and runs in each step
    V = 1, 4, 16    V views of each image come back in turn; whole logits, fp16, from the cache
    k = 2, 5        the k largest of the ten logits and the sum of the others, with V = 4

resnet20 teaches resnet8, with the options of accuracy.py (batch 64, SGD at 0.05, a tenth of it at 5/8, 6/8 and 7/8 of
the run). There are ten classes, so that k is 2 and 5 where ImageNet would have 20 and 50. All students of a seed have
one teacher, and start with the same weights. All test images are evaluated once, after the last epoch. With --json FILE
the same line goes on with what is missing there.
"""

import argparse
import contextlib
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from fastkd.bench import Record, environment, script_parser, show_table, write_json
from fastkd.bench.fashion import FOLDER, create_fashion
from fastkd.bench.scripts.accuracy_runs import STUDENT, TEACHER, Study
from fastkd.data.order import Shard
from fastkd.engine.precision import Precision
from fastkd.errors import UserError
from fastkd.evaluate import evaluate_networks
from fastkd.methods import CE, KD
from fastkd.methods.base import Method
from fastkd.models import create_model
from fastkd.teacher_cache import TeacherCache
from fastkd.train import Trainer

ROWS = {
    "online": (0, 0),
    "V = 1": (1, 0),
    "V = 4": (4, 0),
    "V = 16": (16, 0),
    "V = 4, k = 5": (4, 5),
    "V = 4, k = 2": (4, 2),
}
"""By name: views (0: a new one in each epoch, and no cache), k (0: all)."""
NAMES = ("teacher", "student alone", *ROWS)
Found = dict[str, dict[str, list[float]]]  # by name and seed: top-1 in per cent, seconds


def trained(this: Study, method: Method, seed: int, views: int, topk: int, folder: Path) -> tuple[float, float]:
    """(top-1 in per cent, seconds) of the student of `method`."""
    shard = Shard(seed, dtype=Precision(this.train.amp_dtype, this.device).dtype, views=views)
    train, val = create_fashion(this.data.batch_size, this.device, shard, this.images, this.folder)
    cache = None
    if views:
        about = {"samples": train.samples, "classes": list(train.classes), "views": views, "topk": topk}
        cache = TeacherCache.open(folder / f"cache-{seed}-{views}-{topk}", about | {"temperature": 4.0}, {}, views)
    start, few = time.perf_counter(), [next(iter(val))]
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        trainer = Trainer(method, train, few, replace(this.train, seed=seed, out=f"{out}/run"), None, cache)
        trainer.fit()
    taken = time.perf_counter() - start
    scores = evaluate_networks(trainer.networks, val, Precision(this.train.amp_dtype, this.device))
    return scores["top1"], taken


def run(args: argparse.Namespace, found: Found, save: Callable[[], None]) -> None:
    """Add what is missing to `found`, and save it after each training."""
    this = Study("fashion", args.epochs, torch.device(args.device), args.folder, (args.images, args.evaluate))

    def network(name: str, seed: int) -> torch.nn.Module:
        torch.manual_seed(seed)
        return create_model(name, 10)

    with tempfile.TemporaryDirectory() as folder:
        for seed in range(args.seeds):
            if all(str(seed) in found.get(name, {}) for name in NAMES):
                continue
            teacher = network(TEACHER, seed)  # the same weights again, where a run goes on
            for name in NAMES:
                views, topk = ROWS.get(name, (0, 0))
                method: Method = CE(teacher) if name == "teacher" else CE(network(STUDENT, seed))
                if name in ROWS:
                    method = KD(network(STUDENT, seed), teacher)
                if name != "teacher" and str(seed) in found.get(name, {}):
                    continue
                score, seconds = trained(this, method, seed, views, topk, Path(folder))
                found.setdefault(name, {})[str(seed)] = [score, seconds]
                save()
                print(f"seed {seed}, {name}: {score:.2f} % in {seconds:.0f} s", flush=True)


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=32, help="more than 16, or V = 16 is the same as online")
    parser.add_argument("--images", type=int, default=6000, help="to train; the first of each class")
    parser.add_argument("--evaluate", type=int, default=0, help="test images; 0: all")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the files of Fashion-MNIST")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", help="where to write the figures")
    args = parser.parse_args()
    options = {name: getattr(args, name) for name in ("epochs", "images", "evaluate", "device")}
    record: Record = {"environment": environment(), "options": options, "runs": {}}
    if args.json and Path(args.json).exists():
        record = json.loads(Path(args.json).read_text())
        if record["options"] != options:
            raise UserError(f"{args.json} has the options {record['options']}, not {options}: name another file")
    run(args, record["runs"], lambda: write_json(args.json, record) if args.json else None)
    rows = []
    for name, results in record["runs"].items():
        scores = [score for score, _ in results.values()]
        spread = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
        seconds = statistics.median(taken for _, taken in results.values())
        rows.append([name, f"{statistics.mean(scores):.2f}{spread}", f"{seconds:.0f}", str(len(scores))])
    print(f"{TEACHER} to {STUDENT}, kd, {args.images} images, {args.epochs} epochs")
    show_table(["", "top-1 %", "s", "seeds"], rows, numbers=3)


if __name__ == "__main__":
    main()
