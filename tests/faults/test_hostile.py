"""Hostile input: each ends in one clear line within 10 s and 2 GB; nothing is executed, nothing outside is touched."""

import json
import os
import subprocess
import sys
import tarfile
import time
from itertools import pairwise
from pathlib import Path

import hostile
import numpy as np
import pytest
import torch
from PIL import Image
from refused import check_refused
from safetensors.torch import save_file

from fastkd.data import DataOptions, create_loaders
from fastkd.data.image_index import read_index
from fastkd.data.scan import scan
from fastkd.errors import UserError

HARMLESS = ("ok_", "long_names")  # files that are odd and sound
SECONDS, MEGABYTES, CHARACTERS = 10, 2000, 1500


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(file): (file.lstat().st_size, file.lstat().st_mtime_ns) for file in folder.rglob("*")}


def children(kind: str, folder: Path) -> dict[str, dict]:
    """What the child process says of each file in the folder."""
    command = [sys.executable, "-W", "ignore", hostile.__file__, kind, str(folder)]
    root = Path(__file__).parents[2]
    env = os.environ | {"PYTHONPATH": f"{root}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    return {each["name"]: each for each in map(json.loads, done.stdout.splitlines())}


def check_all(kind: str, folder: Path) -> dict[str, dict]:
    before = snapshot(folder.parent)
    found = children(kind, folder)
    assert snapshot(folder.parent) == before  # nothing was executed, nothing written
    assert {*found} == {*os.listdir(folder)}
    for name, about in found.items():
        said = about["said"]
        expected = "OK" if name.startswith(HARMLESS) else "UserError: "
        assert said.startswith(expected) and len(said) < CHARACTERS, (name, said[:300])
        assert about["seconds"] < SECONDS and about["peak"] < MEGABYTES, about
        assert about["with_waiting"] < 6 * SECONDS, about  # a busy machine works on others too
    return found


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "hostile").mkdir()
    return tmp_path / "hostile"


@pytest.mark.filterwarnings("ignore")
def test_weights(folder):
    hostile.write_archives(folder)
    hostile.write_dicts(folder)
    hostile.write_places(folder)
    found = check_all("weights", folder)
    assert "claim to unpack to 268,435,666" in found["bomb.pth"]["said"]
    for name in ("bomb.pth", "bomb_in_the_pickle.pth", "memo.pth", "bytearray.pth", "void_number.pth"):
        assert found[name]["grown"] < 50, found[name]  # MB
    assert not (folder / "touched").exists()
    for name, words in {
        "loop.pt": "one in itself",
        "sparse.pt": "sparse_coo float32 [10, 64]",
        "meta.pt": "without values (meta)",
        "quantised.pt": "qint8",
        "complex_counter.pt": "complex64",
        "pipe.pth": "a pipe, a socket or a device",
        "zero.pth": "a pipe, a socket or a device",
        "index_up": "files of its own folder alone",
        "touch.pt": "none of its code was run",
    }.items():
        assert words in found[name]["said"], found[name]


def test_pictures(folder):
    hostile.write_images(folder)
    check_all("pictures", folder)


def test_a_key_of_two_lines_is_one_line(fastkd, folder):
    torch.save({"a\nb\x1b[2J\ud800": torch.zeros(1)}, folder / "x.pth")
    check_refused(fastkd("eval", "--weights", folder / "x.pth", "--model", "resnet8", "--data", "digits"), r"a\nb\x1b")


@pytest.mark.parametrize("name", ["x" * 5000, "x" * 300 + ".pth", "x/" * 2500, "x\udce9.safetensors"])
def test_overlong_names_of_files(fastkd, name, tmp_path):
    for option in ("--weights", "--data"):
        extra = (
            ["--model", "resnet8", "--data", "digits"]
            if option == "--weights"
            else ["--weights", "none.pth", "--model", "resnet8"]
        )
        check_refused(fastkd("eval", option, name, *extra))
    for option in ("--config", "--student-weights", "--teacher-weights", "--data", "--out", "--unlabelled"):
        check_refused(fastkd("train", option, name, *(["--resume"] if option == "--out" else [])))


