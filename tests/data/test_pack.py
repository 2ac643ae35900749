"""`fastkd pack`: what it writes, that it goes on after any interruption, and what it refuses."""

import contextlib
import errno
import json
import os
import random
import resource
import shutil
import signal
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import fork
from PIL import Image
from shard_files import add, write_tars
from torchvision.transforms.v2 import functional as F

from fastkd.commands import pack as command
from fastkd.commands.pack import run
from fastkd.data import DataOptions, create_eval_loader, create_loaders
from fastkd.data import pack as module
from fastkd.data.decode import decode
from fastkd.data.layout import training_splits
from fastkd.data.pack import Packing, pack
from fastkd.data.pack_format import check_content, packed_parts, read_index, read_manifest
from fastkd.data.pack_source import read_source
from fastkd.data.scan import scan
from fastkd.data.stored import Pictures
from fastkd.errors import UserError
from fastkd.signals import Stopped

SMALL = Packing("pixels", 24)


def quiet(line):
    pass


def go(source, folder, packing=SMALL, workers=0, tick=lambda new, old: None, **options):
    pack(str(folder), packing, *read_source(DataOptions(data=str(source), **options), quiet), workers, tick)
    return Path(folder)


def content(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()
    }


@pytest.fixture
def few(monkeypatch):
    """Shards of few images, so that there are many."""
    monkeypatch.setattr(module, "PIXEL_BYTES", 4 * 24 * 24 * 3)
    monkeypatch.setattr(module, "TAR_IMAGES", 4)


def test_pixels_are_the_whole_picture_as_a_square(pictures, tmp_path):
    folder = go(pictures, tmp_path / "p")
    split = scan(str(pictures / "train"))
    part = packed_parts(str(folder))["train"]
    pixels = np.load(part.shards[0])
    assert pixels.shape == (27, 24, 24, 3) and part.labels.tolist() == split.labels
    for image, size, file in zip(pixels, part.sizes.tolist(), split.files, strict=True):
        picture = decode(file)
        assert size == list(picture.shape[1:])
        assert torch.equal(torch.from_numpy(image).permute(2, 0, 1), F.resize(picture, [24, 24], antialias=True))
    names = read_index(str(folder / "train.npz"))[2]
    assert [str(pictures / name) for name in names] == split.files
    assert sorted(os.listdir(folder)) == ["manifest.json", "train-00000.npy", "train.npz", "val-00000.npy", "val.npz"]


def test_jpegs_are_made_smaller_and_never_larger(pictures, tmp_path):
    folder = go(pictures, tmp_path / "p", Packing("jpeg", 70, 90))
    sizes = read_index(str(folder / "val.npz"))[1]
    split = training_splits(DataOptions(data=str(folder)), quiet)["val"]
    reader = Pictures(split.files, split.places)
    for i, (height, width) in enumerate(sizes.tolist()):
        assert min(reader.decode(i).shape[1:]) == min(70, height, width)


def test_exif_turns_before_packing(tmp_path):
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, :20] = 255  # left half white
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    for part in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / "src" / part / name).mkdir(parents=True)
            Image.fromarray(pixels).save(tmp_path / "src" / part / name / "x.png", exif=exif)
    for turned in (False, True):
        folder = go(tmp_path / "src", tmp_path / f"p{turned}", Packing("pixels", 24, exif=turned), exif=turned)
        image, part = np.load(folder / "train-00000.npy")[0], packed_parts(str(folder))["train"]
        bright = image[:8].mean(), image[:, :8].mean()  # of the top, of the left
        assert part.sizes[0].tolist() == ([40, 20] if turned else [20, 40])
        assert (bright[0] > 200 and bright[1] < 150) if turned else (bright[1] > 200 and bright[0] < 150)


@pytest.mark.parametrize("packing", [SMALL, Packing("jpeg", 24, 80), Packing("files", 0)])
def test_processes_write_the_same_bytes(pictures, tmp_path, few, packing):
    alone = go(pictures, tmp_path / "a", packing)
    assert content(alone) == content(go(pictures, tmp_path / "b", packing, workers=2))
    assert len(list(alone.glob("train-*"))) == 7
    check_content(alone, read_manifest(alone))


