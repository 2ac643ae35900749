"""Find the images of a folder and check them before a run begins.

Order and labels are those of torchvision's ImageFolder: classes sorted by name, then files sorted by path.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from ..errors import UserError, nearest

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


@dataclass(frozen=True)
class Split:
    """The images of train/ or val/. `labels[i]` is the position in `classes` of the class of `files[i]`."""

    classes: tuple[str, ...]
    files: list[str]
    labels: list[int]
    formats: dict[str, tuple[int, str]] = field(default_factory=dict)  # kind: the number of files, and one of them


def scan_pair(root: str) -> tuple[Split, Split]:
    """The images of `root`/train and `root`/val. Every file's header is read. Raises UserError if one is unusable."""
    if not os.path.isdir(root):
        raise UserError(
            f"data={root!r}: no such folder; give one with train/<class>/* and val/<class>/*, or 'digits', or "
            "'synthetic'" + nearest(root, ["digits", "synthetic"])
        )
    folders, others = next(_walk(root))[1:]
    missing = [name for name in ("train", "val") if name not in folders]
    if missing:
        raise UserError(
            f"data={root!r} has no {' and no '.join(name + '/' for name in missing)} inside "
            f"(it holds {_some(sorted(folders + others)) or 'nothing'}): arrange the images as train/<class>/* and "
            "val/<class>/*"
        )
    train, val = (scan(os.path.join(root, name)) for name in ("train", "val"))
    only_train, only_val = sorted({*train.classes} - {*val.classes}), sorted({*val.classes} - {*train.classes})
    if only_train or only_val:
        raise UserError(
            f"train/ and val/ of {root!r} hold different classes (only in train: {_some(only_train) or 'none'}; "
            f"only in val: {_some(only_val) or 'none'}): make the class folders the same"
        )
    return train, val


def scan(root: str) -> Split:
    """The images of one split; its folders are the classes. Hidden folders and other files are skipped."""
    classes = sorted(name for name in next(_walk(root))[1] if name[0] != ".")
    if not classes:
        raise UserError(f"{root!r} holds no class folders: put the images of each class into a folder of their own")
    by_class = []
    for name in classes:
        walk = sorted(_walk(os.path.join(root, name)))
        paths = (os.path.join(where, file) for where, _, files in walk for file in sorted(files))
        by_class.append([path for path in paths if path.lower().endswith(EXTENSIONS)])
    empty = [name for name, files in zip(classes, by_class, strict=True) if not files]
    if empty:
        raise UserError(
            f"no images in {len(empty)} of the {len(classes)} classes of {root!r} ({_some(empty)}): "
            f"add files ending in {' '.join(EXTENSIONS)}, or remove the folders from train/ and val/"
        )
    files = [file for group in by_class for file in group]
    formats = _check_headers(files)
    return Split(tuple(classes), files, [label for label, group in enumerate(by_class) for _ in group], formats)


def _walk(folder: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """os.walk, also through links. Raises UserError for a folder that cannot be read."""

    def stop(error: OSError) -> None:
        raise UserError(f"{error.filename!r} cannot be read ({error.strerror}): check its permissions") from None

    return os.walk(folder, onerror=stop, followlinks=True)


def _check_headers(files: list[str]) -> dict[str, tuple[int, str]]:
    """{kind: (number of files, one of them)}. Reads 16 bytes of each file.

    Raises UserError for files that do not begin like an image or cannot be opened.

    Threads help on network storage, where opening a file waits. On a local disk it takes about 10 us per file.
    """
    chunks = [files[start : start + 256] for start in range(0, len(files), 256)]
    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(_kinds, chunks))
    wrong = [problem for _, problems in results for problem in problems]
    if wrong:
        more = f" and {len(wrong) - 1} more: {_some([repr(file) for file, _ in wrong[1:]])};" if wrong[1:] else ";"
        raise UserError(f"{wrong[0][0]!r} {wrong[0][1]}{more} repair or remove these files")
    formats: dict[str, tuple[int, str]] = {}
    for kinds, _ in results:
        for kind, (count, file) in kinds.items():
            before, first = formats.get(kind, (0, file))
            formats[kind] = before + count, first
    return formats


def _kinds(files: list[str]) -> tuple[dict[str, tuple[int, str]], list[tuple[str, str]]]:
    """({kind: (number of files, one of them)}, [(file, what is wrong with it)])"""
    kinds: dict[str, tuple[int, str]] = {}
    found = []
    for file in files:
        try:
            with open(file, "rb", buffering=0) as stream:
                head = stream.read(16)
        except OSError as error:
            found.append((file, f"cannot be opened ({error.strerror})"))
            continue
        kind = image_kind(head)
        if kind is None:
            start = f"begins with {head[:8]!r}, not as a JPEG, PNG, BMP or WebP" if head else "is empty (0 bytes)"
            found.append((file, start))
        else:
            kinds[kind] = kinds.get(kind, (0, file))[0] + 1, kinds.get(kind, (0, file))[1]
    return kinds, found


def image_kind(head: bytes) -> str | None:
    """The format of a file, from its first 16 bytes, or None."""
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    starts = {b"\xff\xd8\xff": "jpeg", b"\x89PNG\r\n\x1a\n": "png", b"BM": "bmp"}
    return next((kind for start, kind in starts.items() if head.startswith(start)), None)


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f", and {len(names) - most} more" if len(names) > most else "")
