"""One picture file to pixels, or an error that names the file.

The content tells the format, not the name's ending. torchvision decodes JPEG. Pillow decodes all other formats that it
knows: PNG, WebP, BMP, GIF (the first frame), TIFF, PPM, PGM, AVIF. A file is bad if Pillow refuses it. So is a PNG
whose checksums do not fit, and a JPEG that ends with zeros, for Pillow would make up the lost pixels. The pixels are
those of Pillow's `convert("RGB")`: CMYK and palettes become RGB, alpha is dropped and nothing is blended with it. One
rule differs: gray of 16 bits is shifted by 8 bits, where `convert` clips it at 255.

Measured on one core, 500 x 375 pixels: torchvision decodes 1,040 JPEGs/s (after Pillow has read the header), Pillow
710. Pillow decodes 284 PNGs/s and torchvision 317, but torchvision's PNG decoder kills the process on one wrong byte.
"""

import errno
import gc
import io
import os
import re
import warnings
from collections.abc import Callable
from functools import cache
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, ImageFile, UnidentifiedImageError
from torch import Tensor

from .. import signals
from ..errors import UserError
from ..foreign import open_file
from .walk import HOW

REMEDY = f": repair or remove it{HOW}"

try:  # the same pixels as Pillow, but deprecated by torchvision 0.29: Pillow takes over once it is gone
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:
    decode_jpeg = None

MAX_PIXELS = 178_956_970  # Pillow's own limit: 537 MB as RGB
LARGE = 1 << 24  # pixels, from which on memory matters
LARGEST_FILE = 4 * MAX_PIXELS  # bytes
# Pillow knows 40 others by a file's content, and gives some of them to other programs, such as EPS to Ghostscript.
FORMATS = tuple("BMP DIB GIF JPEG MPO PNG PPM TIFF WEBP AVIF".split())
ORIENTATION = 0x0112  # the EXIF tag
SECOND_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7]")  # in a JPEG's scan: neither a stuffed byte nor a restart


def ignore_warnings() -> None:
    """For the whole process: `catch_warnings` around each picture is not safe in threads.

    Pillow warns of pictures above 89 million pixels, which we read; it refuses those above 179 million, and so do we,
    unless `max_pixels` is another number.
    Its TIFF reader warns of odd tags.
    """
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    warnings.filterwarnings("ignore", module=r"PIL\.")
    warnings.filterwarnings("ignore", message="The image decoding and encoding", category=DeprecationWarning)


ignore_warnings()


def begin_worker(_: int) -> None:
    """Call this first in a process that was forked to decode, as `worker_init_fn` of its DataLoader.

    Then Python's garbage collector leaves alone what the parent had. A pipeline of DALI that was garbage there would be
    ended here, without its threads: that kills the process. Memory pages stay shared too.
    """
    gc.freeze()
    signals.begin_worker()


def read_file(file: str, longest: int = LARGEST_FILE) -> bytes:
    """The content of a picture file. Raises OSError if it cannot be read, is no file, or has more than `longest`."""
    with open_file(file) as stream:
        check_length(os.fstat(stream.fileno()).st_size, longest)
        return stream.read()


def check_length(length: int, longest: int = LARGEST_FILE) -> None:
    """Raise OSError for more bytes than a picture has: a file with holes may claim any length."""
    if length > longest:
        raise OSError(errno.EFBIG, f"it has {length:,} bytes, and a picture may have {longest:,}")


Read = Callable[[str], bytes]  # the content of a picture by its name: of a file, or of a part of one (see stored.py)


