"""CIFAR-10 and CIFAR-100 from the files of their authors: the python or the binary version, unpacked or as .tar.gz.

A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009; https://www.cs.toronto.edu/~kriz/cifar.html
describes both formats. An archive is read in place and nothing of it is written to the disk, so the paths inside do not
matter. The lists of files and MD5 are those of torchvision.datasets; the MD5 of the binary archives are on that page.
"""

import gzip
import os
import pickle
import tarfile
import warnings
import zlib
from typing import NamedTuple

import numpy as np
from torchvision.datasets import CIFAR10, CIFAR100

from ..errors import UserError
from ..foreign import read_bytes
from .files import FoundSet, check_md5, check_target, holds, md5_of

SETS: dict[str, type[CIFAR10]] = {"cifar10": CIFAR10, "cifar100": CIFAR100}
PIXELS = 3 * 32 * 32  # one image: the red, the green and the blue channel, each in rows
LARGEST = 1 << 28  # bytes of a file in an archive; the largest real one has 155 MB


class Binary(NamedTuple):
    """The binary version of a set: for each image `labels` bytes, of which the last one counts, then its pixels."""

    folder: str
    archive: str
    md5: str  # of the archive
    train: dict[str, int]  # file: number of images
    test: dict[str, int]
    names: str  # the file with the names of the classes, one a line
    classes: int
    labels: int


BINARY = {
    "cifar10": Binary(
        "cifar-10-batches-bin",
        "cifar-10-binary.tar.gz",
        "c32a1d4ab5d03f1284b67883e8d87530",
        {f"data_batch_{number}.bin": 10_000 for number in range(1, 6)},
        {"test_batch.bin": 10_000},
        "batches.meta.txt",
        10,
        1,
    ),
    "cifar100": Binary(  # a coarse and a fine label
        "cifar-100-binary",
        "cifar-100-binary.tar.gz",
        "03b5dce01913d631647c71ecec9e9cb8",
        {"train.bin": 50_000},
        {"test.bin": 10_000},
        "fine_label_names.txt",
        100,
        2,
    ),
}


class Source(NamedTuple):
    """A folder or an archive that holds a version of a set. `inside`: the folder in the archive."""

    path: str
    is_python: bool
    inside: str = ""


def read_cifar(data_dir: str, name: str, train: bool) -> FoundSet:
    """The training or the test images. Raises UserError if they are missing or damaged, OSError if not readable."""
    source = find(data_dir, name)
    if source is None:
        raise UserError(_missing(data_dir, name))
    return _read_python(source, name, train) if source.is_python else _read_binary(source, name, train)


def find(data_dir: str, name: str) -> Source | None:
    """The first complete version: python before binary, unpacked before the archive. None if there is none."""
    kind, binary = SETS[name], BINARY[name]
    versions = (
        (kind.base_folder, kind.filename, [*_python_files(kind)]),
        (binary.folder, binary.archive, [*binary.train, *binary.test, binary.names]),
    )
    for number, (folder, archive, files) in enumerate(versions):
        for place in (os.path.join(data_dir, folder), data_dir):
            if all(os.path.isfile(os.path.join(place, file)) for file in files):
                return Source(place, number == 0)
        if os.path.isfile(os.path.join(data_dir, archive)):
            return Source(os.path.join(data_dir, archive), number == 0, folder)
    return None


def _python_files(kind: type[CIFAR10]) -> dict[str, str]:
    """The MD5 of each file of the python version."""
    return {file: md5 for file, md5 in kind.train_list + kind.test_list} | {kind.meta["filename"]: kind.meta["md5"]}


def _missing(data_dir: str, name: str) -> str:
    kind, binary = SETS[name], BINARY[name]
    found, files = holds(data_dir), _python_files(kind)
    for folder in (kind.base_folder, binary.folder):
        if os.path.isdir(place := os.path.join(data_dir, folder)):
            found += f"; in {folder}: {holds(place)}"
    listed = ", ".join(f"{file} {md5}" for file, md5 in files.items())
    return (
        f"--data-dir {data_dir!r} does not hold {name} (it holds {found}): put {kind.filename} (MD5 {kind.tgz_md5}) or "
        f"{binary.archive} (MD5 {binary.md5}) there, or the whole unpacked folder {kind.base_folder} (MD5 {listed}) or "
        f"{binary.folder}; --download gets it where the network allows"
    )