def test_killed_at_any_moment_it_goes_on_and_ends_with_the_same_bytes(pictures, tmp_path, few):
    """20 times SIGKILL, each after another time; the last run ends by itself."""
    times, draw = [], random.Random(0)
    for _ in range(2):
        start = time.monotonic()
        wanted = content(go(pictures, tmp_path / f"whole{len(times)}"))
        times.append(time.monotonic() - start)
    source = read_source(DataOptions(data=str(pictures)), quiet)
    folder, killed = tmp_path / "killed", 0
    for _ in range(20):
        child = fork()
        if child == 0:
            pack(str(folder), SMALL, *source, 0, lambda new, old: None)
            os._exit(0)
        time.sleep(draw.uniform(0, min(times) / 8))
        os.kill(child, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    ticks = []
    go(pictures, folder, tick=lambda new, old: ticks.append((new, old)))
    assert content(folder) == wanted and killed >= 5
    assert sum(new + old for new, old in ticks) in (0, 63)  # 0: it was complete


def test_killed_while_processes_write_it_goes_on_and_ends_with_the_same_bytes(pictures, tmp_path, few):
    """The processes outlive the one that was killed, by up to 5 s, and hold the lock: the next run waits for them."""
    wanted, folder = content(go(pictures, tmp_path / "whole")), tmp_path / "killed"
    source = read_source(DataOptions(data=str(pictures)), quiet)
    child = fork()
    if child == 0:
        pack(str(folder), SMALL, *source, 2, lambda new, old: os.kill(os.getpid(), signal.SIGKILL) if new else None)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL and (folder / ".pack").is_dir()
    ticks = []
    go(pictures, folder, workers=2, tick=lambda new, old: ticks.append((new, old)))
    assert content(folder) == wanted and ticks[0][1] >= 4 and sum(map(sum, ticks)) == 63


@pytest.mark.parametrize("stop", ["train-00003.npy", "train-00003.npy.json", "train.npz", "manifest.json"])
def test_stopped_at_each_kind_of_file(pictures, tmp_path, few, monkeypatch, stop):
    wanted = content(go(pictures, tmp_path / "whole"))
    replace = os.replace

    def stopped(source, target):
        if Path(target).name == stop:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stopped)
        with pytest.raises(KeyboardInterrupt):
            go(pictures, tmp_path / "p")
    with pytest.raises(UserError, match="not complete"):
        packed_parts(str(tmp_path / "p"))
    assert content(go(pictures, tmp_path / "p")) == wanted


def test_a_full_disk_leaves_complete_shards_and_is_named(pictures, tmp_path, few):
    """A limit on the length of files stands for the disk: the write fails in its middle."""
    wanted = content(go(pictures, tmp_path / "whole"))
    folder = tmp_path / "p"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, before[1]))  # a shard has 7,040 bytes, one of 3 images 5,312
        with pytest.raises(
            UserError, match="train-00000.npy' cannot be written .*: make room, and run the same command"
        ):
            go(pictures, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, previous)
    assert not list((folder / ".pack").glob("*.npy"))
    assert content(go(pictures, folder)) == wanted


def test_a_disk_that_is_full_at_the_end_is_named(pictures, tmp_path, few, monkeypatch):
    wanted, write = content(go(pictures, tmp_path / "whole")), module.write_atomic

    def full(path, data):
        if path.name in ("val.npz", "manifest.json"):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_atomic", full)
        with pytest.raises(UserError, match="p' cannot be written \\(No space .* run the same command again"):
            go(pictures, tmp_path / "p")
    ticks = []
    assert content(go(pictures, tmp_path / "p", tick=lambda new, old: ticks.append((new, old)))) == wanted
    assert ticks == [(0, 63)]


def test_the_disk_needs_room_for_the_indices(pictures, tmp_path, monkeypatch):
    _, parts = read_source(DataOptions(data=str(pictures)), quiet)
    folder, usage = go(pictures, tmp_path / "p"), shutil.disk_usage(tmp_path)
    free = sum((folder / f"{name}.npz").stat().st_size for name in parts) - 1
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage._replace(free=free))
    monkeypatch.setattr(module, "SPARE", 0)
    with pytest.raises(UserError, match="the packed images need"):
        module.check_disk(folder, SMALL, parts, [])


def test_the_disk_is_looked_at_first(pictures, tmp_path, monkeypatch):
    usage = module.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage._replace(free=17 << 20))
    go(pictures, tmp_path / "p")
    need = (27 + 36) * 256 * 256 * 3 + 2 * 128
    with pytest.raises(UserError, match=f"need {need / 1e6:.1f} MB and 17.8 MB are free, of which 16.8 MB"):
        go(pictures, tmp_path / "large", Packing("pixels", 256))
    assert os.listdir(tmp_path / "large") == [".pack"]


