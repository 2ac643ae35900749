"""Parquet files of images, as Hugging Face's `datasets` writes them: a column of {bytes, path}, and one of labels.

A parquet file is read by row groups, often of 100 images. In a random order each image costs the reading of its group,
so a line advises to pack the images first. Needs pyarrow: pip install 'fastkd[parquet]'.
"""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from ..errors import UserError
from ..foreign import open_file
from .scan import Formats
from .stored import Places
from .walk import shown

LARGEST = 8 << 30  # bytes of a row group, unpacked
UNPACKED = 4  # times the size of the file: what a row group may unpack to; images are compressed already
IMAGES, LABELS = ("image", "img", "jpg", "png"), ("label", "labels", "cls", "fine_label")

Log = Callable[[str], None]


def open_parquet(file: str) -> Any:
    """A pyarrow ParquetFile. Raises UserError if it is damaged, or if pyarrow is not installed."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{file!r}: reading parquet files needs pyarrow: pip install 'fastkd[parquet]', or pip install pyarrow"
        ) from None
    try:
        with open_file(file):  # refuses a pipe, for which pyarrow would wait
            pass
        return pyarrow.parquet.ParquetFile(file, memory_map=True)
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        raise UserError(f"{file!r} is no parquet file, or is damaged ({_line(error)}): get it again") from None


def _line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def parquet_names(file: str) -> tuple[str, ...]:
    """The names of the classes in the metadata of `datasets`, or ()."""
    parquet = open_parquet(file)
    _, label = _columns(file, parquet)
    names = _features(parquet).get(label, {}).get("names", [])
    return tuple(map(str, names)) if isinstance(names, list) else ()


def parquet_part(files: list[str]) -> tuple[list[str], list[int | str], Places, Formats]:
    """(names of the images, labels, places, {}): what a Split is made of. The images are not read."""
    labels, names = list[int | str](), list[str]()
    groups = list[tuple[int, int, int]]()
    for number, file in enumerate(files):
        parquet = open_parquet(file)
        _check_claims(file, parquet.metadata)
        image, label = _columns(file, parquet)
        labels += _labels(file, parquet, label)
        names += [f"{file}/row {row}" for row in range(parquet.metadata.num_rows)]
        for group in range(parquet.metadata.num_row_groups):
            rows = parquet.metadata.row_group(group)
            groups.append((number, group, rows.num_rows))
    if not labels:
        raise UserError(f"{shown(files[0])}: no rows in {len(files):,} parquet files")
    return names, labels, Rows(files, groups), {}


def advise(places: Iterable[Places | None], log: Log) -> None:
    """Say once, before a training, what images in parquet files cost."""
    most = max((each.most for each in places if isinstance(each, Rows)), default=0)
    if most > 1:
        log(
            f"data: each image in a parquet file is read with up to {most - 1:,} others of its row group: for several "
            "epochs, `fastkd pack SRC DST --keep-files` copies them into shards that are read one by one"
        )


def _check_claims(file: str, metadata: Any) -> None:
    """Raise UserError if the file claims more than it can hold: a column of equal values has any length."""
    size = os.path.getsize(file)
    if metadata.num_rows > size:
        raise UserError(f"{file!r} claims {metadata.num_rows:,} images in {size:,} bytes: get it again")
    for group in range(metadata.num_row_groups):
        unpacked = metadata.row_group(group).total_byte_size
        if unpacked > LARGEST:
            raise UserError(f"{file!r}: a row group has {unpacked / 1e9:.1f} GB: write smaller ones")
        if unpacked > UNPACKED * size + (64 << 20):
            raise UserError(
                f"{file!r}: a row group of its {size:,} bytes claims to unpack to {unpacked:,}: get it again"
            )


def _features(parquet: Any) -> dict[str, Any]:
    """{column: feature} from the metadata of `datasets`; {} if there is none."""
    metadata = parquet.schema_arrow.metadata or {}
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _columns(file: str, parquet: Any) -> tuple[str, str]:
    """(the column of the images, that of the labels). Raises UserError if they cannot be told."""
    schema, features = parquet.schema_arrow, _features(parquet)
    image = _one(file, "image", schema.names, features, "Image", IMAGES)
    return image, _one(file, "label", schema.names, features, "ClassLabel", LABELS)


def _one(file: str, what: str, columns: list[str], features: dict[str, Any], kind: str, usual: Sequence[str]) -> str:
    marked = [name for name in columns if features.get(name, {}).get("_type") == kind]
    named = [name for name in usual if name in (marked or columns)]
    found = marked if len(marked) == 1 else named[:1]
    if not found:
        raise UserError(
            f"{file!r} has no column of {what}s that can be told: its columns are {', '.join(columns)}; name it "
            f"{' or '.join(usual)}"
        )
    return found[0]


def _labels(file: str, parquet: Any, column: str) -> list[int | str]:
    """Raises UserError for damage, for rows without a label, and for labels that are no whole numbers nor texts."""
    try:
        values = parquet.read([column], use_threads=False).column(0).to_pylist()
    except (OSError, ValueError) as error:
        raise UserError(f"{file!r} is damaged in its column {column!r} ({_line(error)}): get it again") from None
    for row, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            raise UserError(f"{file!r}: row {row} has the label {value!r:.60}: a label is a whole number or a text")
    return values


class Rows:
    """Places of images that are rows of parquet files."""

    def __init__(self, files: Sequence[str], groups: Sequence[tuple[int, int, int]]):
        """groups: (number of the file, of its row group, its rows), in the order of the images."""
        self.files = tuple(files)
        self.most = max(rows for _, _, rows in groups)
        counts = np.array([rows for _, _, rows in groups], dtype=np.int64)
        self.file, self.group = (np.repeat([group[at] for group in groups], counts) for at in (0, 1))
        self.row = np.concatenate([np.arange(count) for count in counts])
        self.last: tuple[tuple[str, int], Any] | None = None  # a group that was read, and where it is

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "last": None}  # another process reads for itself

    def read(self, i: int) -> bytes:
        place = self.files[self.file[i]], int(self.group[i])
        if self.last is None or self.last[0] != place:
            self.last = place, _read_group(*place)
        value = self.last[1][int(self.row[i])].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise OSError("its row holds no bytes of an image, but perhaps a path, which is not followed")
        return data

    def take(self, positions: Sequence[int]) -> "Rows":
        taken, rows = Rows(self.files, [(0, 0, self.most)]), np.asarray(positions, dtype=np.int64)
        taken.file, taken.group, taken.row = self.file[rows], self.group[rows], self.row[rows]
        return taken

    def lengths(self) -> np.ndarray:
        """Each image counts as the mean of its file, compressed: their own lengths would have to be read."""
        counts = np.bincount(self.file, minlength=len(self.files))
        sizes = np.array([os.path.getsize(file) for file in self.files])
        return np.ceil(sizes / np.maximum(1, counts)).astype(np.int64)[self.file]


def _read_group(file: str, group: int) -> Any:
    """The images of a row group: a chunked array of pyarrow."""
    parquet = open_parquet(file)
    try:
        table = parquet.read_row_group(group, columns=[_columns(file, parquet)[0]], use_threads=False)
    except (OSError, ValueError) as error:
        raise OSError(f"row group {group} is damaged: {_line(error)}") from None
    return table.column(0)
