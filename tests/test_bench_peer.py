"""peer.py: every way trains on the same images, a file of other settings is refused, the table has the ratios."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from fastkd import bench
from fastkd.bench.fashion import FOLDER
from fastkd.bench.scripts import peer, peer_runs
from fastkd.errors import UserError

needs_files = pytest.mark.skipif(not FOLDER.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
TINY = replace(
    peer_runs.PAIRS["small"], teacher="resnet8", student="resnet8", images=(20, 10), epochs=1, teacher_epochs=1,
    batch_size=10, side=32, workers=1, views=1,
)  # fmt: skip


@needs_files
def test_every_way_trains(tmp_path, monkeypatch):
    pytest.importorskip("timm.task")
    monkeypatch.chdir(tmp_path)
    folder = peer_runs.make_folder(TINY, tmp_path / "images")
    files = sorted((folder / "train").rglob("*.jpg"))
    assert len(files) == 20 and len(list((folder / "val").rglob("*.jpg"))) == 10
    with Image.open(files[0]) as picture:
        assert picture.size == (32, 32) and picture.mode == "RGB"
    weights = peer_runs.train_teacher(TINY, folder, tmp_path / "teacher")
    written = weights.stat().st_mtime_ns
    assert peer_runs.train_teacher(TINY, folder, tmp_path / "teacher").stat().st_mtime_ns == written
    for way in ("timm", "online", *["cached"] * peer_runs.HAS_CACHE):
        found = peer_runs.run_way(way, "tiny", TINY, folder, weights, 0)
        assert "error" not in found, found
        assert found["seconds"] > 0 and 0 <= found["top1"] <= 100
        assert ("fill_seconds" in found) == (way == "cached")


def test_timms_images_are_normalised_as_ours(tmp_path):
    """The same picture through both evaluation loaders."""
    pytest.importorskip("timm")
    from fastkd.data import DataOptions, create_loaders

    for part in ("train", "val"):
        for number in range(4):
            place = tmp_path / part / "ab"[number % 2]
            place.mkdir(parents=True, exist_ok=True)
            noise = torch.randint(256, (6, 6, 3), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
            picture = Image.fromarray(noise.numpy()).resize((112, 112), Image.Resampling.BICUBIC)
            picture.save(place / f"{number}.jpg", quality=95)
    theirs = next(iter(peer_runs.timm_loader(TINY, tmp_path, "val")))
    options = DataOptions(data=str(tmp_path), loader="folder", workers=0, batch_size=10, image_size=32)
    ours = next(iter(create_loaders(options, torch.device("cpu"), log=lambda line: None)[1]))
    assert torch.equal(theirs[1], ours[1]) and theirs[0].shape == ours[0].shape
    assert (theirs[0] - ours[0]).abs().mean() < 0.3  # timm resizes to 36 pixels before it crops, we to 37
    assert (theirs[0] - ours[0]).mean((0, 2, 3)).abs().max() < 0.05


def runs(seconds, top1, **more):
    return {str(seed): {"seconds": s, "top1": t, **more} for seed, (s, t) in enumerate(zip(seconds, top1, strict=True))}


def test_the_table(capsys):
    found = {
        "timm": runs([100.0, 90.0, 110.0], [80.0, 82.0, 81.0]),
        "online": {},  # all of its runs have failed
        "cached": runs([40.0, 40.0, 50.0], [80.5, 81.5, 82.0], fill_seconds=10.0),
    }
    record = {"settings": json.loads(json.dumps(peer_runs.settings())), "runs": {"small": found}}
    lines = peer.table(record).splitlines()
    assert "2,000 images x 5 epochs" in lines[0]
    cells = {row[1]: row for row in ([cell.strip() for cell in line.split("|")] for line in lines[4:])}
    assert cells["timm"][2:10] == ["100", "1.00x", "-", "100", "81.00", "80.00", "82.00", "3"]
    assert cells["cached"][2:6] == ["250", "2.50x", "10.0", "200"]


def test_a_file_of_other_settings_is_refused(tmp_path):
    file = tmp_path / "r.json"
    bench.write_json(file, peer.open_record(file))
    assert peer.open_record(file)["runs"] == {}
    record = json.loads(file.read_text())
    record["settings"]["lr"] = 1.0
    bench.write_json(file, record)
    with pytest.raises(UserError, match=r"other settings \(lr\)"):
        peer.open_record(file)


def test_what_is_there_is_not_run_again(tmp_path, monkeypatch, capsys):
    asked = []

    def alone(function, *arguments):
        if function is peer.train_teacher:
            return tmp_path / "w"
        asked.append((arguments[1], arguments[0], arguments[-1]))
        return {"error": "out of memory"} if len(asked) == 2 else {"seconds": 1.0, "top1": 50.0}

    monkeypatch.setattr(peer, "_alone", alone)
    monkeypatch.setattr(peer, "make_folder", lambda pair, folder: folder)
    words = ["--pairs", "small", "--ways", "timm", "online", "--seeds", "2", "--file", str(tmp_path / "r.json")]
    peer.main(words)
    assert asked == [("small", "timm", 0), ("small", "online", 0), ("small", "online", 1), ("small", "timm", 1)]
    peer.main(words)
    assert asked[4:] == [("small", "online", 0)]  # the one that failed
    assert "out of memory" in capsys.readouterr().out and (tmp_path / "r.md").is_file()


def test_a_run_that_fails_says_why(tmp_path):
    found = peer_runs.run_way("online", "tiny", TINY, tmp_path, tmp_path / "none", 0)
    assert "error" in found and "seconds" not in found
