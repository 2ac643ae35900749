"""Damaged files of twelve kinds, as a user meets them: start, read the name, remove the file, start again."""

import os
from collections import Counter
from pathlib import Path

import damage
import numpy as np
import pytest
import torch

from fastkd.data import DataOptions, create_loaders
from fastkd.data.check import check_images
from fastkd.data.decode import decode
from fastkd.data.stored import Pictures
from fastkd.errors import UserError

pytest.importorskip("nvidia.dali")

FORMATS = ("jpeg", "jpeg_progressive", "jpeg_cmyk", "png", "png_palette", "webp", "webp_lossless", "bmp")
PLAIN = {
    "empty": lambda data: b"",
    "one_byte": lambda data: data[:1],
    "no_picture": lambda data: b"<html>404</html>" * 20,
    "zeros": lambda data: bytes(len(data)),
    "zero_end": lambda data: data[: len(data) * 2 // 3] + bytes(len(data) // 3),  # of a download that was cut off
    "dangling_link": None,
}


def write_damaged(folder: Path, count: int) -> None:
    """`count` files: twelve kinds of damage in turn, in formats that DALI reads."""
    random, good = np.random.default_rng(5), damage.good_files(40, 31)
    kinds = [*PLAIN, *(way.__name__ for way in damage.WAYS)]
    assert len(kinds) == 12
    for i in range(count):
        kind, data = kinds[i % 12], good[FORMATS[i % 12 * 5 % 8 if count < 50 else i // 12 % 8]]
        file = folder / f"{kind}{i}.jpg"
        if kind == "dangling_link":
            os.symlink("/nowhere", file)
        elif kind in PLAIN:
            file.write_bytes(PLAIN[kind](data))
        else:
            file.write_bytes(getattr(damage, kind)(bytearray(data), good[FORMATS[i % 7]], random))


def make_folder(root: Path, count: int) -> Path:
    for part in ("train", "val"):
        for label in ("one", "two"):
            (root / part / label).mkdir(parents=True)
            for i in range(3):
                (root / part / label / f"{i}.jpg").write_bytes(damage.saved(damage.noisy(40, 31, i), "JPEG"))
    write_damaged(root / "train" / "one", count)
    return root


def named_one_after_another(root: Path, loader: str) -> dict[str, str]:
    """{name of a file: the message that names it}, until an epoch is complete."""
    found: dict[str, str] = {}
    while True:
        try:
            options = DataOptions(str(root), loader=loader, workers=int(loader == "dali"), batch_size=8, image_size=16)
            train, _ = create_loaders(options, torch.device("cpu"), log=lambda line: None)
            images = torch.cat([images for images, _ in train])
            assert len(images) == train.samples and images.isfinite().all()
            return found
        except UserError as error:
            message = str(error)
        named = [file for file in (root / "train" / "one").iterdir() if repr(str(file)) in message]
        assert named and "\n" not in message, message
        for file in named:
            found[file.name] = message
            file.unlink()


def is_bad(file: Path) -> bool:
    try:
        decode(str(file))
    except UserError:
        return True
    return False


@pytest.mark.parametrize("count", [24, pytest.param(200, marks=pytest.mark.every)])
def test_both_loaders_name_the_same_damaged_files(tmp_path, count, capsys):
    roots = {loader: make_folder(tmp_path / loader, count) for loader in ("dali", "folder")}
    files = sorted((roots["dali"] / "train" / "one").iterdir())
    want = {file.name for file in files if is_bad(file)}
    findings, _ = check_images(Pictures([str(file) for file in files], None), workers=0)
    assert {files[each.image].name for each in findings if each.is_bad} == want
    found = {loader: named_one_after_another(root, loader) for loader, root in roots.items()}
    assert set(found["folder"]) == want
    others = {name: found["dali"][name] for name in set(found["dali"]) - want}
    assert set(found["dali"]) >= want and all("--loader folder, which decodes it" in text for text in others.values())
    kinds = Counter(name.rstrip("0123456789.jpg") for name in want)
    with capsys.disabled():
        print(
            f"\n{len(want)} of {count} bad, {len(others)} sound ones refused by DALI: {sorted(others)}\n{dict(kinds)}"
        )
    assert len(others) <= 1 and len(kinds) == 12
