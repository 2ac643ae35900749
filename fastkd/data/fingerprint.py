"""A hash that tells one set of training images from another, for what is kept beside a run, such as a teacher cache.

Images in memory count with every byte. Of files, names, order and labels count, and the sizes in bytes of up to SIZED
files, spread evenly: that costs milliseconds for a million files, and shows images that were scaled or encoded anew.
Of a data set of the caller counts what it has in memory, of more than 1 GB evenly spaced rows; no image is decoded.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from .scan import Split

SIZED = 4096
LARGEST = 1 << 30  # bytes of a part of a caller's data set


def of_tensors(*tensors: Tensor) -> str:
    """Of the content and shape of tensors."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        digest.update(repr(tuple(tensor.shape)).encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def of_text(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def of_file(path: str) -> str:
    """Of the content of a file, such as the manifest of packed images, which has the checksums of all others."""
    return hashlib.blake2b(Path(path).read_bytes(), digest_size=16).hexdigest()


def of_split(split: Split) -> str:
    """Of the files of a split, wherever the folder that holds them lies."""
    return of_files(split.files, split.labels)


def of_files(files: Sequence[str], labels: Sequence[int]) -> str:
    """Of files and their labels, wherever the folder that holds the files lies."""
    prefix = os.path.commonprefix(files)  # letter by letter; 0.3 s for a million paths, relpath takes 10 s
    root = prefix[: prefix.rfind(os.sep) + 1]
    digest = hashlib.blake2b(digest_size=16)
    for file, label in zip(files, labels, strict=True):
        digest.update(os.fsencode(file[len(root) :]))
        digest.update(f"\0{label}\0".encode())
    for file in files[:: max(1, len(files) // SIZED)]:
        digest.update(str(os.path.getsize(file) if os.path.isfile(file) else -1).encode() + b"\0")
    return digest.hexdigest()


def of_dataset(dataset: Any) -> str:
    """Of a data set of the caller, by the names that torch's and torchvision's have; "" if it has none of them.

    Tensors of a TensorDataset, files of `samples`, `data`, `targets`, `labels`, and the indices of a Subset of these.
    """
    try:
        found = list(_content(dataset))
    except Exception:  # the code of such a data set, its kinds of arrays and tensors may be any
        return ""
    return of_text("\0".join(found)) if found else ""


def _content(dataset: Any) -> Iterator[str]:
    if isinstance(dataset, ConcatDataset):
        for part in dataset.datasets:
            yield from _content(part)
    elif isinstance(dataset, Subset):
        if found := list(_content(dataset.dataset)):
            yield from (*found, _of_array(np.asarray(dataset.indices)))
    elif isinstance(dataset, TensorDataset):
        yield from map(_of_rows, dataset.tensors)
    else:
        samples = getattr(dataset, "samples", None)
        if isinstance(samples, list) and all(_is_file(sample) for sample in samples):
            yield of_files([os.fspath(file) for file, _ in samples], [label for _, label in samples])
        for name in ("data", "targets", "labels"):
            values = getattr(dataset, name, None)
            if isinstance(values, list) and values and all(isinstance(value, (int, np.integer)) for value in values):
                values = np.array(values)
            if isinstance(values, np.ndarray) and values.dtype.kind in "iufb":
                yield _of_array(values)
            if isinstance(values, Tensor):
                yield _of_rows(values)


def _of_array(values: np.ndarray) -> str:
    about = f"{values.shape} {values.dtype.str}"
    some = np.ascontiguousarray(values[:: 1 + values.nbytes // LARGEST] if values.ndim else values)
    return about + hashlib.blake2b(some.data, digest_size=16).hexdigest()


def _of_rows(values: Tensor) -> str:
    some = values[:: 1 + values.numel() * values.element_size() // LARGEST] if values.dim() else values
    return f"{tuple(values.shape)} {values.dtype} {of_tensors(some)}"


def _is_file(sample: Any) -> bool:
    """Whether this is (path, label), as in a DatasetFolder of torchvision."""
    is_pair = isinstance(sample, tuple) and len(sample) == 2
    return is_pair and isinstance(sample[0], (str, os.PathLike)) and isinstance(sample[1], int)