# Notes in safetensors files

NOTES = {
    "list": "[]",
    "number": "5",
    "no JSON": "{",
    "deep": "[" * 10**6,
    "digits": '{"a": ' + "9" * 10**5 + "}",
    "data is a list": '{"data": []}',
    "classes are a number": '{"data": {"classes": 5}}',
    "classes are numbers": '{"data": {"classes": [1, 2]}}',
    "a class twice": '{"data": {"classes": ["a", "a"]}}',
    "model is a list": '{"model": ["resnet8"]}',
    "input is a text": '{"input": "--out"}',
    "device": '{"input": {"device": "cuda"}}',
    "out": '{"input": {"out": "/tmp/x"}}',
    "data_dir": '{"input": {"data_dir": "/etc", "data": "cifar10"}}',
    "data is a path": '{"input": {"data": "/etc"}}',
    "data is an option": '{"input": {"data": "--download"}}',
    "download": '{"input": {"data": "synthetic"}}',
    "weights": '{"input": {"weights": "/etc/passwd"}}',
    "size": '{"input": {"image_size": 1000000000}}',
    "size is a list": '{"input": {"image_size": [8, 8]}}',
    "size is no number": '{"input": {"image_size": NaN}}',
    "mean": '{"input": {"mean": ["--out", "x", "y"]}}',
    "mean is infinite": '{"input": {"mean": [Infinity, 0, 0]}}',
    "std": '{"input": {"std": [0, 0, 0]}}',
    "fraction": '{"input": {"val_fraction": 7}}',
    "network is a path": '{"model": "hf/../../etc"}',
    "network is a folder": '{"model": "hf//etc"}',
    "network from a hub": '{"model": "timm/hf-hub:some/one"}',
    "network from a place": '{"model": "timm/local-dir:/tmp"}',
    "network of two lines": json.dumps({"model": "resnet8\n--out"}),
    "network of any length": json.dumps({"model": "x" * 10**6}),
}


@pytest.mark.parametrize("note", NOTES.values(), ids=NOTES)
def test_notes_pass_the_checks_of_options(fastkd, few_digits, tmp_path, note):
    save_file(hostile.state(), tmp_path / "x.safetensors", metadata={"fastkd": note})
    before = snapshot(tmp_path)
    status, out, err = fastkd("eval", "--weights", "x.safetensors", "--device", "cpu", "--data", "digits")
    check_refused((status, out, err), "x.safetensors")
    assert "as in training: --" not in out or "--image-size" in out
    assert snapshot(tmp_path) == before and len(err) < CHARACTERS


def test_a_sound_note_is_followed(fastkd, few_digits, tmp_path):
    classes = [str(number) for number in range(10)]
    note = {"model": "resnet8", "data": {"images": 9, "classes": classes}, "input": {"mean": [0.5] * 3, "std": [1] * 3}}
    save_file(hostile.state(), tmp_path / "x.safetensors", metadata={"fastkd": json.dumps(note)})
    status, out, err = fastkd("eval", "--weights", "x.safetensors", "--device", "cpu", "--data", "digits")
    assert status == 0 and "--mean 0.5 0.5 0.5" in out, err


