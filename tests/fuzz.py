"""Damaged pictures through both loaders: `python tests/fuzz.py 5000` takes about 15 minutes on one core.

Each file goes through a loader of its own, in child processes of 250 files. A file is bad if Pillow refuses it, or if
it is a PNG whose checksums do not fit. No child may die or hang, every bad file must be named, and every good file must
have Pillow's pixels: exactly from the folder loader, within one level of 255 from DALI. In a few damaged files DALI is
two levels off: they are counted. DALI may refuse a good file, by name, with the way out.
"""

import argparse
import collections
import io
import os
import re
import resource
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import damage
import numpy as np
import torch
from PIL import Image

from fastkd.data import DataOptions
from fastkd.data.dali import DaliLoader
from fastkd.data.folder import FolderLoader
from fastkd.data.scan import Split
from fastkd.errors import UserError

CHUNK = 250  # files of a child process
SIDE = 28  # the loaders then resize the shorter side to 32, which the pictures have, and cut 2 pixels off each edge
DALI_REFUSES = ("cannot be decoded by DALI", "which DALI cannot decode")


def pillow(data: bytes) -> np.ndarray | None:
    """[H, W, 3], or None for a bad file. Pillow alone would read a PNG with wrong checksums."""
    try:
        if data[:4] == b"\x89PNG":
            Image.open(io.BytesIO(data)).verify()
        with Image.open(io.BytesIO(data)) as image:
            if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
                return np.stack([(np.asarray(image) >> 8).astype(np.uint8)] * 3, -1)
            return None if image.mode in ("I", "F") else np.asarray(image.convert("RGB"))
    except Exception:
        return None


def through(kind: type, file: str) -> np.ndarray | str:
    """What the loader gives for one file, [28, 28, 3] in steps of 1/255, or its error."""
    raw = DataOptions(data="", batch_size=2, image_size=SIDE, mean=(0, 0, 0), std=(1, 1, 1))
    options = replace(raw, workers=int(kind is DaliLoader))
    try:
        loader = kind(Split(("x",), [file], [0]), options, torch.device("cpu"), train=False)
        ((images, _),) = list(loader)
        return images[0].permute(1, 2, 0).mul(255).numpy()
    except UserError as error:
        assert repr(file) in str(error) and "\n" not in str(error), error
        return str(error)


def verdict(kind: type, want: np.ndarray | None, got: np.ndarray | str) -> str:
    """A row of the table; those in capitals are failures."""
    if isinstance(got, str):
        if want is None:
            return "bad, named"
        return "good, refused by DALI" if re.search("|".join(DALI_REFUSES), got) else "GOOD BUT REFUSED"
    if want is None:
        return "BAD BUT GIVEN"
    if want.shape != (32, 32, 3):
        return "good, another size"
    levels = np.abs(got - want[2:30, 2:30]).max()
    if kind is DaliLoader and 1.01 < levels < 2.01:
        return "good, 2 levels apart"  # another inverse transform or colour conversion
    return "good, equal" if levels < (1.01 if kind is DaliLoader else 0.01) else "GOOD BUT OTHER PIXELS"


def child(start: int, count: int, seed: int) -> None:
    table: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        for i, (name, data) in enumerate(damage.damaged(start + count, seed, side=32)):
            if i < start:
                continue
            file = os.path.join(folder, f"{i}_{name}.jpg")
            Path(file).write_bytes(data)
            want = pillow(data)
            for kind in (FolderLoader, DaliLoader):
                word = verdict(kind, want, through(kind, file))
                table[f"{kind.name}: {word}"] += 1
                if word.isupper():
                    print(f"! {kind.name} {i} {name}: {word}", flush=True)
            os.unlink(file)
    for key, value in table.items():
        print(f"= {value} {key}")
    print(f"memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        child(args.child, args.count, args.seed)
        return 0
    table: collections.Counter[str] = collections.Counter()
    worst, failures = 0, 0
    for start in range(0, args.count, CHUNK):
        count = min(CHUNK, args.count - start)
        command = [sys.executable, __file__, str(count), f"--seed={args.seed}", f"--child={start}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, errors="replace")
        for line in done.stdout.splitlines():
            mark, _, rest = line.partition(" ")
            if mark == "=":
                table[rest.partition(" ")[2]] += int(rest.partition(" ")[0])
            elif mark == "memory":
                worst = max(worst, int(rest))
            elif mark == "!":
                failures += 1
                print(rest)
        if done.returncode:
            failures += 1
            print(f"the child of files {start}... ended with {done.returncode}: {done.stderr[-600:]}")
    for key in sorted(table):
        print(f"{table[key]:6} {key}")
    print(f"{args.count} files, {failures} failures, {worst} MB at most")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
