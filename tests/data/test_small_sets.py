"""CIFAR-10, CIFAR-100, Fashion-MNIST and MNIST from the files of their authors."""

import gzip
import hashlib
import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from fastkd.data import DataOptions, cifar, create_eval_loader, create_loaders, idx, small_sets
from fastkd.data.digits import digits_set
from fastkd.data.small_sets import SMALL_SETS, read_small_set
from fastkd.errors import UserError

CPU = torch.device("cpu")
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
COUNT = {"cifar10": 4, "cifar100": 12}  # images of a file
NAMES = {name: [f"class {i}" for i in range(count)] for name, count in (("cifar10", 10), ("cifar100", 100))}


def md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


def content(name: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By the name of the python version's file: pixels uint8 [N, 3072], labels [N]."""
    kind, random = cifar.SETS[name], np.random.default_rng(len(name))
    files = [file for file, _ in kind.train_list + kind.test_list]
    return {
        file: (
            random.integers(0, 256, (COUNT[name], 3072), dtype=np.uint8),
            random.integers(0, len(NAMES[name]), COUNT[name]),
        )
        for file in files
    }


def python_files(name: str) -> dict[str, bytes]:
    key = "fine_labels" if name == "cifar100" else "labels"
    files = {
        file: pickle.dumps({"data": pixels, key: labels.tolist(), "coarse_labels": [0] * len(labels)}, protocol=2)
        for file, (pixels, labels) in content(name).items()
    }
    meta = cifar.SETS[name].meta
    return files | {meta["filename"]: pickle.dumps({meta["key"]: NAMES[name]}, protocol=2)}


def binary_files(name: str) -> dict[str, bytes]:
    binary = cifar.BINARY[name]
    pairs = zip([*binary.train, *binary.test], content(name).values(), strict=True)
    files = {}
    for file, (pixels, labels) in pairs:
        coarse = [np.full((len(labels), 1), 99, np.uint8)] if binary.labels == 2 else []
        files[file] = np.concatenate([*coarse, labels[:, None].astype(np.uint8), pixels], 1).tobytes()
    return files | {binary.names: ("\n".join(NAMES[name]) + "\n\n").encode()}


def archive(folder: str, files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for file, data in files.items():
            member = tarfile.TarInfo(f"{folder}/{file}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return gzip.compress(stream.getvalue(), mtime=0)  # the same bytes, whenever it is made


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for file, data in files.items():
        (folder / file).write_bytes(data)
    return folder


@pytest.fixture(autouse=True)
def known_md5(monkeypatch):
    """The lists of MD5 and of sizes are those of the small files that these tests write."""
    for name, kind in cifar.SETS.items():
        files, binary = python_files(name), cifar.BINARY[name]
        for part in ("train_list", "test_list"):
            monkeypatch.setattr(kind, part, [[file, md5(files[file])] for file, _ in getattr(kind, part)])
        meta = kind.meta | {"md5": md5(files[kind.meta["filename"]])}
        monkeypatch.setattr(kind, "meta", meta)
        small = binary._replace(
            train=dict.fromkeys(binary.train, COUNT[name]),
            test=dict.fromkeys(binary.test, COUNT[name]),
            md5=md5(archive(binary.folder, binary_files(name))),
        )
        monkeypatch.setitem(cifar.BINARY, name, small)


def python_folder(root: Path, name: str) -> Path:
    return write(root / cifar.SETS[name].base_folder, python_files(name)).parent


def python_folder_itself(root: Path, name: str) -> Path:
    return python_folder(root, name) / cifar.SETS[name].base_folder


def python_archive(root: Path, name: str) -> Path:
    kind = cifar.SETS[name]
    return write(root, {kind.filename: archive(kind.base_folder, python_files(name))})


def binary_folder(root: Path, name: str) -> Path:
    return write(root / cifar.BINARY[name].folder, binary_files(name)).parent


def binary_archive(root: Path, name: str) -> Path:
    binary = cifar.BINARY[name]
    return write(root, {binary.archive: archive(binary.folder, binary_files(name))})


WAYS = (python_folder, python_folder_itself, python_archive, binary_folder, binary_archive)


def read(root: Path, name: str, train: bool = True, **options):
    return read_small_set(DataOptions(data=name, data_dir=str(root), **options), name, train)


@pytest.mark.parametrize("name", COUNT)
@pytest.mark.parametrize("way", WAYS)
def test_every_version_of_cifar_gives_its_content(tmp_path, name, way):
    root = way(tmp_path, name)
    before = sorted(tmp_path.rglob("*"))
    kind, known = cifar.SETS[name], content(name)
    for train, files in ((True, kind.train_list), (False, kind.test_list)):
        found = read(root, name, train)
        pixels = np.concatenate([known[file][0] for file, _ in files])
        labels = np.concatenate([known[file][1] for file, _ in files])
        assert found.classes == tuple(NAMES[name]) and found.images.dtype == torch.uint8
        assert found.images.shape == (len(labels), 32, 32, 3) and found.target.tolist() == labels.tolist()
        assert torch.equal(found.images.permute(0, 3, 1, 2).flatten(1), torch.from_numpy(pixels))
    assert sorted(tmp_path.rglob("*")) == before  # an archive is read in place


def test_torchvision_reads_the_same_files_alike(tmp_path):
    python_folder(tmp_path, "cifar100")
    theirs, ours = cifar.CIFAR100(str(tmp_path), train=False), read(tmp_path, "cifar100", train=False)
    assert (theirs.data == ours.images.numpy()).all() and theirs.targets == ours.target.tolist()
    assert tuple(theirs.classes) == ours.classes


def test_the_line_says_what_was_read_and_how_it_was_checked(tmp_path):
    said = []
    for way, words in (
        (binary_archive, ("cifar-10-binary.tar.gz, MD5 as published",)),
        (binary_folder, ("cifar-10-batches-bin", "no MD5 is published")),
        (python_archive, ("cifar-10-python.tar.gz", "MD5 of its files")),
        (python_folder, ("cifar-10-batches-py", "MD5 of its files")),  # of all versions in one folder, this one
    ):
        root = way(tmp_path, "cifar10")
        read_small_set(DataOptions(data="cifar10", data_dir=str(root)), "cifar10", True, said.append)
        assert all(word in said[-1] for word in words), said[-1]
    assert len(said) == 4


def refused(root: Path, name: str, *words: str, **options) -> None:
    with pytest.raises(UserError) as error:
        read(root, name, **options)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value), error.value


def test_missing_files_are_listed_with_their_md5(tmp_path):
    refused(tmp_path / "nowhere", "cifar10", "nowhere", "no such folder")
    refused(Path(__file__), "cifar10", "--data-dir", "it is a file, not a folder")
    (tmp_path / "notes.txt").touch()
    kind = cifar.CIFAR10
    refused(tmp_path, "cifar10", "holds notes.txt", kind.filename, kind.tgz_md5, "data_batch_3", kind.train_list[2][1])
    refused(tmp_path, "cifar10", "--download")
    (python_folder(tmp_path, "cifar10") / kind.base_folder / "data_batch_3").unlink()
    refused(tmp_path, "cifar10", "in cifar-10-batches-py: batches.meta, data_batch_1, data_batch_2, data_batch_4")
    binary_archive(tmp_path, "cifar10")
    assert len(read(tmp_path, "cifar10").images) == 20  # a complete version beside it
    refused(tmp_path, "cifar100", "cifar-100-python.tar.gz")
    refused(
        tmp_path, "mnist", "training images of mnist", "train-labels-idx1-ubyte", "a25bea736e30d166cdddb491f175f624"
    )


def test_a_changed_file_is_not_unpickled(tmp_path, monkeypatch):
    root = python_folder(tmp_path, "cifar10")
    file = root / cifar.CIFAR10.base_folder / "data_batch_2"
    file.write_bytes(pickle.dumps(Path("x")) + file.read_bytes())
    monkeypatch.setattr(pickle, "loads", lambda *args, **more: pytest.fail("unpickled"))
    refused(root, "cifar10", "data_batch_2", "its MD5 is", md5(file.read_bytes()), cifar.CIFAR10.train_list[1][1])


def damaged(data: bytes, how: str) -> bytes:
    middle = len(data) // 2
    return {
        "cut": data[:middle],
        "empty": b"",
        "text": b"<html>404</html>",
        "bit": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
    }[how]


@pytest.mark.parametrize("how", ["cut", "empty", "text", "bit"])
@pytest.mark.parametrize("way", [python_archive, binary_archive])
def test_a_damaged_archive_is_named(tmp_path, way, how):
    root = way(tmp_path, "cifar100")
    file = next(root.glob("*.tar.gz"))
    file.write_bytes(damaged(file.read_bytes(), how))
    with pytest.raises(UserError) as error:  # the damage may be in the images of one part
        read(root, "cifar100", train=True)
        read(root, "cifar100", train=False)
    assert str(file) in str(error.value) and "download it again" in str(error.value)


def test_what_an_archive_holds_elsewhere_is_not_read_or_written(tmp_path):
    """A path that leads out, a link in place of a file, and a folder of another name."""
    kind, files = cifar.CIFAR100, python_files("cifar100")
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for file, data in {**{f"../../{name}": data for name, data in files.items()}, "other/train": b"x"}.items():
            member = tarfile.TarInfo(file)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo(f"{kind.base_folder}/train")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    root = write(tmp_path / "a" / "b", {kind.filename: stream.getvalue()})
    refused(root, "cifar100", kind.filename, "lacks train, meta in cifar-100-python")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [kind.filename]


def test_links_to_files_elsewhere_are_followed(tmp_path):
    root = python_folder(tmp_path / "store", "cifar100")
    (tmp_path / "here").symlink_to(root)
    assert len(read(tmp_path / "here", "cifar100").target) == 12


def test_binary_files_of_a_wrong_size_or_label_are_named(tmp_path):
    root = binary_folder(tmp_path, "cifar10")
    file = root / "cifar-10-batches-bin" / "data_batch_4.bin"
    sound = file.read_bytes()
    file.write_bytes(sound[:-1])
    refused(root, "cifar10", "data_batch_4.bin", f"{len(sound) - 1:,} bytes", f"4 images make {len(sound):,}")
    file.write_bytes(b"\x0a" + sound[1:])
    refused(root, "cifar10", "the label 10", "10 classes")
    (root / "cifar-10-batches-bin" / "batches.meta.txt").write_text("cat\ndog\n")
    refused(root, "cifar10", "batches.meta.txt", "names 2 classes, and cifar10 has 10")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission_is_named(tmp_path):
    root = python_folder(tmp_path, "cifar100")
    (root / "cifar-100-python" / "train").chmod(0)
    refused(root, "cifar100", "train", "Permission denied")


def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    """As root, whom no permission stops."""
    root = python_folder(tmp_path, "cifar100")

    def denied(file, longest):
        raise PermissionError(13, "Permission denied", file)

    monkeypatch.setattr(cifar, "read_bytes", denied)
    refused(root, "cifar100", "cifar-100-python/train", "Permission denied")


# IDX


def idx_bytes(array: np.ndarray) -> bytes:
    return b"\0\0\x08" + bytes([array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def idx_parts(count: int = 6) -> dict[str, np.ndarray]:
    random, parts = np.random.default_rng(3), {}
    for part, images in (("train", count), ("t10k", count - 2)):
        parts[f"{part}-images-idx3-ubyte"] = random.integers(0, 256, (images, 28, 28), dtype=np.uint8)
        parts[f"{part}-labels-idx1-ubyte"] = random.integers(0, 10, images, dtype=np.uint8)
    return parts


def write_idx(folder: Path, parts: dict[str, np.ndarray], monkeypatch, name: str = "mnist", ending: str = "") -> Path:
    """The files of `parts`; their MD5 become the expected ones of the data set `name`."""
    files = {file: idx_bytes(array) for file, array in parts.items()}
    monkeypatch.setitem(idx.CONTENT_MD5, name, {file: md5(data) for file, data in files.items()})
    return write(folder, {file + ending: gzip.compress(data) if ending else data for file, data in files.items()})


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("place", ["", "MNIST/raw", "raw"])
def test_idx_files_give_their_content(tmp_path, monkeypatch, place, ending):
    parts = idx_parts()
    write_idx(tmp_path / place, parts, monkeypatch, ending=ending)
    for train, part in ((True, "train"), (False, "t10k")):
        found = read(tmp_path, "mnist", train)
        assert torch.equal(found.images[..., 0], torch.from_numpy(parts[f"{part}-images-idx3-ubyte"]))
        assert found.target.tolist() == parts[f"{part}-labels-idx1-ubyte"].tolist()
        assert found.images.shape[1:] == (28, 28, 1) and found.classes == tuple("0123456789")
    bordered = read(tmp_path, "mnist", image_size=32).images
    assert bordered.shape[1:] == (32, 32, 1) and not bordered[:, :2].any() and not bordered[:, :, 30:].any()
    assert torch.equal(bordered[:, 2:30, 2:30], read(tmp_path, "mnist").images)


def test_files_with_dots_in_their_names_are_read(tmp_path, monkeypatch):
    write_idx(tmp_path, idx_parts(), monkeypatch)
    for file in [*tmp_path.iterdir()]:
        file.rename(tmp_path / file.name.replace("-idx", ".idx"))
    assert len(read(tmp_path, "mnist").target) == 6


SPOILED = {
    "cut": (lambda data: data[:-5], "holds 4,699 bytes after its header, which says 6 x 28 x 28 = 4,704"),
    "long": (lambda data: data + b"\0", "4,705 bytes"),
    "header": (lambda data: data[:9], "ends within its header"),
    "empty": (lambda data: b"", "is no IDX file"),
    "text": (lambda data: b"<html>", "begins with b'<htm'"),
    "labels": (lambda data: idx_bytes(np.zeros(6, np.uint8)), "is no IDX file of bytes in 3 dimensions"),
    "side": (lambda data: idx_bytes(np.zeros((6, 32, 32), np.uint8)), "(32, 32) pixels"),
    "count": (lambda data: idx_bytes(np.zeros((7, 28, 28), np.uint8)), "holds 7 images and"),
    "huge": (lambda data: data[:4] + b"\xff" * 12, "4294967295 x 4294967295"),
    "zeros": (lambda data: data[:16] + bytes(len(data) - 16), "is not the published file: its MD5 is"),
}


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("how", SPOILED)
def test_spoiled_images_are_named(tmp_path, monkeypatch, how, ending):
    write_idx(tmp_path, idx_parts(), monkeypatch, ending=ending)
    file = tmp_path / ("train-images-idx3-ubyte" + ending)
    spoil, message = SPOILED[how]
    data = spoil(gzip.decompress(file.read_bytes()) if ending else file.read_bytes())
    file.write_bytes(gzip.compress(data) if ending else data)
    refused(tmp_path, "mnist", file.name, message)


@pytest.mark.parametrize("how", ["cut", "bit"])
def test_damaged_gzip_is_named(tmp_path, monkeypatch, how):
    write_idx(tmp_path, idx_parts(), monkeypatch, ending=".gz")
    file = tmp_path / "train-images-idx3-ubyte.gz"
    file.write_bytes(damaged(file.read_bytes(), how))
    refused(tmp_path, "mnist", file.name, "is damaged")


def test_a_label_out_of_range_is_named(tmp_path, monkeypatch):
    parts = idx_parts()
    parts["train-labels-idx1-ubyte"][4] = 10
    refused(write_idx(tmp_path, parts, monkeypatch), "mnist", "the label 10", "train-labels-idx1-ubyte", "0 to 9")


def test_another_set_with_files_of_the_same_names_is_refused(tmp_path, monkeypatch):
    write_idx(tmp_path, idx_parts(), monkeypatch, name="mnist")
    refused(tmp_path, "fashion-mnist", "is of mnist, and --data is fashion-mnist: give --data mnist")
    monkeypatch.undo()  # the known MD5
    refused(tmp_path, "fashion-mnist", "another data set", idx.CONTENT_MD5["fashion-mnist"]["train-images-idx3-ubyte"])


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="no package dataset-fashion-mnist")
def test_fashion_mnist_of_debian_is_the_published_one(monkeypatch):
    train, val = (read(DEBIAN, "fashion-mnist", part) for part in (True, False))
    assert train.images.shape == (60_000, 28, 28, 1) and val.images.shape == (10_000, 28, 28, 1)
    assert train.target.bincount().tolist() == [6000] * 10 and train.classes[0] == "T-shirt/top"
    check_statistics("fashion-mnist", train.images)


def check_statistics(name: str, images: torch.Tensor) -> None:
    std, mean = torch.std_mean(images.double() / 255)
    assert abs(mean - SMALL_SETS[name].mean[0]) < 6e-5 and abs(std - SMALL_SETS[name].std[0]) < 6e-5


def test_the_statistics_of_the_digits_are_those_of_their_pixels():
    check_statistics("digits", digits_set(train=True).images)


def test_the_digits_are_split_as_before():
    train, val = digits_set(train=True), digits_set(train=False)
    assert len(train.target) == 1442 and len(val.target) == 355 and train.images.shape[1:] == (32, 32, 1)


# Options and loaders


@pytest.fixture
def files(tmp_path, monkeypatch) -> Path:
    """A folder with the files of cifar10 and of fashion-mnist."""
    python_folder(tmp_path, "cifar10")
    return write_idx(tmp_path, idx_parts(10), monkeypatch, name="fashion-mnist", ending=".gz")


def loaders(root: Path, name: str = "cifar10", **options):
    said = []
    options = DataOptions(data=name, data_dir=str(root), batch_size=8, **options)
    return *create_loaders(options, CPU, log=said.append), said


def test_a_set_brings_its_own_size_and_statistics(files):
    train, val, said = loaders(files)
    for loader in (train, val):
        assert loader.image_size == 32 and loader.mean == SMALL_SETS["cifar10"].mean and loader.classes[2] == "class 2"
    assert (train.samples, val.samples) == (20, 4) and train.train and not val.train
    assert len(said) == 2 and "CIFAR-10 from" in said[0]
    assert "crops of 32 pixels after padding by 4 (reflect), mirrored or not" in said[1]
    train, _, said = loaders(files, "fashion-mnist", mean=(0.5,) * 3, std=(0.25,) * 3, image_size=32)
    assert train.mean == (0.5,) * 3 and next(iter(train))[0].shape == (8, 3, 32, 32)
    assert "padding by 4 (zeros), mirrored or not" in said[-1]


@pytest.mark.parametrize(
    "given, kind, said",
    [
        ({"augment": "none"}, ("none", 0, "zeros", False), "images are as they are;"),
        ({"augment": "rrc"}, ("rrc", 0, "zeros", True), "random resized crops of 32 pixels"),
        ({"augment": "rrc", "flip": "off"}, ("rrc", 0, "zeros", False), "not mirrored"),
        ({"pad": 2, "pad_mode": "zeros"}, ("pad-crop", 2, "zeros", True), "padding by 2 (zeros)"),
        ({"pad": 0, "flip": "on"}, ("pad-crop", 0, "reflect", True), "padding by 0"),
        ({"flip": "off"}, ("pad-crop", 4, "reflect", False), "not mirrored"),
    ],
)
def test_options_choose_the_augmentation(files, given, kind, said):
    options = DataOptions(data="cifar10", data_dir=str(files), **given)
    chosen = small_sets.augmentation_of(options, 32, "reflect", True)
    assert (chosen.kind, chosen.pad, chosen.pad_mode, chosen.flip) == kind
    assert said in small_sets.describe_augmentation(chosen, 32)


def test_evaluation_reads_the_test_images_alone(files):
    for file in files.glob("train-*"):
        file.unlink()
    said = []
    options = DataOptions(data="fashion-mnist", data_dir=str(files))
    val = create_eval_loader(options, CPU, log=said.append)
    images, target = next(iter(val))
    raw = torch.from_numpy(idx_parts(10)["t10k-images-idx3-ubyte"]).float().div(255).sub(0.2860).div(0.3530)
    assert torch.allclose(images[:, 1], raw, atol=1e-5) and len(target) == 8 and len(said) == 1


@pytest.mark.parametrize(
    "given, message",
    [
        ({"image_size": 224}, "--image-size 224: the images of CIFAR-10 have 32 pixels"),
        ({"pad": 32}, "--pad 32: the images have 32 pixels a side, so give at most 31"),
        ({"pad": 40, "pad_mode": "zeros"}, "--pad 40"),
    ],
)
def test_options_that_do_not_fit_the_set_are_refused(files, given, message):
    with pytest.raises(UserError, match=message):
        loaders(files, **given)


def test_a_failed_download_is_one_line(tmp_path, monkeypatch):
    def fails(self, root, train=True, download=False):
        raise OSError("<urlopen error [Errno -3] Temporary failure\n in name resolution>")

    monkeypatch.setattr(cifar.CIFAR10, "__init__", fails)
    with pytest.raises(UserError) as error:
        loaders(tmp_path, download=True)
    assert "download of CIFAR-10" in str(error.value) and "Temporary failure in name" in str(error.value)
    assert "\n" not in str(error.value)
    python_folder(tmp_path, "cifar10")
    assert loaders(tmp_path, download=True)[0].samples == 20  # what is there is not downloaded


def test_missing_files_of_a_part_are_downloaded(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setitem(idx.SETS, "mnist", lambda root, download: asked.append(root))
    for file in ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        (tmp_path / file).touch()
    assert small_sets.download("mnist", str(tmp_path), ("val",), asked.append) == "" and not asked
    for parts in (("train",), ("train", "val")):
        assert small_sets.download("mnist", str(tmp_path), parts, lambda line: None) == ""
    assert asked == [str(tmp_path)] * 2
    for file in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"):
        (tmp_path / file).touch()
    assert small_sets.download("mnist", str(tmp_path), ("train", "val"), lambda line: None) == "" and len(asked) == 2
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    assert small_sets.download("mnist", str(tmp_path), ("train", "val"), lambda line: None) == "" and len(asked) == 3


def test_process_zero_downloads_for_all(tmp_path, monkeypatch):
    monkeypatch.setattr(small_sets, "download", lambda *args: pytest.fail("by another process"))
    python_folder(tmp_path, "cifar10")
    options = DataOptions(data="cifar10", data_dir=str(tmp_path), download=True, batch_size=4)
    create_loaders(options, CPU, rank=1, world_size=2, log=lambda line: None)
    with pytest.raises(UserError, match=r"process 0 of 2: no network"):
        create_loaders(options, CPU, rank=1, world_size=2, gather=lambda problem: ["no network", problem])
