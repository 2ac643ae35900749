"""Find the images of a folder and check them before a run begins.

Order and labels are those of torchvision's ImageFolder: classes sorted by name, then folders by path, then files by
name. walk.py says which entries of the folder are read.
"""

import os
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from ..errors import UserError, no_folder
from ..foreign import open_file
from .stored import Places
from .walk import EXTENSIONS, Found, files_below, holders, identity, look, shown, some

Formats = dict[str, tuple[int, str]]  # by the kind of image: the number of files, and one of them


@dataclass(frozen=True)
class Split:
    """The images of train/ or val/. `labels[i]` is the position in `classes` of the class of `files[i]`.

    The label of an image without a class is UNLABELLED (-100). `notes` are lines to log: what was skipped.
    `places` None: `files` are paths. Else the images lie in shards, and `files` are the shard's path with the image's
    name in it, for messages.
    """

    classes: tuple[str, ...]
    files: list[str]
    labels: list[int]
    formats: Formats = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    places: Places | None = None

    def take(self, positions: list[int]) -> "Split":
        """The images at these positions."""
        files, labels = [self.files[i] for i in positions], [self.labels[i] for i in positions]
        places = None if self.places is None else self.places.take(positions)
        return replace(self, files=files, labels=labels, places=places)


def scan(root: str, wanted: frozenset[str] | None = None, check: bool = True) -> Split:
    """The images of one split; its folders are the classes. Raises UserError if a file is unusable or a class empty.

    `wanted`: the images to take, all by default. Without `check`, unusable files are left in, for another check.
    """
    found = Found()
    beside, classes = look(root, found)
    if beside:
        here = "beside the class folders" if classes else "image" if len(beside) == 1 else "images"
        found.skip(here, beside[0], len(beside))
    if not classes:
        raise UserError(
            f"{root!r} holds no class folders{_but(found, root)}: put the images of each class into a folder of their "
            "own"
        )
    by_class, empty, above = [], [], (*holders(root), identity(root))
    for name in classes:
        below = Found()
        files = files_below(os.path.join(root, name), below, above)
        by_class.append(files if wanted is None else [file for file in files if file in wanted])
        if not by_class[-1]:
            empty.append(f"{shown(name)}{_but(below, root)}")
        found.add(below)
    found.wrong = [] if not check else [each for each in found.wrong if wanted is None or each[0] in wanted]
    found.refuse_wrong()
    if empty:
        raise UserError(
            f"no images in {len(empty)} of the {len(classes)} classes of {root!r} ({some(empty, quote=False)}): "
            f"add files ending in {' '.join(EXTENSIONS)}, or remove the folders from train/ and val/"
        )
    files = [file for group in by_class for file in group]
    labels = [label for label, group in enumerate(by_class) for _ in group]
    formats = check_headers(files) if check else {}
    return Split(tuple(classes), files, labels, formats, found.notes(root) + _look_alikes(root, classes))


def scan_images(root: str) -> Split:
    """All images below a folder, without classes or labels. Raises UserError if there is none or one is unusable."""
    if not os.path.isdir(root):
        raise UserError(f"--unlabelled {root!r}: {no_folder(root)}; give one with images at any depth")
    found = Found()
    files = files_below(root, found)
    found.refuse_wrong()
    if not files:
        raise UserError(f"{root!r} holds no images{_but(found, root)}: add files ending in {' '.join(EXTENSIONS)}")
    return Split((), files, [], check_headers(files), found.notes(root))


def _but(found: Found, root: str) -> str:
    text = found.skipped_text(root)
    return f", but {text}" if text else ""


def _look_alikes(root: str, classes: list[str]) -> tuple[str, ...]:
    """A warning if names of classes differ by nothing that a reader would see as another class."""
    groups: dict[str, list[str]] = {}
    for name in classes:
        groups.setdefault(unicodedata.normalize("NFKC", name).casefold().strip(), []).append(name)
    alike = [" and ".join(map(repr, group)) for group in groups.values() if len(group) > 1]
    if not alike:
        return ()
    return (
        f"WARNING: class folders of {shown(root)} differ by upper case or spaces alone: {some(alike, quote=False)}; "
        "they count as different classes",
    )


def check_headers(files: list[str]) -> Formats:
    """The kinds of the images. Raises UserError for files that do not begin like one or cannot be opened.

    Reads 16 bytes of each file. Threads help on network storage, where opening a file waits. On a local disk it takes
    about 10 us per file.
    """
    chunks = [files[start : start + 256] for start in range(0, len(files), 256)]
    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(_kinds, chunks))
    found, formats = Found(), Formats()
    for kinds, wrong in results:
        found.wrong += wrong
        for kind, (count, file) in kinds.items():
            before, first = formats.get(kind, (0, file))
            formats[kind] = before + count, first
    found.refuse_wrong()
    return formats


def _kinds(files: list[str]) -> tuple[Formats, list[tuple[str, str]]]:
    """(the kinds of the images, [(file, what is wrong with it)])"""
    formats, wrong = Formats(), []
    for file in files:
        try:
            with open_file(file) as stream:
                head = stream.read(16)
        except OSError as error:
            wrong.append((file, f"cannot be opened ({error.strerror})"))
            continue
        kind = image_kind(head)
        if kind is None:
            names = ", ".join(sorted({kind.upper() for kind in STARTS.values()} - {"PPM"}))
            start = f"begins with {head[:8]!r}, not as a picture ({names}, WEBP, AVIF, PPM)"
            wrong.append((file, start if head else "is empty (0 bytes)"))
        else:
            count, first = formats.get(kind, (0, file))
            formats[kind] = count + 1, first
    return formats, wrong


UNKNOWN = "unknown"  # the kind of an image in a shard that does not begin like one

STARTS = {
    b"\xff\xd8\xff": "jpeg",
    b"\x89PNG\r\n\x1a\n": "png",
    b"BM": "bmp",
    b"GIF87a": "gif",
    b"GIF89a": "gif",
    b"II*\0": "tiff",
    b"MM\0*": "tiff",
    b"II+\0": "tiff",  # with offsets of 64 bits
    b"MM\0+": "tiff",
    **{b"P%d" % number: "ppm" for number in range(1, 7)},  # also PGM and PBM
}


def image_kind(head: bytes) -> str | None:
    """The format of a file, from its first 16 bytes, or None."""
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    if head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"avis", b"mif1"):  # HEIC has other brands
        return "avif"
    return next((kind for start, kind in STARTS.items() if head.startswith(start)), None)