def _read_python(source: Source, name: str, train: bool) -> FoundSet:
    kind, all_md5 = SETS[name], _python_files(SETS[name])
    batches = [file for file, _ in (kind.train_list if train else kind.test_list)]
    content = _contents(source, [*batches, kind.meta["filename"]], kind.tgz_md5)
    for file, data in content.items():
        check_md5(data, all_md5[file], repr(os.path.join(source.path, file)))
    unpacked = {file: _unpickle(data) for file, data in content.items()}
    classes = tuple(unpacked.pop(kind.meta["filename"])[kind.meta["key"]])
    pixels = np.concatenate([np.asarray(unpacked[file]["data"], np.uint8) for file in batches])
    key = "fine_labels" if name == "cifar100" else "labels"
    target = np.concatenate([np.asarray(unpacked[file][key], np.int64) for file in batches])
    check_target(target, len(classes), repr(source.path))
    return FoundSet(classes, _channels_last(pixels), target, source.path, "MD5 of its files as published")


def _unpickle(data: bytes) -> dict:
    """The dictionary in a file whose MD5 is that of the authors' file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy's, of pickles from Python 2
        return pickle.loads(data, encoding="latin1")


def _read_binary(source: Source, name: str, train: bool) -> FoundSet:
    binary = BINARY[name]
    counts = binary.train if train else binary.test
    if source.inside:
        check_md5(read_bytes(source.path, 4 * LARGEST), binary.md5, repr(source.path))
    content = _contents(source, [*counts, binary.names], binary.md5)
    lines = content.pop(binary.names).decode("ascii", "replace").split("\n")
    classes = tuple(line.strip() for line in lines if line.strip())
    if len(classes) != binary.classes:
        path = os.path.join(source.path, binary.names)
        raise UserError(f"{path!r} names {len(classes)} classes, and {name} has {binary.classes}: download it again")
    records = np.concatenate([_records(source, file, data, binary, counts[file]) for file, data in content.items()])
    target = records[:, binary.labels - 1].astype(np.int64)
    check_target(target, len(classes), repr(source.path))
    checked = "MD5 as published" if source.inside else "sizes and labels checked (no MD5 is published)"
    return FoundSet(classes, _channels_last(records[:, binary.labels :]), target, source.path, checked)


def _records(source: Source, file: str, data: bytes, binary: Binary, count: int) -> np.ndarray:
    """uint8 [count, labels + PIXELS]"""
    wanted = count * (binary.labels + PIXELS)
    if len(data) != wanted:
        path = os.path.join(source.path, file)
        raise UserError(f"{path!r} has {len(data):,} bytes, and {count:,} images make {wanted:,}: download it again")
    return np.frombuffer(data, np.uint8).reshape(count, -1)


def _channels_last(pixels: np.ndarray) -> np.ndarray:
    """[N, PIXELS] as [N, 32, 32, 3]"""
    return np.ascontiguousarray(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def _contents(source: Source, names: list[str], md5: str) -> dict[str, bytes]:
    """The bytes of the named files. `md5`: that of the archive, for the error if it is damaged."""
    if not source.inside:
        content = {}
        for file in names:
            content[file] = read_bytes(os.path.join(source.path, file), LARGEST)
        return content
    try:
        return _members(source, names)
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        found = md5_of(read_bytes(source.path, 4 * LARGEST))
        reason = str(error) or type(error).__name__
        raise UserError(
            f"the archive {source.path!r} is damaged ({reason}; its MD5 is {found}, expected {md5}): download it again"
        ) from None


def _members(source: Source, names: list[str]) -> dict[str, bytes]:
    """The named files of an archive, from memory. Others, links and what is outside the folder are not looked at."""
    content: dict[str, bytes] = {}
    with tarfile.open(source.path, "r:gz") as archive:
        for member in archive:
            if member.size > LARGEST or member.offset > 4 * LARGEST:  # to pass over it, all of it is unpacked
                raise UserError(f"the archive {source.path!r}: {member.name:.100} has {member.size:,} bytes")
            folder, _, file = member.name.removeprefix("./").rpartition("/")
            if folder == source.inside and file in names and member.isreg():
                content[file] = archive.extractfile(member).read()  # type: ignore[union-attr]  # a regular file
            if len(content) == len(names):
                break
    if lacking := [name for name in names if name not in content]:
        raise UserError(f"the archive {source.path!r} lacks {', '.join(lacking)} in {source.inside}: download it again")
    return {name: content[name] for name in names}