def test_the_estimate_of_jpegs_is_near(pictures, tmp_path):
    packing = Packing("jpeg", 100, 85)
    folder = go(pictures, tmp_path / "p", packing)
    _, parts = read_source(DataOptions(data=str(pictures)), quiet)
    for name, part in parts.items():
        real = sum(file.stat().st_size for file in folder.glob(f"{name}-*.tar"))
        assert 0.8 * real < module._bytes(packing, part, range(len(part.labels))) < 1.6 * real


def test_what_is_there_is_not_written_over(pictures, small, tmp_path):
    folder = go(pictures, tmp_path / "p")
    before = content(folder)
    go(pictures, folder)
    assert content(folder) == before
    for packing, source in ((Packing("pixels", 32), pictures), (SMALL, small)):
        with pytest.raises(UserError, match="holds another pack \\("):
            go(source, folder, packing)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="is not empty and holds no packed images"):
        go(pictures, tmp_path / "other")
    with pytest.raises(UserError, match="is a file"):
        go(pictures, tmp_path / "other" / "thesis.tex")


def test_packed_files_are_packed_again(pictures, tmp_path):
    shards = go(pictures, tmp_path / "f", Packing("files", 0))
    assert content(go(shards, tmp_path / "same", Packing("files", 0))).keys() == content(shards).keys()


@pytest.mark.parametrize("lost", ["train-00002.npy", "train.npz", "val.npz"])
@pytest.mark.parametrize("workers", [0, 2])
def test_files_that_are_gone_are_written_again(pictures, tmp_path, few, lost, workers):
    folder = go(pictures, tmp_path / "p")
    before, written = content(folder), []
    (folder / lost).unlink()
    with pytest.raises(UserError, match=f"{lost} is missing; remove these files and run the same `fastkd pack` again"):
        check_content(folder, read_manifest(folder))
    go(pictures, folder, workers=workers, tick=lambda new, old: written.append(new))
    assert content(folder) == before and sum(written) == {"train-00002.npy": 4, "train.npz": 27, "val.npz": 36}[lost]
    (folder / "val-00001.npy").write_bytes(b"cut off")
    go(pictures, folder)
    assert content(folder) == before


