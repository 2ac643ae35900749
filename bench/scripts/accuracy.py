"""Top-1 of the teacher, the student alone and every method: same networks, same recipe, same number of epochs.

    python bench/scripts/accuracy.py --data digits --seeds 5
    python bench/scripts/accuracy.py --data fashion --seeds 3 --minutes 30      stops in time; the same line continues
    python bench/scripts/accuracy.py --data fashion --table                     table and picture of the finished runs

resnet20 teaches resnet8; peers are resnet8. The recipe is fastkd/recipes/digits.yaml, with each method's default
options. All digits are used; of Fashion-MNIST all on a GPU, 1,500 and 1,000 images on a CPU (see bench/fashion.py).
All methods of a seed share one teacher; their students start with the same weights and see the same batches. The
result is the student after the last epoch. Each finished run is written at once to
bench/results/<device>/<date>-accuracy-<data>.json; table and picture are written beside it.
"""

import contextlib
import datetime
import hashlib
import io
import json
import os
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as on the command line, before torch is loaded

import torch
from torch import nn

from fastkd import bench
from fastkd.bench import Record
from fastkd.bench.fashion import FOLDER, create_fashion
from fastkd.config import parse
from fastkd.data import create_loaders
from fastkd.data.base import Loader, Shard
from fastkd.engine.precision import Precision
from fastkd.errors import UserError, nearest
from fastkd.methods import METHODS
from fastkd.models import create_model
from fastkd.train import Trainer

TEACHER, STUDENT = "resnet20", "resnet8"
ON_CPU = (1500, 1000)  # images of Fashion-MNIST
EPOCHS = {"digits": 6, "fashion": 8}  # about half an hour each on two idle cores, with 5 and 3 seeds
NOT_SETTINGS = ("seed", "out", "resume", "device", "tensorboard")
NAMES = {"teacher": "teacher", "ce": "student alone"}


class Study:
    """What all runs share. `epochs`: 0 is the usual number. `images` of Fashion-MNIST, to train and to evaluate."""

    def __init__(self, data: str, epochs: int, device: torch.device, folder: Path, images: tuple[int, int] = ON_CPU):
        words = ["--recipe", "digits", "--method", "ce", "--epochs", str(epochs or EPOCHS[data])]
        config = parse(words, lambda line: None)
        self.data, self.train = replace(config.data, data=data), replace(config.train, device=str(device))
        self.device, self.folder = device, folder
        self.images = (0, 0) if device.type == "cuda" else images  # 0: all

    def loaders(self, seed: int) -> tuple[Loader, Loader]:
        dtype = Precision("auto", self.device).dtype
        if self.data.data == "digits":
            return create_loaders(self.data, self.device, seed=seed, dtype=dtype)
        return create_fashion(self.data.batch_size, self.device, Shard(seed, dtype=dtype), self.images, self.folder)

    def settings(self) -> Record:
        """What must be equal in all runs of one table."""
        train, val = self.loaders(0)
        options = {name: value for name, value in asdict(self.train).items() if name not in NOT_SETTINGS}
        named = {"data": self.data.data, "teacher": TEACHER, "student": STUDENT}
        counts = {"images": [train.samples, val.samples], "batch_size": self.data.batch_size}
        return dict(json.loads(json.dumps(named | counts | options)))


def train_one(this: Study, name: str, seed: int, teacher_file: Path) -> Record:
    """Accuracies of a method's networks after the last epoch, and the time. "teacher" writes `teacher_file`."""
    train, val = this.loaders(seed)
    kind = METHODS["ce" if name == "teacher" else name]

    def network(name: str, number: int = 0, weights: Path | None = None) -> nn.Module:
        torch.manual_seed(seed + number)  # the same initial weights in all methods; a peer has others
        return create_model(name, len(train.classes), weights)

    teacher = network(TEACHER, weights=teacher_file) if kind.needs_teacher else None
    peers = [network(STUDENT, number=1)] if kind.needs_peers else []
    method = kind(network(TEACHER if name == "teacher" else STUDENT), teacher, kind.Options(), peers)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()) as printed:
        options = replace(this.train, seed=seed, out=f"{out}/run")
        result = Trainer(method, train, val, options).fit()
        seconds = time.perf_counter() - start
        if name == "teacher":
            teacher_file.parent.mkdir(parents=True, exist_ok=True)
            teacher_file.write_bytes(result.student.read_bytes())
    found = {key: value for key, value in result.history[-1].items() if key.endswith(("top1", "val_loss"))}
    warnings = [line for line in printed.getvalue().splitlines() if line.startswith("warning")]
    found |= {"seconds": round(seconds, 1), "options": asdict(kind.Options())}
    return found | ({"warnings": warnings} if warnings else {})


