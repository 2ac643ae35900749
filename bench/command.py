"""`fastkd bench loss`: measure, show the table, write the files."""

import argparse
import os
from pathlib import Path

import torch

from fastkd.bench.cases import cases
from fastkd.bench.common import write_json
from fastkd.bench.report import COLUMNS, choose, draw, heading, losses, notes, rows
from fastkd.bench.screen import log_rank0, show_table
from fastkd.errors import UserError


def run(part: str, quick: bool, plot: str, json: str) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = choose(part, device)
    if not chosen:
        raise UserError(f"--cases {part!r}: in no case's name does a word begin so; there are {names(device)}")
    if plot and Path(plot).suffix != ".png":
        raise UserError(f"--plot must be a .png file, got {plot!r}")
    for flag, file in (("--plot", plot), ("--json", json)):
        if file:
            make_room(flag, Path(file))
    measured = losses(chosen, device, quick, log_rank0)
    show(measured)
    if plot:
        draw(measured, Path(plot))
    if json:
        write_json(json, measured)


def show(measured: dict) -> None:
    log_rank0(heading(measured))
    show_table(COLUMNS, [row for record in measured["cases"] for row in rows(record)], numbers=5)
    for note in notes(measured):
        log_rank0(note)


def names(device: torch.device) -> str:
    return ", ".join(case.name for case in cases(device))


def asked_file(about: str) -> Path | None:
    """The value of --file, the one option of a script that `about` describes; its folder is there."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--file", type=Path, help="JSON, with a .md beside it")
    path = parser.parse_args().file
    try:
        if path:
            make_room("--file", path)
    except UserError as error:
        parser.error(str(error))
    return path


def make_room(flag: str, file: Path) -> None:
    """UserError where the file cannot be: before the minutes of measuring, not after."""
    if file.is_dir():
        raise UserError(f"{flag} must be a file, {str(file)!r} is a folder")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag}: {str(file.parent)!r} cannot be made: {error.strerror}") from None
    if not os.access(file.parent, os.W_OK):
        raise UserError(f"{flag}: {str(file.parent)!r} cannot be written to")