@pytest.mark.parametrize("packing", [SMALL, Packing("files", 0)])
def test_a_pack_that_is_not_complete_is_no_data(pictures, tmp_path, few, monkeypatch, packing):
    """Complete shards of JPEGs would else be trained on as if they were all."""
    with monkeypatch.context() as patch:
        patch.setattr(module, "_finish", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            go(pictures, tmp_path / "p", packing)
    for use in (
        lambda: run([str(tmp_path / "p"), "--check"]),
        lambda: create_loaders(DataOptions(data=str(tmp_path / "p")), torch.device("cpu"), log=quiet),
        lambda: create_eval_loader(DataOptions(data=str(tmp_path / "p")), torch.device("cpu"), log=quiet),
    ):
        with pytest.raises(UserError, match="holds a pack that is not complete: run the same `fastkd pack` again"):
            use()


def test_stopped_it_says_how_to_go_on(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_finish", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(Stopped, match="stopped by SIGINT; go on with `fastkd pack .*pictures.* --size 16`"):
        run([str(pictures), str(tmp_path / "p"), "--size", "16"])


def test_without_a_terminal_a_line_says_how_far_it_is(pictures, tmp_path, few, monkeypatch, capsys):
    monkeypatch.setattr(command, "EVERY", 0.0)
    run([str(pictures), str(tmp_path / "p"), "--workers", "0", "--keep-files"])
    lines = [line for line in capsys.readouterr().out.splitlines() if " of 63 images" in line]
    assert lines[1:3] == ["pack: 4 of 63 images", "pack: 8 of 63 images"] and lines[-1] == "pack: 63 of 63 images"


def test_a_pack_is_no_class_of_its_source(pictures, tmp_path):
    files = go(pictures, tmp_path / "tars", Packing("files", 0))
    pictures = Path(shutil.copytree(pictures, tmp_path / "pictures"))
    for source, place, options in (
        (pictures, pictures / "train" / "packed", []),
        (pictures / "train", pictures / "train" / "packed", ["--val-fraction", "0.3"]),
        (pictures / "train", pictures / "train" / "ant" / "packed", ["--val-fraction", "0.3"]),
        (files, files / "packed", []),
    ):
        with pytest.raises(UserError, match="lies among the classes or shards of .*: name a folder elsewhere"):
            run([str(source), str(place), "--workers", "0", "--size", "16", *options])
        assert not place.exists()
    run([str(pictures), str(pictures / "packed"), "--workers", "0", "--size", "16"])


def test_pixels_are_no_source(pictures, tmp_path):
    with pytest.raises(UserError, match="holds packed pixels already"):
        run([str(go(pictures, tmp_path / "p")), str(tmp_path / "q")])


def test_a_source_that_changed_is_refused_when_going_on(small, tmp_path, few, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(module, "_finish", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            go(small, tmp_path / "p")
    file = sorted((small / "train" / "ant").glob("*.jpg"))[0]
    file.rename(file.with_name("renamed.jpg"))
    with pytest.raises(UserError, match="holds another pack \\(parts"):
        go(small, tmp_path / "p")


def test_two_at_a_time_are_refused(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "WAIT", 0)
    refused = []

    def tick(new, old):
        with pytest.raises(UserError, match="another process packs into"):
            go(pictures, tmp_path / "p")
        refused.append(1)

    go(pictures, tmp_path / "p", tick=tick)
    assert refused


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_named(truncated, tmp_path, few, workers):
    root = truncated.parents[2]
    with pytest.raises(UserError, match=f"{truncated.name}' cannot be decoded"):
        go(root, tmp_path / "p", workers=workers)


def noted_names(folder, part="train"):
    """The names of the images in the index of a pack."""
    return json.loads(np.load(Path(folder) / f"{part}.npz")["names"].tobytes())


@pytest.mark.parametrize("options", [["--size", "24"], ["--jpeg-quality", "80"], ["--keep-files"]])
def test_skip_bad_packs_the_others(truncated, tmp_path, options, capsys):
    words = [str(truncated.parents[2]), str(tmp_path / "p"), "--workers", "0", *options, "--skip-bad"]
    run(words)
    out = capsys.readouterr().out
    assert "--skip-bad leaves out 1 of the 6 images" in out and truncated.name in out
    assert "5 images for train, 2 images for val" in out
    assert all(truncated.name not in name for name in noted_names(tmp_path / "p"))
    before = content(tmp_path / "p")
    run(words)
    assert content(tmp_path / "p") == before
    if options[0] == "--size":  # files that are copied are not decoded, and a damaged one would pass
        with pytest.raises(UserError, match="holds another pack \\(parts"):
            run(words[:-1])


def test_a_list_chooses_what_is_packed(small, tmp_path):
    listed = sorted(file.relative_to(small) for file in small.glob("*/*/*"))
    left_out = next(file for file in listed if file.parts[0] == "train")
    listed.remove(left_out)
    (tmp_path / "good.txt").write_text("".join(f"{file}\n" for file in listed))
    words = [str(small), str(tmp_path / "p"), "--size", "24", "--workers", "0"]
    run([*words, "--file-list", str(tmp_path / "good.txt")])
    assert str(left_out) not in noted_names(tmp_path / "p") and len(noted_names(tmp_path / "p")) == 5
    with pytest.raises(UserError, match="holds another pack \\(parts"):
        run(words)


def test_of_shards_too_the_images_are_chosen(small, tmp_path):
    for part in ("train", "val"):
        write_tars(tmp_path / "tars", part, scan(str(small / part)), 1)
    with tarfile.open(tmp_path / "tars" / "train-000.tar", "a") as tar:
        add(tar, "ant/bad.jpg", b"\xff\xd8\xff and no more")
        add(tar, "ant/bad.cls", b"0")
    words = [str(tmp_path / "tars"), str(tmp_path / "p"), "--size", "24", "--workers", "0"]
    with pytest.raises(UserError, match="bad.jpg' cannot be decoded"):
        run(words)
    shutil.rmtree(tmp_path / "p")
    run([*words, "--skip-bad"])
    names = noted_names(tmp_path / "p")
    assert len(names) == 6 and not any("bad" in name for name in names)
    (tmp_path / "list.txt").write_text(
        "".join(f"{name}\n" for name in [*names[:5], *noted_names(tmp_path / "p", "val")])
    )
    words[1] = str(tmp_path / "by_list")
    run([*words, "--file-list", str(tmp_path / "list.txt")])
    assert noted_names(tmp_path / "by_list") == names[:5]


def test_skip_bad_leaves_out_pictures_above_max_pixels(small, tmp_path, capsys):
    Image.new("RGB", (600, 600)).save(small / "train" / "ant" / "large.png")
    words = [str(small), str(tmp_path / "p"), "--size", "24", "--workers", "0", "--max-pixels", "300000"]
    with pytest.raises(UserError, match="see --max-pixels.*--skip-bad"):
        run(words)
    shutil.rmtree(tmp_path / "p")
    run([*words, "--skip-bad"])
    assert "large.png: too large" in capsys.readouterr().out and len(noted_names(tmp_path / "p")) == 6


def test_damage_is_found_by_the_check(pictures, tmp_path, capsys):
    folder = go(pictures, tmp_path / "p")
    run([str(folder), "--check"])
    assert "63 images, all checksums fit" in capsys.readouterr().out
    data = bytearray((folder / "val-00000.npy").read_bytes())
    data[1000] ^= 1
    (folder / "val-00000.npy").write_bytes(data)
    with pytest.raises(UserError, match="val-00000.npy has another content"):
        run([str(folder), "--check"])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: m.update(version=2), "has the version 2"),
        (
            lambda m: m["parts"]["train"]["shards"][0].update(file="../x"),
            "manifest.json' is damaged",
        ),
        (lambda m: m["parts"]["train"]["shards"][0].update(images=26), "do not fit"),
        (lambda m: m.update(size=25), "do not fit"),
        (lambda m: m.update(classes=["one"]), "do not fit"),
        (lambda m: m["parts"].update(train=3), "is damaged"),
        (lambda m: m["parts"]["train"].pop("images"), "is damaged"),
        (lambda m: m["parts"]["train"]["index"].update(bytes="9"), "is damaged"),
        (lambda m: m["parts"]["train"]["shards"][0].update(images=None), "is damaged"),
        (lambda m: m.pop("known"), "is damaged"),
        (lambda m: m.update(size=None), "is damaged"),
        (lambda m: m.update(classes=3), "is damaged"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(pictures, tmp_path, change, message):
    folder = go(pictures, tmp_path / "p")
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=message):
        packed_parts(str(folder))
    if "damaged" in message:
        for command in (lambda: go(pictures, folder), lambda: run([str(folder), "--check"])):
            with pytest.raises(UserError, match=message):
                command()


def test_a_damaged_index_is_named(pictures, tmp_path):
    folder = go(pictures, tmp_path / "p")
    index = folder / "train.npz"
    data = index.read_bytes()
    for at in range(0, len(data), 11):
        index.write_bytes(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])
        with contextlib.suppress(UserError):
            packed_parts(str(folder))
    index.write_bytes(bytes(len(data)))
    with pytest.raises(UserError, match="train.npz' cannot be read"):
        packed_parts(str(folder))


def test_the_command(pictures, tmp_path, capsys):
    run([str(pictures), str(tmp_path / "p"), "--size", "16", "--workers", "0"])
    out = capsys.readouterr().out
    assert "27 images for train, 36 images for val, 3 classes, as squares of 16 pixels" in out
    assert f"train with --data {tmp_path / 'p'}" in out
    assert packed_parts(str(tmp_path / "p"))["val"].side == 16


@pytest.mark.parametrize(
    "words, message",
    [
        (["x"], "pack needs SRC and DST"),
        (["x", "y", "--size", "4"], "--size 4: give 8 to 4096"),
        (["x", "y", "--jpeg-quality", "101"], "--jpeg-quality 101"),
        (["x", "y", "--keep-files", "--size", "64"], "--keep-files copies files as they are"),
        (["digits", "y", "--jpeg-quality", "90"], "is no set of files"),
        (["synthetic", "y"], "holds no images"),
        (["digits", "y", "--skip-bad"], "--skip-bad is for a folder of images"),
        (["x", "y", "--sise", "64"], "unknown option '--sise'"),
        (["/nonexistent", "y"], "no such folder"),
        ([__file__, "y"], "it is a file, not a folder"),
        ([__file__, "--check"], "holds no complete pack: it is a file, not a folder"),
        (["--check"], "needs one folder"),
    ],
)
def test_wrong_commands(words, message):
    with pytest.raises(UserError, match=message):
        run(words)