def run_all(this: Study, path: Path, names: list[str], args: Namespace) -> Record:
    """Run what is missing in the file at `path`, seed by seed, and write each result at once."""
    record = _open(path, this.settings())
    key = hashlib.blake2b(json.dumps(record["settings"]).encode(), digest_size=4).hexdigest()
    wanted = [(name, seed) for seed in range(args.seeds) for name in ("teacher", *names)]
    done, start = record["pairs"], time.perf_counter()
    for number, (name, seed) in enumerate(wanted, 1):
        teacher_file = args.work / f"{args.data}-{key}" / f"teacher{seed}.safetensors"
        there = str(seed) in done.get(name, {}) and not (args.again and name != "teacher")
        if there and (name != "teacher" or teacher_file.is_file()):
            continue
        if args.minutes and time.perf_counter() - start > 60 * args.minutes:
            print(f"--minutes {args.minutes:g} are over; the same command goes on", flush=True)
            break
        try:
            found = train_one(this, name, seed, teacher_file)
        except UserError as error:
            found = {"error": str(error)}
        done.setdefault(name, {})[str(seed)] = found | {"commit": bench.commit(), "load_average": bench.load_average()}
        bench.write_json(path, record)
        shown = f"top-1 {found['top1']:6.2f} %  {found['seconds']:6.1f} s" if "top1" in found else found["error"]
        print(f"{number:3}/{len(wanted)}  seed {seed}  {name:12} {shown}", flush=True)
        if "error" in found and name == "teacher":
            raise UserError(f"the teacher of seed {seed} failed: {found['error']}")
    return record


def _open(path: Path, settings: Record) -> Record:
    """The record at `path`, or a new one. Raises UserError if it has other settings."""
    if not path.is_file():
        return {"settings": settings, "environment": bench.environment(), "commit": bench.commit(), "pairs": {}}
    record: Record = json.loads(path.read_text())
    if record["settings"] != settings:
        other = [name for name in settings if record["settings"].get(name) != settings[name]]
        raise UserError(f"{path} was made with other settings ({', '.join(other)}): give another --file")
    print(f"{path}: {sum(map(len, record['pairs'].values()))} runs are there already", flush=True)
    return record


