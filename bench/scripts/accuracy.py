"""Top-1 of the teacher, the student alone and every method: same networks, same recipe, same number of epochs.

    python bench/accuracy.py --data digits --seeds 5
    python bench/accuracy.py --data fashion --seeds 3 --minutes 30      stops in time; the same line goes on later
    python bench/accuracy.py --data fashion --table                     the table and the picture of what is there

resnet20 teaches resnet8; peers are resnet8. The recipe is that of the digits (fastkd/recipes/digits.yaml), the options
of the methods are their defaults: nothing was tuned for a method here. The digits are all used, 1,442 to train and 355
to evaluate. Fashion-MNIST is all used on a GPU; on a CPU it is 1,500 and 1,000 (bench/fashion.py says which).

One teacher is trained for each data set and seed; all methods of that seed share it, their students start with the same
weights and see the same batches. What counts is the student after the last epoch. Every finished run is in the JSON at
once, bench/results/<device>/<date>-accuracy-<data>.json; the table and the picture lie beside it.
"""

import argparse
import contextlib
import datetime
import hashlib
import io
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does, before torch is loaded

import torch

from fastkd.bench.accuracy_report import draw, heading, table
from fastkd.bench.common import commit, environment, load_average, write_json
from fastkd.bench.fashion import FOLDER, create_fashion
from fastkd.bench.gpu_gate import slug
from fastkd.config import parse
from fastkd.data import create_loaders
from fastkd.engine.precision import Precision
from fastkd.errors import UserError, nearest
from fastkd.methods import METHODS
from fastkd.models import create_model
from fastkd.train import Trainer

ROOT = Path(__file__).parent.parent
TEACHER, STUDENT = "resnet20", "resnet8"
ON_CPU = (1500, 1000)  # images of Fashion-MNIST
EPOCHS = {"digits": 6, "fashion": 8}  # about half an hour each on two idle cores, with 5 and 3 seeds


@dataclass(frozen=True)
class Study:
    """What all runs share."""

    config: object
    device: torch.device
    images: tuple[int, int]  # of Fashion-MNIST; 0: all
    folder: Path = FOLDER

    def loaders(self, seed: int):
        choice = {"seed": seed, "dtype": Precision("auto", self.device).dtype}
        if self.config.data.data == "digits":
            return create_loaders(self.config.data, self.device, rank=0, world_size=1, **choice)
        size = self.config.data.batch_size
        return create_fashion(size, self.device, images=self.images, folder=self.folder, **choice)

    def settings(self) -> dict:
        """What must be equal for two runs to stand in one table."""
        train, val = self.loaders(0)
        options = {name: value for name, value in asdict(self.config.train).items() if name not in NOT_SETTINGS}
        named = {"data": self.config.data.data, "teacher": TEACHER, "student": STUDENT}
        counts = {"images": [train.samples, val.samples], "batch_size": self.config.data.batch_size}
        return json.loads(json.dumps(named | counts | options))


NOT_SETTINGS = ("seed", "out", "resume", "device", "tensorboard")


def study(data: str, epochs: int, device: torch.device, folder: Path = FOLDER, images=None) -> Study:
    config = parse(["--recipe", "digits", "--method", "ce", "--epochs", str(epochs or EPOCHS[data])], lambda line: None)
    config = replace(config, data=replace(config.data, data=data), train=replace(config.train, device=str(device)))
    everything = device.type == "cuda" or data == "digits"
    return Study(config, device, images or ((0, 0) if everything else ON_CPU), folder)


def train_one(this: Study, name: str, seed: int, teacher_file: Path) -> dict:
    """Accuracies of a method's networks after its last epoch, and the time. "teacher" leaves `teacher_file`."""
    train, val = this.loaders(seed)
    network = partial(_network, len(train.classes), seed)
    kind = METHODS["ce" if name == "teacher" else name]
    teacher = network(TEACHER, weights=teacher_file) if kind.needs_teacher else None
    peers = [network(STUDENT, number=1)] if kind.needs_peers else []
    method = kind(network(TEACHER if name == "teacher" else STUDENT), teacher, kind.Options(), peers)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()) as said:
        options = replace(this.config.train, seed=seed, out=f"{out}/run")
        result = Trainer(method, train, val, options).fit()
        seconds = time.perf_counter() - start
        if name == "teacher":
            teacher_file.parent.mkdir(parents=True, exist_ok=True)
            teacher_file.write_bytes(result.student.read_bytes())
    found = {key: value for key, value in result.history[-1].items() if key.endswith(("top1", "val_loss"))}
    warnings = [line for line in said.getvalue().splitlines() if line.startswith("warning")]
    return found | {"seconds": round(seconds, 1), "options": asdict(kind.Options())} | _if_any(warnings=warnings)