@pytest.mark.parametrize(
    "kwargs",
    [
        ["depth=1000000"],
        ["embed_dim=1000000000"],
        ["mlp_ratio=1e300"],
        ["depth=65536"],
        ["embed_dim=65280", "num_heads=8"],
        ["mlp_ratio=60000.0"],
        ["patch_size=(1, -65537)"],
        ["pretrained=True"],
        ["fc_norm=['x', {'y': 10**9}]", "depth=99999999999999999999"],
    ],
    ids=str,
)
def test_noted_arguments_cannot_ask_for_an_enormous_network(fastkd, few_digits, tmp_path, kwargs):
    """Each ends before memory is taken, and soon."""
    pytest.importorskip("timm")
    classes = [str(number) for number in range(10)]
    note = {"model": "timm/vit_tiny_patch16_224", "data": {"classes": classes}, "kwargs": kwargs}
    note["input"] = {"image_size": 32, "mean": [0.5] * 3, "std": [1.0] * 3}
    save_file(hostile.state(), tmp_path / "x.safetensors", metadata={"fastkd": json.dumps(note)})
    picture = Image.new("RGB", (32, 32))
    picture.save(tmp_path / "picture.png")
    start, peak = time.perf_counter(), hostile.peak()
    check_refused(fastkd("eval", "--weights", "x.safetensors", "--device", "cpu"), "x.safetensors")
    check_refused(fastkd("predict", "picture.png", "--weights", "x.safetensors"), "x.safetensors")
    options = ["--teacher", "timm/vit_tiny_patch16_224", "--teacher-weights", "x.safetensors", "--image-size", "32"]
    check_refused(fastkd("train", "--student", "resnet8", *options, "--device", "cpu", "--out", "run"), "x.safetensors")
    assert time.perf_counter() - start < SECONDS and hostile.peak() - peak < 500
    assert not (tmp_path / "run").exists()


# Configurations

PAIRS = list(pairwise("abcdefghijklmnopqrstuvwxyz"))
LAUGHS = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in PAIRS)
MERGED = "a: &a {k: 1}\n" + "".join(f"{b}: &{b} {{<<: [*{a}, *{a}]}}\n" for a, b in PAIRS)
YAML = {
    "laughs": LAUGHS,
    "merged laughs": MERGED,
    "loop": "peers: &a [*a]",
    "deep": "peers: " + "[" * 30_000,
    "deep mappings": "a: " * 20_000,
    "long": "# " + "x" * 10**6,
    "tag": "!!python/object/apply:os.system ['touch touched']",
    "tag of a value": "out: !!python/name:os.system",
    "set": "peers: !!set {a, b}",
    "binary": "out: !!binary eHh4",
    "merge": "<<: {train_size: 24:32}",
    "hexadecimal": "batch_size: 0x" + "f" * 50_000,
    "sixties": "batch_size: " + ":".join(["1"] * 20_000),
    "option as a peer": "method: dml\npeers: ['--out', 'elsewhere']",
    "option as a teacher": "teacher: ['resnet8', '--download']",
    "option as a text": "data: --download",
    "short option": "peers: ['-b', '5']",
    "zero byte": 'out: "a\\0b"',
    "list as a name": "? [a, b]\n: c",
    "list in a list": "peers: [[resnet8]]",
    "date": "batch_size: 2026-11-29",
}


@pytest.mark.parametrize("text", YAML.values(), ids=YAML)
def test_configurations(fastkd, tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    before = snapshot(tmp_path)
    result = fastkd("train", "--config", "c.yaml", "--method", "dml", "--out", "run")
    check_refused(result, "c.yaml")
    assert snapshot(tmp_path) == before and len(result[2]) < CHARACTERS


@pytest.mark.parametrize("kind", ["pipe", "zero", "folder", "loop"])
def test_a_configuration_that_is_no_file(fastkd, tmp_path, kind):
    path = tmp_path / "c.yaml"
    {
        "pipe": lambda: os.mkfifo(path),
        "zero": lambda: path.symlink_to("/dev/zero"),
        "folder": path.mkdir,
        "loop": lambda: path.symlink_to(path),
    }[kind]()
    check_refused(fastkd("train", "--config", "c.yaml"), "c.yaml")


def test_negative_numbers_and_single_anchors_stay(fastkd, tmp_path):
    (tmp_path / "c.yaml").write_text("pad: -1\nmean: [-0.5, -.5, 0.5]\nstudent: &net resnet8\nteacher: [*net]\n")
    status, out, err = fastkd("train", "--config", "c.yaml", "--print-config")
    assert status == 0 and "- -0.5" in out and "student: resnet8" in out, err


# Folders of images


def picture(file: Path, width: int = 40, height: int = 31) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (9, 99, 199)).save(file, "JPEG")


@pytest.fixture
def images(tmp_path) -> Path:
    root = tmp_path / "images"
    for part in ("train", "val"):
        for label in ("a", "b"):
            for number in range(2):
                picture(root / part / label / f"{number}.jpg")
    return root