def open_image(stream: IO[bytes], max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture, of which the header alone is read.

    Raises ValueError if it claims more pixels than `max_pixels`, and UnidentifiedImageError if it is of no format of
    ours. For more pixels than MAX_PIXELS, Pillow's own limit is raised in this process.
    """
    if Image.MAX_IMAGE_PIXELS is not None and 2 * Image.MAX_IMAGE_PIXELS < max_pixels > MAX_PIXELS:
        Image.MAX_IMAGE_PIXELS = (max_pixels + 1) // 2
    image = Image.open(stream, formats=_known_formats())
    if image.width * image.height > max_pixels:
        image.close()
        raise ValueError(too_many(image.width, image.height, max_pixels))
    return image


@cache
def _known_formats() -> list[str]:
    """Those of FORMATS that this Pillow has: AVIF came with 11.3."""
    Image.init()
    return [kind for kind in FORMATS if kind in Image.OPEN]


def too_many(width: int, height: int, max_pixels: int) -> str:
    """Why a picture is refused."""
    return f"its {width:,} x {height:,} pixels are more than {max_pixels:,}, see --max-pixels"


def decode(
    file: str, exif: bool = False, side: int | None = None, read: Read = read_file, max_pixels: int = MAX_PIXELS
) -> Tensor:
    """uint8 [3, H, W], RGB; with `exif`, turned as the EXIF orientation says.

    Raises UserError for a bad file, for a picture of more than `max_pixels`, and for one that would have more if its
    shorter side became `side`.
    """
    try:
        pixels = _pixels(read(file), exif, max_pixels)
        check_resized((pixels.shape[2], pixels.shape[1]), side, max_pixels)
        return pixels
    except Exception as error:  # damaged files raise anything: struct.error, KeyError, RuntimeError, MemoryError ...
        raise UserError(f"{file!r} cannot be decoded ({_reason(error)}){REMEDY}") from None


def inspect(
    file: str, side: int | None = None, read: Read = read_file, max_pixels: int = MAX_PIXELS, thorough: bool = False
) -> tuple[str, str]:
    """(Pillow's name of the format, ""), or ("", why the file is bad), at about a tenth of the cost of decoding.

    Finds what DALI would not notice, and pictures whose size would fill the memory; with `side`, also after resizing.
    The pixels are decoded only if the file's structure leaves a doubt, or if it has none that could be checked (BMP);
    `thorough`: always.
    0.1 ms for a JPEG of 70 kB.
    """
    try:
        data = read(file)
        with open_image(io.BytesIO(data), max_pixels) as image:
            kind = str(image.format)
            check_resized(image.size, side, max_pixels)
            sound = (kind == "PNG" and _checksums_fit(data)) or (kind == "WEBP" and _is_whole_webp(data))
        if thorough or (not sound and not _is_plain_jpeg(data)):
            _pixels(data, False, max_pixels)
    except Exception as error:
        return "", _reason(error)
    # Pillow takes the pixels from after the header then, other decoders from its beginning
    nowhere = kind == "BMP" and int.from_bytes(data[10:14], "little") < 14 + int.from_bytes(data[14:18], "little")
    return ("BMP without the place of its pixels" if nowhere else kind), ""


def header(file: str, exif: bool = False, max_pixels: int = MAX_PIXELS) -> tuple[int, int, int, str]:
    """(height, width, EXIF's orientation or 0, Pillow's name of the format) without decoding. 0.03 ms.

    The size is that of the decoded picture before it is turned. The orientation is read with `exif`. It is 1 if it is
    not one of 1 to 8, and for a TIFF, which Pillow turns. Raises ValueError with the reason if the header is damaged.
    """
    try:
        with open_file(file) as stream, open_image(io.BufferedReader(stream), max_pixels) as image:
            width, height = image.size
            turn = image.getexif().get(ORIENTATION, 1) if exif and image.format != "TIFF" else 1
            return height, width, (turn if turn in range(1, 9) else 1) if exif else 0, str(image.format)
    except Exception as error:  # damaged files raise anything
        raise ValueError(_reason(error)) from None


def check_resized(size: tuple[int, int], side: int | None, max_pixels: int = MAX_PIXELS) -> None:
    """Raise ValueError if a picture with its shorter side resized to `side` would have more pixels than we read.

    1 x 20,000 pixels would become 256 x 5,120,000: 4 GB.
    """
    pixels, limit = side * side * max(size) // min(size) if side else 0, max(max_pixels, MAX_PIXELS)
    if pixels > limit:
        raise ValueError(
            f"its {size[0]} x {size[1]} pixels become {pixels:,} when the shorter side is resized to {side}, more than "
            f"{limit:,}, cut it"
        )


def _pixels(data: bytes, exif: bool, max_pixels: int) -> Tensor:
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # some libraries switch it on: what is missing would be gray
    with open_image(io.BytesIO(data), max_pixels) as image:
        if reason := _lost_pixels(str(image.format), data):
            raise ValueError(reason)
        turn = 1 if not exif or image.format == "TIFF" else image.getexif().get(ORIENTATION, 1)  # Pillow turns TIFFs
        pixels = _fast_jpeg(data)
        if pixels is None:
            pixels = torch.from_numpy(_rgb(image)).permute(2, 0, 1)
    return _turned(pixels, turn)


def _fast_jpeg(data: bytes) -> Tensor | None:
    """uint8 [3, H, W], or None if the file is for Pillow: no JPEG, or one with errors, of which Pillow accepts some."""
    if decode_jpeg is None or data[:3] != b"\xff\xd8\xff":
        return None
    try:
        return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
    except RuntimeError:
        return None


def _rgb(image: Image.Image) -> np.ndarray:
    """uint8 [H, W, 3]"""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        gray = (np.asarray(image) >> 8).astype(np.uint8)
        return np.stack([gray] * 3, -1)
    if image.mode in ("I", "F"):  # any range is possible: `convert` would make most of them black or white
        raise ValueError(f"its pixels have 32 bits (mode {image.mode!r} of Pillow), save it with 8 or 16")
    if image.width * image.height < LARGE:
        return np.array(image.convert("RGB"))
    pixels = np.empty((image.height, image.width, 3), dtype=np.uint8)
    rows = max(1, LARGE // image.width)
    for start in range(0, image.height, rows):  # in strips, for `convert` and NumPy would each copy the whole
        strip = image.crop((0, start, image.width, min(start + rows, image.height)))
        pixels[start : start + rows] = np.asarray(strip.convert("RGB"))
    return pixels


def _turned(pixels: Tensor, orientation: Any) -> Tensor:
    """[C, H, W] as EXIF's orientation 1 to 8 wants it shown; Pillow's exif_transpose. Other values change nothing."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels.flip(1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels.flip(2)
    return pixels


def _lost_pixels(kind: str, data: bytes) -> str:
    """Damage that Pillow passes over although pixels are lost, or "". A download that was cut off often has such."""
    if kind == "PNG" and not _checksums_fit(data):
        return "its checksums do not fit, or its end is missing"
    if kind in ("JPEG", "MPO") and data.endswith(bytes(16)) and data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda"):
        return "it ends with zeros in the place of pixels"
    return ""


def _checksums_fit(png: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
            image.verify()
    except Exception:  # damaged files raise anything
        return False
    return True


def _is_whole_webp(data: bytes) -> bool:
    """True if the file has the length that its header gives."""
    return 8 + int.from_bytes(data[4:8], "little") == len(data)


def _is_plain_jpeg(data: bytes) -> bool:
    """True if there is one scan and the file ends with it: libjpeg then meets no error that DALI would pass over."""
    if data[:3] != b"\xff\xd8\xff":
        return False
    at = 2
    while data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] != b"\xda":  # segments: marker, length, content
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    if data[at : at + 2] != b"\xff\xda":
        return False
    end = SECOND_MARKER.search(data, at + 2)
    return end is not None and end.group() == b"\xff\xd9" and end.end() == len(data)


def _reason(error: Exception) -> str:
    """One line."""
    if isinstance(error, UnidentifiedImageError):
        return "it is no picture of a known format, or its header is damaged"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    reason = str(error).partition("\n")[0].partition(", could be decompression bomb")[0] or type(error).__name__
    return reason + (", see --max-pixels" if isinstance(error, Image.DecompressionBombError) else "")
