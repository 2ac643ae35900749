"""Tar shards and parquet files made from the pictures of a folder."""

import io
import json
import tarfile
from pathlib import Path

from fastkd.data.scan import Split, scan


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def write_tars(folder: Path, part: str, split: Split, count: int, label: str = "cls") -> list[Path]:
    """The images of a split in order, in `count` shards of WebDataset. label: cls, json or "" for none."""
    folder.mkdir(parents=True, exist_ok=True)
    each, files = -(-len(split.files) // count), []
    for number in range(count):
        files.append(folder / f"{part}-{number:03}.tar")
        with tarfile.open(files[-1], "w") as tar:
            for i in range(number * each, min((number + 1) * each, len(split.files))):
                path = Path(split.files[i])
                add(tar, f"{path.parent.name}/{path.stem}{path.suffix}", path.read_bytes())
                text = {"cls": str(split.labels[i]), "json": json.dumps({"label": split.classes[split.labels[i]]})}
                if label:
                    add(tar, f"{path.parent.name}/{path.stem}.{label}", text[label].encode())
                add(tar, f"{path.parent.name}/{path.stem}.pyd", b"cos\nsystem\n(S'false'\ntR.")  # is never unpickled
    return files


def tar_folder(root: Path, pictures: Path, label: str = "cls") -> Path:
    """train-000.tar and train-001.tar, val-000.tar, and classes.txt."""
    for part, count in (("train", 2), ("val", 1)):
        write_tars(root, part, scan(str(pictures / part)), count, label)
    (root / "classes.txt").write_text("ant\nbee\ncow\n")
    return root


def write_parquet(file: Path, split: Split, rows: int = 5, names: bool = True) -> Path:
    """The images of a split as `datasets` writes them: image {bytes, path} and label, row groups of `rows` images."""
    import pyarrow
    import pyarrow.parquet

    images = [{"bytes": Path(name).read_bytes(), "path": Path(name).name} for name in split.files]
    table = pyarrow.table({"image": images, "label": split.labels})
    label = {"names": list(split.classes), "_type": "ClassLabel"} if names else {"dtype": "int64", "_type": "Value"}
    features = {"image": {"_type": "Image"}, "label": label}
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    file.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table, file, row_group_size=rows)
    return file
