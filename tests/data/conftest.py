"""A folder of pictures made with PIL: smooth gradients with shapes on them, of many sizes, modes and formats."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

SIZES = ((80, 60), (500, 375), (375, 500), (224, 224), (256, 341), (301, 257), (97, 333))  # width, height in pixels
MODES = ("RGB", "RGB", "L", "CMYK", "RGB")


def picture(i: int, width: int, height: int, mode: str) -> Image.Image:
    random = np.random.default_rng(i)
    y, x = np.mgrid[:height, :width] / max(width, height)
    slopes, phase = random.uniform(-4, 4, (3, 2)), random.uniform(0, 6, 3)
    waves = np.stack([np.sin(slopes[c, 0] * x + slopes[c, 1] * y + phase[c]) for c in range(3)], -1)
    image = Image.fromarray((127.5 + 120 * waves).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(4):
        left, top = random.integers(0, width * 2 // 3), random.integers(0, height * 2 // 3)
        box = [int(left), int(top), int(left + width // 4), int(top + height // 4)]
        draw.ellipse(box, fill=tuple(int(value) for value in random.integers(0, 256, 3)))
    if mode != "CMYK":
        return image.convert(mode)
    ink = np.asarray(image.convert("CMYK")).copy()
    ink[..., 3] = (60 * x / x.max()).astype(np.uint8)  # PIL's conversion leaves black at 0, real CMYK files do not
    return Image.fromarray(ink, mode="CMYK")


def write_split(folder: Path, classes: tuple[str, ...], per_class: int, first: int = 0) -> None:
    """Mostly JPEG, as `mode` and size turn; every seventh is a PNG, BMP or WebP in turn."""
    i = first
    for name in classes:
        (folder / name).mkdir(parents=True)
        for _ in range(per_class):
            mode, extension = MODES[i % len(MODES)], "jpg"
            if i % 7 == 6:
                mode, extension = "RGB", ("png", "bmp", "webp")[i // 7 % 3]
            image = picture(i, *SIZES[i % len(SIZES)], mode)
            image.save(folder / name / f"{i:04}_{mode}.{extension}", quality=90)
            i += 1


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """train/ with 3 classes of 9, val/ with 3 classes of 12 (every mode, size and format). Do not change it."""
    root = tmp_path_factory.mktemp("pictures")
    write_split(root / "train", ("ant", "bee", "cow"), 9)
    write_split(root / "val", ("ant", "bee", "cow"), 12)
    return root


@pytest.fixture
def small(tmp_path) -> Path:
    """A folder that a test may spoil: 2 classes, 3 images each in train/, 1 each in val/."""
    write_split(tmp_path / "train", ("ant", "bee"), 3)
    write_split(tmp_path / "val", ("ant", "bee"), 1)
    return tmp_path


@pytest.fixture
def truncated(small) -> Path:
    """One JPEG of `small` cut in half: its header is right."""
    file = sorted((small / "train" / "bee").glob("*.jpg"))[0]
    os.truncate(file, file.stat().st_size // 2)
    return file