def epoch(root: Path, loader: str, **options) -> int:
    options = {"workers": 1, "batch_size": 2, "image_size": 16} | options
    train, _ = create_loaders(
        DataOptions(str(root), loader=loader, **options), torch.device("cpu"), log=lambda line: None
    )
    return sum(len(images) for images, _ in train)


LOADERS = ["folder", pytest.param("dali", marks=pytest.mark.filterwarnings("ignore"))]


@pytest.mark.parametrize("loader", LOADERS)
def test_max_pixels_holds_for_both_loaders(images, loader, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # it is raised below
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    picture(images / "train" / "b" / "wide.jpg", 400, 30)
    assert epoch(images, loader) == 5
    with pytest.raises(UserError, match=r"wide.jpg'.*its 400 x 30 pixels are more than 11,999, see --max-pixels"):
        epoch(images, loader, max_pixels=11_999)
    assert epoch(images, loader, max_pixels=12_000) == 5
    assert epoch(images, loader, max_pixels=10**9) == 5


def test_max_pixels_holds_for_an_index_that_was_kept(images):
    files = sorted(map(str, (images / "train").rglob("*.jpg")))
    assert len(read_index(files, [str(images)]).rows) == 4
    with pytest.raises(UserError, match="4 damaged images: .*its 40 x 31 pixels are more than 1,239"):
        read_index(files, [str(images)], max_pixels=1239)


def test_more_pixels_than_pillow_allows(tmp_path, monkeypatch):
    from fastkd.data.decode import decode, header

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # as if 40 x 31 were a large picture
    picture(tmp_path / "x.jpg")
    with pytest.raises(UserError, match="exceeds limit of 200 pixels, see --max-pixels"):
        decode(str(tmp_path / "x.jpg"), max_pixels=150)
    assert header(str(tmp_path / "x.jpg"), max_pixels=10**9)[:2] == (31, 40)


def test_pipes_sockets_and_devices_among_the_images(images, monkeypatch):
    for place in (images / "train" / "a", images / "train", images):
        os.mkfifo(place / "pipe.jpg")
        (place / "zero.jpg").symlink_to("/dev/zero")
        (place / "to_pipe.png").symlink_to("pipe.jpg")
    os.mkfifo(images / ".fastkd-index.npz")
    split = scan(str(images / "train"))
    assert len(split.files) == 4 and "neither file nor folder" in split.notes[0]
    assert epoch(images, "folder") == 4
    lines: list[str] = []
    read_index(split.files, [str(images)], log=lines.append)
    assert "a pipe, a socket or a device" in lines[0]


@pytest.mark.parametrize("name", ["train-0.tar", "train-0.parquet", "manifest.json"])
def test_a_pipe_in_the_place_of_shards(fastkd, tmp_path, name):
    (tmp_path / "shards").mkdir()
    os.mkfifo(tmp_path / "shards" / name)
    check_refused(fastkd("train", "--data", "shards", "--out", "run"))
    assert not (tmp_path / "run").exists()


def tar_with_a_long_name(path: Path) -> None:
    """A header that claims a name of 20 GB, in a file with a hole."""
    member = tarfile.TarInfo("x")
    member.type, member.size = tarfile.GNUTYPE_LONGNAME, 20 << 30
    path.write_bytes(member.tobuf(tarfile.GNU_FORMAT))
    os.truncate(path, 21 << 30)


def parquet_of_equal_rows(path: Path) -> None:
    """Ten million images of no bytes and 200 of 1 MB of zeros, in a small file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    zeros = pa.array([bytes(1 << 20)] * 200)
    pq.write_table(pa.table({"image": zeros, "label": [0] * 200}), path, compression="zstd", use_dictionary=False)


@pytest.mark.parametrize(
    "name, make", [("train-0.tar", tar_with_a_long_name), ("train-0.parquet", parquet_of_equal_rows)]
)
def test_shards_that_claim_more_than_they_hold(fastkd, tmp_path, name, make):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / "shards").mkdir()
    make(tmp_path / "shards" / name)
    before = hostile.peak()
    check_refused(fastkd("train", "--data", "shards", "--out", "run"), name, "claims")
    assert hostile.peak() - before < 600


def test_an_index_that_unpacks_to_more(images):
    from fastkd.data.index_file import ROW

    np.savez_compressed(images / ".fastkd-index.npz", rows=np.zeros(10**7, ROW))
    files, lines = sorted(map(str, (images / "train").rglob("*.jpg"))), list[str]()
    before = hostile.peak()
    assert len(read_index(files, [str(images)], log=lines.append).rows) == 4
    assert "is compressed" in lines[0] and hostile.peak() - before < 100


MANIFESTS = {
    "deep": "[" * 10**5,
    "a list": "[]",
    "bytes is a text": '"shards": [{"file": "x", "bytes": "9", "blake2b": ""}]',
    "file is a path": '"shards": [{"file": "../x", "bytes": 9, "blake2b": ""}]',
    "shards are a number": '"shards": 5',
    "no shards": '"images": 5',
}


@pytest.mark.parametrize("part", MANIFESTS.values(), ids=MANIFESTS)
def test_manifests_of_packed_images(fastkd, tmp_path, part):
    head = '"format": "fastkd-pack", "version": 1, "kind": "pixels", "size": 1e99, "classes": [1, 2]'
    text = part if part.startswith("[") else f'{{{head}, "parts": {{"train": {{{part}}}}}}}'
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "manifest.json").write_text(text)
    check_refused(fastkd("train", "--data", "packed", "--out", "run"), "packed")


def test_a_file_that_becomes_a_pipe(images):
    """After the scan, before it is decoded."""
    train, _ = create_loaders(
        DataOptions(str(images), loader="folder", workers=0, batch_size=4, image_size=16), torch.device("cpu")
    )
    (images / "train" / "a" / "0.jpg").unlink()
    os.mkfifo(images / "train" / "a" / "0.jpg")
    with pytest.raises(UserError, match="0.jpg' cannot be decoded .it is a pipe"):
        list(train)


def test_links_that_double(images):
    """Twenty folders, each with two links to the next: a million paths, none of which leads back."""
    chain = [images / "chain" / str(number) for number in range(21)]
    for folder in chain:
        folder.mkdir(parents=True)
    for here, there in zip(chain, chain[1:], strict=False):
        (here / "x").symlink_to(there)
        (here / "y").symlink_to(there)
    picture(chain[-1] / "p.jpg")
    (images / "train" / "c").symlink_to(chain[0])
    with pytest.raises(UserError, match="reached more than 1,000 times, through links"):
        scan(str(images / "train"))


def test_links_to_what_holds_the_data(images):
    for name, place in (("root", "/"), ("parent", images), ("grandparent", images.parent), ("self", ".")):
        (images / "train" / "a" / name).symlink_to(place)
    split = scan(str(images / "train"))
    assert len(split.files) == 4 and "4 link to a folder above it" in split.notes[0]


def test_folders_of_any_depth(images):
    deep = images / "train" / "a"
    here = os.getcwd()
    try:
        os.chdir(deep)
        for _ in range(1200):
            os.mkdir("d")
            os.chdir("d")
    finally:
        os.chdir(here)
    with pytest.raises(UserError, match="lies below more than 100 folders"):
        scan(str(images / "train"))
    subprocess.run(["rm", "-rf", str(deep)], check=True)  # shutil.rmtree is as deep as we were


MORE = [pytest.param(name, marks=pytest.mark.every) for name in ("\x1b[31m", "--out", " ", "é" * 127)]


@pytest.mark.parametrize("name", ["n" * 255, "a\nb\x1b[31m", "\udcff" * 3, *MORE])
def test_any_class_name_trains(fastkd, images, monkeypatch, name):
    monkeypatch.setattr("fastkd.commands.train.speed", lambda *_: 1.0)
    for part in ("train", "val"):
        (images / part / "a").rename(images / part / name)
    arguments = ["--method", "ce", "--student", "resnet8", "--epochs", "1", "-b", "2", "--image-size", "16"]
    data = ["--data", images, "--loader", "folder", "--workers", "0", "--device", "cpu", "--out", "run"]
    status, out, err = fastkd("train", *arguments, *data)
    assert status == 0, err[-2000:]
    monkeypatch.setattr("fastkd.commands.eval.speed", lambda *_: 1.0)
    status, out, err = fastkd("eval", "--weights", "run/student.safetensors", "--device", "cpu", "--loader", "folder")
    assert status == 0 and "\x1b[31m" not in out + err, err[-2000:]


def test_packing_has_the_limit_too(fastkd, images):
    picture(images / "train" / "b" / "wide.jpg", 400, 30)
    given = ["pack", images, "packed", "--size", "16", "--workers", "0", "--max-pixels"]
    check_refused(fastkd(*given, "11999"), "wide.jpg", "more than 11,999")
    assert fastkd(*given, "12000")[0] == 0


def test_a_data_folder_of_255_letters_names_no_run(fastkd, images, monkeypatch):
    monkeypatch.setattr("fastkd.commands.train.speed", lambda *_: 1.0)
    root = images.rename(images.parent / ("d" * 255))
    arguments = ["--method", "ce", "--student", "resnet8", "--epochs", "1", "-b", "2", "--image-size", "16"]
    status, out, err = fastkd(
        "train", *arguments, "--data", root, "--loader", "folder", "--workers", "0", "--device", "cpu"
    )
    assert status == 0, err[-2000:]


def test_a_hundred_thousand_classes(fastkd, tmp_path, monkeypatch):
    monkeypatch.setattr("fastkd.commands.train.speed", lambda *_: 1.0)
    sizes = ["--synthetic-classes", "100000", "--synthetic-samples", "4", "-b", "2", "--image-size", "32"]
    arguments = ["--method", "ce", "--student", "resnet8", "--epochs", "1", "--device", "cpu", "--out", "run"]
    status, out, err = fastkd("train", "--data", "synthetic", *sizes, *arguments)
    assert status == 0, err[-2000:]
    monkeypatch.setattr("fastkd.commands.eval.speed", lambda *_: 1.0)
    status, out, err = fastkd(
        "eval", "--weights", "run/student.safetensors", "--data", "digits", "--mean", "0", "0", "0"
    )
    assert status == 0 and "10 of the 100000" in out, err[-2000:]


WRONG = ([], {}, "x", -1, 10**30, None)


def places(value: object, above: tuple = ()) -> list[tuple]:
    """The way to every entry of nested dicts."""
    inner = value.items() if isinstance(value, dict) else ()
    return [path for key, each in inner for path in ((*above, key), *places(each, (*above, key)))]


def test_manifests_of_a_teacher_cache(fastkd, tmp_path):
    settings = {
        "teacher": [{"name": "resnet8", "tag": "", "sha256": "0" * 64}],
        **{"samples": 9, "views": 2, "classes": ["a", "b"], "precision": "fp16", "topk": 0, "temperature": 0.0},
        **{"mixup": 0.0, "cutmix": 0.4, "seed": 0, "loader": "resident"},
        **{"images": {"image_size": 8}, "augmentation": {"kind": "rrc"}},
    }
    good = {"format": 1, "settings": settings, "how": {"teacher_form": "plain"}, "complete": {"0": {"x": "y"}}}
    (tmp_path / "cache").mkdir()
    manifest = tmp_path / "cache" / "manifest.json"
    manifest.write_text(json.dumps(good))
    assert fastkd("cache-teacher", "--info", "cache")[0] == 0
    for *above, last in places(good):
        for value in WRONG:
            changed = json.loads(json.dumps(good))
            place = changed
            for key in above:
                place = place[key]
            place[last] = value
            manifest.write_text(json.dumps(changed))
            status, out, err = fastkd("cache-teacher", "--info", "cache")
            assert status == 0 or (err.startswith("fastkd: ") and err.count("\n") == 1), (above, last, value, err)
    for text in ("[" * 10**5, "[]", "5", "{"):
        manifest.write_text(text)
        check_refused(fastkd("cache-teacher", "--info", "cache"), "manifest.json")
