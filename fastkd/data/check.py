"""What is wrong, or only odd, with each image of a folder or of shards: read once, in parallel.

An image that training could not read is bad. All else is a note: the image is read, perhaps not as its owner thinks.
"""

import io
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from PIL import Image
from torch import Generator, nn
from torch.utils.data import DataLoader, Dataset

from .decode import MAX_PIXELS, ORIENTATION, begin_worker, inspect
from .progress import with_bar
from .scan import image_kind
from .stored import Pictures
from .walk import EXTENSIONS

CHUNK = 64  # images per message of a process
FEW = 200  # images for which no other process is started
LARGE = 40e6  # pixels: such a picture takes as long as 200 of ImageNet's

BAD = {
    "unreadable": "cannot be opened or read",
    "empty": "0 bytes",
    "no picture": "the content is none that Pillow knows, such as a page of HTML",
    "damaged": "truncated, or bytes have changed",
    "too large": "more pixels than are read",
}
NOTES = {
    "wrong name": "the ending is of another format; the content counts",
    "animated": "several pictures; the first is read",
    "CMYK": "becomes RGB without a colour profile",
    "16 bits": "becomes 8 bits",
    "large": f"above {LARGE / 1e6:.0f} million pixels; slow to read",
    "turned": "EXIF says that it is shown turned; --exif does so",
    "duplicate": "the same bytes as another image",
    "other label": "the same bytes as an image of another class",
    "train and val": "the same bytes in train/ and val/",
}
ENDINGS = {"JPEG": "jpg jpeg jfif jpe", "MPO": "jpg jpeg jfif jpe mpo", "PNG": "png", "BMP": "bmp dib", "GIF": "gif"}
ENDINGS |= {"DIB": "bmp dib", "WEBP": "webp", "TIFF": "tif tiff", "PPM": "ppm pgm pbm pnm", "AVIF": "avif"}


@dataclass(frozen=True)
class Finding:
    """Of one image: a key of BAD or NOTES, and details such as the decoder's reason; perhaps empty."""

    image: int
    kind: str
    detail: str

    @property
    def is_bad(self) -> bool:
        return self.kind in BAD


def check_images(pictures: Pictures, workers: int, side: int | None = None) -> tuple[list[Finding], list[bytes]]:
    """(what was found, in the order of the images; the hash of each image's bytes, empty if it cannot be read).

    workers: processes that read. side: the shorter side that the images will be resized to, see decode.inspect.
    """
    chunks = DataLoader(
        _Examined(pictures, side),
        batch_size=CHUNK,
        num_workers=workers if len(pictures) > FEW else 0,
        collate_fn=nn.Identity(),  # `__getitems__` makes whole chunks already
        worker_init_fn=begin_worker,
        generator=Generator(),  # else the training process's default generator is drawn from
    )
    start = time.monotonic()
    found, hashes = list[Finding](), list[bytes]()
    is_slow: Callable[[], bool] = lambda: time.monotonic() > start + 1  # noqa: E731
    for findings, some in with_bar(chunks, len(pictures), "checking images", lambda chunk: len(chunk[1]), is_slow):
        found += findings
        hashes += some
    return found, hashes


class _Examined(Dataset):
    def __init__(self, pictures: Pictures, side: int | None):
        self.pictures, self.side = pictures, side

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitems__(self, images: list[int]) -> tuple[list[Finding], list[bytes]]:
        found, hashes = list[Finding](), list[bytes]()
        for i in images:
            try:
                data = self.pictures.read(i)
            except OSError as error:
                found.append(Finding(i, "unreadable", error.strerror or str(error)))
                hashes.append(b"")
                continue
            name, limit = self.pictures.name(i), self.pictures.max_pixels
            found += [Finding(i, *each) for each in examine(name, data, self.side, limit)]
            hashes.append(blake2b(data, digest_size=16).digest())
        return found, hashes


def examine(name: str, data: bytes, side: int | None = None, max_pixels: int = MAX_PIXELS) -> list[tuple[str, str]]:
    """(kind, detail) of all that is bad or odd with an image of this name and content."""
    if not data:
        return [("empty", "")]
    kind, reason = inspect(name, side, lambda _: data, max_pixels, thorough=True)
    if not reason:
        return _odd(name, kind, data)
    if image_kind(data[:16]) is None:
        return [("no picture", f"begins with {data[:8]!r}")]
    is_large = "pixels" in reason and "limit" in reason or "become" in reason or "--max-pixels" in reason
    return [("too large" if is_large else "damaged", reason)]


def _odd(name: str, kind: str, data: bytes) -> list[tuple[str, str]]:
    found = list[tuple[str, str]]()
    ending = os.path.splitext(name)[1].lower()
    if ending in EXTENSIONS and ending[1:] not in ENDINGS.get(kind.split()[0], ending[1:]).split():
        found.append(("wrong name", f"it is {kind}"))
    with Image.open(io.BytesIO(data)) as image:
        width, height = image.size
        if width * height > LARGE:
            found.append(("large", f"{width} x {height} pixels"))
        if image.mode == "CMYK":
            found.append(("CMYK", ""))
        if image.mode.startswith("I"):
            found.append(("16 bits", ""))
        if getattr(image, "is_animated", False) and image.format != "MPO":  # of a stereo camera
            found.append(("animated", f"{getattr(image, 'n_frames', 0)} pictures"))
        try:
            turn = image.getexif().get(ORIENTATION, 1)
        except Exception as error:  # damaged EXIF raises anything; the pixels are sound
            found.append(("turned", f"its EXIF cannot be read ({type(error).__name__})"))
        else:
            if turn != 1:
                found.append(("turned", f"orientation {turn}"))
    return found


def duplicates(
    hashes: Sequence[bytes], names: Sequence[str], labels: Sequence[object], parts: Sequence[str]
) -> list[Finding]:
    """A finding for each image whose bytes an earlier one has; `parts` are train, val or empty, one per image."""
    first: dict[bytes, int] = {}
    found = list[Finding]()
    for i, digest in enumerate(hashes):
        if not digest or (before := first.setdefault(digest, i)) == i:
            continue
        kind = "other label" if labels[i] != labels[before] else "duplicate"
        kind = "train and val" if parts[i] != parts[before] and kind == "duplicate" else kind
        found.append(Finding(i, kind, f"as {names[before]}"))
    return found