def _network(classes: int, seed: int, name: str, number: int = 0, weights: Path | None = None) -> torch.nn.Module:
    torch.manual_seed(seed + number)  # a network starts the same whatever the method; a peer starts elsewhere
    return create_model(name, classes, weights)


def _if_any(**lists) -> dict:
    return {name: values for name, values in lists.items() if values}


def run_all(this: Study, path: Path, names: list[str], seeds: int, minutes: float, again: bool, work: Path) -> dict:
    """Runs what is missing in the file at `path`, seed by seed, and keeps it there as it comes."""
    record = _opened(path, this.settings())
    key = hashlib.blake2b(json.dumps(record["settings"]).encode(), digest_size=4).hexdigest()
    wanted = [(name, seed) for seed in range(seeds) for name in ("teacher", *names)]
    done, start = record["pairs"], time.perf_counter()
    for number, (name, seed) in enumerate(wanted, 1):
        teacher_file = work / f"{this.config.data.data}-{key}" / f"teacher{seed}.safetensors"
        there = str(seed) in done.get(name, {}) and not (again and name != "teacher")
        if there and (name != "teacher" or teacher_file.is_file()):
            continue
        if minutes and time.perf_counter() - start > 60 * minutes:
            print(f"--minutes {minutes:g} are over; the same command goes on", flush=True)
            break
        try:
            found = train_one(this, name, seed, teacher_file)
        except UserError as error:
            found = {"error": str(error)}
        done.setdefault(name, {})[str(seed)] = found | {"commit": commit(), "load_average": load_average()}
        write_json(path, record)
        shown = f"top-1 {found['top1']:6.2f} %  {found['seconds']:6.1f} s" if "top1" in found else found["error"]
        print(f"{number:3}/{len(wanted)}  seed {seed}  {name:12} {shown}", flush=True)
        if "error" in found and name == "teacher":
            raise UserError(f"the teacher of seed {seed} failed: {found['error']}")
    return record


def _opened(path: Path, settings: dict) -> dict:
    """The record at `path`, or a new one."""
    if not path.is_file():
        return {"settings": settings, "environment": environment(), "commit": commit(), "pairs": {}}
    record = json.loads(path.read_text())
    if record["settings"] != settings:
        other = [name for name in settings if record["settings"].get(name) != settings[name]]
        raise UserError(f"{path} was made with other settings ({', '.join(other)}): give another --file")
    print(f"{path}: {sum(map(len, record['pairs'].values()))} runs are there already", flush=True)
    return record


def place(data: str, device: torch.device) -> Path:
    """The newest file of this data set and device, or that of today."""
    name = slug(torch.cuda.get_device_name(device)) if device.type == "cuda" else "cpu"
    folder = ROOT / "bench" / "results" / name
    return max(folder.glob(f"*-accuracy-{data}.json"), default=folder / f"{datetime.date.today()}-accuracy-{data}.json")


def arguments(words: list[str] | None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    args = arguments(words)
    device = torch.device(args.device)
    path = args.file or place(args.data, device)
    if args.table:
        if not path.is_file():
            raise UserError(f"--table: there is no {path}; run without --table first")
        record = json.loads(path.read_text())
    else:
        names = args.methods.split(",")
        for name in names:
            if name not in METHODS:
                raise UserError(f"--methods: unknown {name!r}{nearest(name, METHODS)}; there are {', '.join(METHODS)}")
        this = study(args.data, args.epochs, device, args.folder)
        record = run_all(this, path, names, args.seeds, args.minutes, args.again, args.work)
    print(f"{heading(record)}\n\n{table(record)}")
    draw(record, path.with_suffix(".png"))
    path.with_suffix(".md").write_text(f"{heading(record)}\n\n{table(record)}\n")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"accuracy: {error}", file=sys.stderr)
        sys.exit(2)
