"""Fashion-MNIST and MNIST from their IDX files, compressed with gzip or not.

H. Xiao, K. Rasul, R. Vollgraf, arXiv:1708.07747 (licence MIT); Y. LeCun, C. Cortes, C. Burges, "The MNIST database".
An IDX file of bytes begins with 0, 0, 8, the number of dimensions, and each dimension as a big-endian int32.

The MD5 of the uncompressed content is checked: the two sets have files of the same names and sizes, and packages such
as Debian's dataset-fashion-mnist compress them anew, so the MD5 of the .gz differs. The files may lie in the folder
itself or where torchvision puts them.
"""

import gzip
import io
import math
import os
import zlib

import numpy as np
from torchvision.datasets import MNIST, FashionMNIST

from ..errors import UserError
from ..foreign import open_file
from .files import FoundSet, check_md5, check_target, holds, md5_of

SETS: dict[str, type[MNIST]] = {"fashion-mnist": FashionMNIST, "mnist": MNIST}
SIDE = 28  # pixels
# of the uncompressed files: of the images and the labels, for training and for evaluation
CONTENT_MD5 = {
    "fashion-mnist": {
        "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
        "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
        "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
    },
    "mnist": {
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    },
}
CLASSES = {"fashion-mnist": tuple(FashionMNIST.classes), "mnist": tuple("0123456789")}


def read_idx_set(data_dir: str, name: str, train: bool) -> FoundSet:
    """The training or the test images. Raises UserError if they are missing or damaged, OSError if not readable."""
    paths = find(data_dir, name, train)
    if not paths:
        raise UserError(_missing(data_dir, name, train))
    images, target = (read_idx(path, dimensions) for path, dimensions in zip(paths, (3, 1), strict=True))
    if images.shape[1:] != (SIDE, SIDE):
        raise UserError(f"{paths[0]!r} holds images of {images.shape[1:]} pixels, and those of {name} are 28 x 28")
    if len(images) != len(target):
        raise UserError(f"{paths[0]!r} holds {len(images):,} images and {paths[1]!r} {len(target):,} labels")
    check_target(target, len(CLASSES[name]), repr(paths[1]))
    for path, array in zip(paths, (images, target), strict=True):
        base = os.path.basename(path).removesuffix(".gz").replace(".idx", "-idx")
        what = f"{path!r}" + (" (uncompressed)" if path.endswith(".gz") else "")
        data = _header(array) + array.tobytes()
        _refuse_other_set(data, name, what)
        check_md5(data, CONTENT_MD5[name][base], what)
    source = os.path.dirname(paths[0]) or data_dir
    return FoundSet(
        CLASSES[name], images[..., None], target.astype(np.int64), source, "MD5 of the content as published"
    )


def _refuse_other_set(data: bytes, name: str, what: str) -> None:
    """Raise UserError if the file belongs to another data set."""
    found = md5_of(data)
    for other, known in CONTENT_MD5.items():
        if other != name and found in known.values():
            raise UserError(
                f"{what} is of {other}, and --data is {name}: give --data {other}, or the --data-dir of {name}"
            )


def find(data_dir: str, name: str, train: bool) -> list[str]:
    """The paths of the images and the labels in the first place that has both; empty if there is none."""
    bases = _bases(train)
    for place in (data_dir, os.path.join(data_dir, "raw"), os.path.join(data_dir, SETS[name].__name__, "raw")):
        paths = []
        for base in bases:
            dotted = base.replace("-idx", ".idx")  # the name in some archives
            names = [name + ending for name in (base, dotted) for ending in ("", ".gz")]
            paths += [path for name in names if os.path.isfile(path := os.path.join(place, name))][:1]
        if len(paths) == len(bases):
            return paths
    return []


def _bases(train: bool) -> tuple[str, str]:
    """The names of the two files of a part, without .gz: images, labels."""
    part = "train" if train else "t10k"
    return f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"


def _missing(data_dir: str, name: str, train: bool) -> str:
    listed = ", ".join(f"{base}[.gz] (MD5 uncompressed {CONTENT_MD5[name][base]})" for base in _bases(train))
    return (
        f"--data-dir {data_dir!r} does not hold the {'training' if train else 'test'} images of {name} (it holds "
        f"{holds(data_dir)}): put {listed} there or into {SETS[name].__name__}/raw; --download gets them where the "
        "network allows"
    )


def read_idx(path: str, dimensions: int) -> np.ndarray:
    """The uint8 array of an IDX file with this number of dimensions. Raises UserError if it is damaged."""
    data = _content(path)
    start = b"\0\0\x08" + bytes([dimensions])
    if data[:4] != start:
        raise UserError(f"{path!r} is no IDX file of bytes in {dimensions} dimensions: it begins with {data[:4]!r}")
    offset = 4 + 4 * dimensions
    if len(data) < offset:
        raise UserError(f"{path!r} ends within its header, after {len(data)} bytes: download it again")
    shape = tuple(int(size) for size in np.frombuffer(data, ">u4", dimensions, 4))
    size = math.prod(shape)
    if len(data) - offset != size:
        raise UserError(
            f"{path!r} holds {len(data) - offset:,} bytes after its header, which says {' x '.join(map(str, shape))} = "
            f"{size:,}: it is truncated or damaged, download it again"
        )
    return np.frombuffer(data, np.uint8, offset=offset).reshape(shape).copy()


def _header(array: np.ndarray) -> bytes:
    return b"\0\0\x08" + bytes([array.ndim]) + np.array(array.shape, ">u4").tobytes()


LARGEST = 1 << 28  # bytes; the largest real file has 47 MB


def _content(path: str) -> bytes:
    with open_file(path) as stream:
        data = stream.read(LARGEST + 1)
    if data[:2] == b"\x1f\x8b":  # gzip, whatever the name says
        try:
            data = gzip.GzipFile(fileobj=io.BytesIO(data)).read(LARGEST + 1)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UserError(f"{path!r} is damaged ({error}): download it again") from None
    if len(data) > LARGEST:
        raise UserError(f"{path!r} has more than {LARGEST:,} bytes; the largest file of these sets has 47,040,016")
    return data