def mean_and_deviation(values: list[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (n - 1); None for a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def scores(record: Record, name: str, what: str = "top1") -> dict[str, float]:
    """The values by seed, without failed runs."""
    return {seed: run[what] for seed, run in record["pairs"].get(name, {}).items() if what in run}


def gains(record: Record, name: str) -> list[float]:
    """For each seed that both have: the method's accuracy minus that of the student alone."""
    own, alone = scores(record, name), scores(record, "ce")
    return [own[seed] - alone[seed] for seed in own if seed in alone]


def _shown(values: list[float], sign: str = "") -> str:
    if not values:
        return "-"
    mean, deviation = mean_and_deviation(values)
    return f"{mean:{sign}.2f}" + ("" if deviation is None else f" ± {deviation:.2f}")


def order(record: Record) -> list[str]:
    """The names in the order of the table."""
    return [name for name in dict.fromkeys(["teacher", "ce", *METHODS, *record["pairs"]]) if name in record["pairs"]]


def table(record: Record) -> str:
    """As Markdown: mean ± standard deviation over the seeds; the gain is taken seed by seed.

    "beside it": accuracies of the networks trained beside the student, which are peers or an improved teacher.
    """
    rows, failed = [], []
    for name in order(record):
        own, runs = list(scores(record, name).values()), record["pairs"][name]
        gain = "" if name in NAMES else _shown(gains(record, name), "+")
        seconds = list(scores(record, name, "seconds").values())
        others = dict.fromkeys(key for run in runs.values() for key in run if key.endswith("_top1"))
        beside = [f"{key[:-5].replace('_', ' ')} {_shown([*scores(record, name, key).values()])}" for key in others]
        mean = f"{statistics.fmean(seconds):.0f}" if seconds else "-"
        rows.append([NAMES.get(name, name), str(len(own)), _shown(own), gain, ", ".join(beside), mean])
        failed += [f"\n{name}, seed {seed} failed: {run['error']}" for seed, run in runs.items() if "error" in run]
    columns = ["method", "n", "top-1 %", "gain over alone", "beside it", "s per run"]
    return "\n".join([bench.markdown_table(columns, rows), *failed])


def heading(record: Record) -> str:
    what, where = record["settings"], record["environment"]
    train, test = what["images"]
    return (
        f"{what['data']}: {train:,} images to train, {test:,} to evaluate (one is {100 / test:.2f} %), "
        f"{what['epochs']} epochs, {what['teacher']} -> {what['student']}, {where['gpu'] or where['cpu']}, "
        f"torch {where['torch']}, commit {(record['commit'] or 'unknown')[:12]}"
    )


def draw(record: Record, path: Path) -> None:
    """Write a PNG: a dot for each method's mean, a bar of one standard deviation, small dots for the seeds."""
    from matplotlib.figure import Figure

    names = [name for name in order(record) if name not in NAMES and scores(record, name)][::-1]
    figure = Figure(figsize=(7, 1.6 + 0.32 * len(names)), layout="constrained")
    axes = figure.subplots()
    for place, name in enumerate(names):
        values = list(scores(record, name).values())
        mean, deviation = mean_and_deviation(values)
        axes.plot(values, [place] * len(values), ".", color="C0", alpha=0.35)
        axes.errorbar(mean, place, xerr=deviation, fmt="o", color="C0", capsize=3)
    for name, style in (("ce", "--"), ("teacher", ":")):
        if values := list(scores(record, name).values()):
            axes.axvline(statistics.fmean(values), color="black", linestyle=style, label=NAMES[name])
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(-0.7, len(names) - 0.3)
    axes.set(xlabel="top-1 %, mean and standard deviation over the seeds", title=record["settings"]["data"])
    axes.grid(axis="x", alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower center", ncols=2)  # where no dot can be
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=110)


def main(words: list[str] | None = None) -> None:
    parser = bench.script_parser(__doc__)
    parser.add_argument("--data", choices=("digits", "fashion"), default="digits")
    parser.add_argument("--seeds", type=int, default=5, help="0, 1, ... up to this number of seeds")
    parser.add_argument("--methods", default=",".join(METHODS), help="some of them, with commas between")
    parser.add_argument("--epochs", type=int, default=0, help=f"of every run; {EPOCHS}")
    parser.add_argument("--minutes", type=float, default=0, help="begin no new run after so many")
    parser.add_argument("--again", action="store_true", help="run --methods again where the file has them")
    parser.add_argument("--table", action="store_true", help="train nothing: table and picture from the file")
    parser.add_argument("--file", type=Path, help="the JSON, by default the newest there is, or a new one")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the files of Fashion-MNIST")
    parser.add_argument("--work", type=Path, default=Path("runs/accuracy"), help="where the teachers are kept")
    parser.add_argument("--device", default=str(bench.default_device()))
    args = parser.parse_args(words)
    device = torch.device(args.device)
    folder = bench.results_folder(torch.cuda.get_device_name(device) if device.type == "cuda" else None)
    today = folder / f"{datetime.date.today()}-accuracy-{args.data}.json"
    path = args.file or max(folder.glob(f"*-accuracy-{args.data}.json"), default=today)
    if args.table:
        if not path.is_file():
            raise UserError(f"--table: there is no {path}; run without --table first")
        record = json.loads(path.read_text())
    else:
        names = args.methods.split(",")
        for name in names:
            if name not in METHODS:
                raise UserError(f"--methods: unknown {name!r}{nearest(name, METHODS)}; there are {', '.join(METHODS)}")
        record = run_all(Study(args.data, args.epochs, device, args.folder), path, names, args)
    text = f"{heading(record)}\n\n{table(record)}"
    print(text)
    draw(record, path.with_suffix(".png"))
    path.with_suffix(".md").write_text(f"{text}\n")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"accuracy: {error}", file=sys.stderr)
        sys.exit(2)
