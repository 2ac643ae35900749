"""The whole job against a peer: distillation by timm's pieces, by fastkd, and by fastkd from a cache of the teacher.

    python bench/scripts/peer.py                      both pairs, 3 seeds: about 30 minutes on two idle cores
    python bench/scripts/peer.py --pairs small        the small pair alone
    python bench/scripts/peer.py --minutes 10         stops in time; the same line continues
    python bench/scripts/peer.py --table              the table of the finished runs

All ways train the same student from the same teacher on the same JPEG files: Fashion-MNIST, enlarged to 112 pixels.
They share batch, epochs, learning rate, optimizer, loss and number of workers. A time is that of all epochs: decoding,
training, evaluation after each epoch, checkpoints. Images/s are training images over that time. Each run is a process
of its own, and the ways take turns. `cached`: the time to fill the cache is a column of its own.

timm: create_dataset, create_loader with its prefetcher, LogitDistillationTask, create_optimizer_v2,
create_scheduler_v2, CheckpointSaver, in the order of its train.py (the wheel holds the pieces, not the script). Its
defaults are kept: SGD with Nesterov momentum 0.9 at 0.05, cosine, no decay of biases and norms, random resized crops
of 8 to 100 % and a flip, evaluation at crop_pct 0.875. What fastkd's recipe has not is off: colour jitter 0.4, label
smoothing 0.1, the random choice between bilinear and bicubic, epochs of warm-up. It gets channels-last, as fastkd, and
the same schedule: one update of the learning rate per step.
"""

import argparse
import datetime
import json
import multiprocessing
import os
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as on the command line, before torch is loaded

from fastkd import bench
from fastkd.bench import Record
from fastkd.bench.scripts.peer_runs import HAS_CACHE, PAIRS, make_folder, run_way, settings, train_teacher
from fastkd.errors import UserError

WAYS = ("timm", "online", "cached")
SEEDS = 3


def run_all(args: argparse.Namespace, record: Record) -> None:
    """Run what is missing, and write each result at once."""
    start, runs = time.perf_counter(), record["runs"]
    for name in args.pairs:
        folder = make_folder(PAIRS[name], args.work / f"{name}-images")
        weights = _alone(train_teacher, PAIRS[name], folder, args.work / f"{name}-teacher")
        for seed in range(args.seeds):
            for way in (WAYS[(seed + turn) % len(WAYS)] for turn in range(len(WAYS))):
                if way not in args.ways or str(seed) in runs.setdefault(name, {}).setdefault(way, {}):
                    continue
                if args.minutes and time.perf_counter() - start > 60 * args.minutes:
                    print(f"--minutes {args.minutes:g} are over; the same command goes on", flush=True)
                    return
                found = _alone(run_way, way, name, PAIRS[name], folder, weights, seed)
                print(f"{name:6} {way:7} seed {seed}  {_shown(found)}", flush=True)
                if "error" not in found:
                    runs[name][way][str(seed)] = found
                    bench.write_json(args.file, record)


def _alone(function, *arguments):  # type: ignore[no-untyped-def]
    """`function(*arguments)` in a new process: no run finds what another has compiled or cached."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _shown(found: Record) -> str:
    return found["error"] if "error" in found else f"{found['seconds']:7.1f} s  top-1 {found['top1']:.2f} %"


def table(record: Record) -> str:
    """A table for each pair: images/s as the median of the seeds, and top-1 with its range."""
    parts = []
    for name, found in record["runs"].items():
        ways = {way: runs for way, runs in found.items() if runs}
        pair = record["settings"]["pairs"][name]
        count = pair["images"][0] * pair["epochs"]
        rate = {way: count / statistics.median(run["seconds"] for run in runs.values()) for way, runs in ways.items()}
        rows = [_row(way, rate, list(ways[way].values()), count) for way in WAYS if way in ways]
        columns = ["way", "img/s", "of timm", "fill, s", "img/s with fill", "top-1 %", "lowest", "highest", "runs"]
        title = f"{pair['teacher']} -> {pair['student']}, {pair['image_size']} pixels, {pair['images'][0]:,} images x "
        parts.append(f"{title}{pair['epochs']} epochs\n\n{bench.markdown_table(columns, rows, numbers=8)}")
    return "\n\n".join(parts)


def _row(way: str, rate: dict[str, float], runs: list[Record], count: int) -> list[str]:
    fills = [run["fill_seconds"] for run in runs if "fill_seconds" in run]
    fill = statistics.median(fills) if fills else 0.0
    top1 = [run["top1"] for run in runs]
    ratio = f"{rate[way] / rate['timm']:.2f}x" if "timm" in rate else "-"
    whole = count / (fill + count / rate[way])
    scores = [f"{value:.2f}" for value in (statistics.mean(top1), min(top1), max(top1))]
    return [way, f"{rate[way]:,.0f}", ratio, f"{fill:.1f}" if fills else "-", f"{whole:,.0f}", *scores, str(len(runs))]


def open_record(path: Path) -> Record:
    """The record at `path`, or a new one. Raises UserError if it has other settings."""
    wanted = json.loads(json.dumps(settings()))
    if not path.is_file():
        return {"settings": wanted, "environment": bench.environment(), "commit": bench.commit(), "runs": {}}
    record: Record = json.loads(path.read_text())
    if record["settings"] != wanted:
        other = [name for name in wanted if record["settings"].get(name) != wanted[name]]
        raise UserError(f"{path} was made with other settings ({', '.join(other)}): give another --file")
    return record


def main(words: list[str] | None = None) -> None:
    args = _parser().parse_args(words)
    if args.seeds < 1:
        raise UserError(f"--seeds must be 1 or more, got {args.seeds}")
    if "cached" in args.ways and not HAS_CACHE:
        print("cached: this fastkd has no --teacher-cache; left out", flush=True)
        args.ways = [way for way in args.ways if way != "cached"]
    folder = bench.results_folder(None)
    newest = sorted(folder.glob("*-peer.json"))
    args.file = args.file or (newest[-1] if newest else folder / f"{datetime.date.today()}-peer.json")
    if args.table and not args.file.is_file():
        raise UserError(f"--table: there is no {args.file}; run without --table first")
    record = open_record(args.file)
    if not args.table:
        run_all(args, record)
    text = table(record)
    print(text)
    args.file.parent.mkdir(parents=True, exist_ok=True)
    args.file.with_suffix(".md").write_text(f"{text}\n")


def _parser() -> argparse.ArgumentParser:
    parser = bench.script_parser(__doc__)
    parser.add_argument("--pairs", nargs="+", choices=tuple(PAIRS), default=list(PAIRS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seeds", type=int, default=SEEDS, help="0, 1, ... up to this number of seeds")
    parser.add_argument("--minutes", type=float, default=0, help="begin no new run after so many")
    parser.add_argument("--table", action="store_true", help="train nothing: the table from the file")
    parser.add_argument("--file", type=Path, help="the JSON, by default the newest, or a new one")
    parser.add_argument("--work", type=Path, default=Path("runs/peer"), help="where images and teachers are kept")
    return parser


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"peer: {error}", file=sys.stderr)
        sys.exit(2)
