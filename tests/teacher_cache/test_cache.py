"""The files of a teacher cache: written in any order, killed, damaged, of another run, on a full disk."""

import errno
import json
import os
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from forked import fork

from fastkd.errors import UserError
from fastkd.teacher_cache import Rows, TeacherCache, cache, files, verify

SETTINGS = {"samples": 100, "classes": ["a", "b", "c"], "views": 2, "seed": 0, "precision": "fp32", "topk": 0}
HOW = {"amp_dtype": "float32"}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    for module in (files, cache):
        monkeypatch.setattr(module, "SHARD", 32)


def opened(folder, settings=SETTINGS, how=HOW, views=2) -> TeacherCache:
    return TeacherCache.open(folder, settings | {"temperature": None}, how, views)


def logits(view: int, samples: torch.Tensor) -> torch.Tensor:
    """Numbers that tell the view and the image."""
    return torch.stack([samples + 1000.0 * view, -samples.float(), samples / 7], 1)


def fill(this: TeacherCache, view: int, parts: list[torch.Tensor]) -> None:
    this.begin(view)
    for part in parts:
        this.write(part, this.rows.pack(this.rows.encode(logits(view, part))))
    this.finish(view)


def batches(seed: int = 0) -> list[torch.Tensor]:
    return list(torch.randperm(100, generator=torch.Generator().manual_seed(seed)).split(7))


@pytest.fixture
def full(tmp_path):
    for view in range(2):
        fill(opened(tmp_path / "full"), view, batches(view))
    return tmp_path / "full"


def content(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_rows_are_read_by_view_and_image_in_any_order(full):
    this = opened(full)
    assert this.covers(2) and this.share(1) == 1
    for view in (0, 1, 0):
        for part in batches(5):
            (values,) = this.read(view, part)
            assert torch.equal(values, logits(view, part))
    assert len(list(full.glob("view-0001-0*.npy"))) == 4  # shards of 32, 32, 32 and 4 images
    whole = np.concatenate([np.load(full / f"view-0001-{i:05}.npy", mmap_mode="r")["values"] for i in range(4)])
    assert np.array_equal(whole, logits(1, torch.arange(100)).numpy())  # numpy alone reads it


def test_the_order_of_writing_leaves_no_trace(full, tmp_path):
    for view in (1, 0):
        fill(opened(tmp_path / "again"), view, batches(9))
    assert content(full) == content(tmp_path / "again")


def test_a_view_is_complete_only_with_every_row(tmp_path):
    this = opened(tmp_path / "c")
    fill(this, 0, batches()[:-1])
    assert not this.is_complete(0) and not opened(tmp_path / "c").covers(1) and this.share(0) == 0.98
    assert this.filled(batches()[0]).all() and not this.filled(batches()[-1]).any()
    fill(this, 0, batches()[-1:])
    assert opened(tmp_path / "c").covers(1)


def test_killed_at_any_moment_it_goes_on_and_ends_byte_identical(full, tmp_path, monkeypatch):
    """SIGKILL at 20 moments or more, from the first file to the last byte of the manifest."""
    monkeypatch.setattr(cache, "FLUSH_SECONDS", 0.0)
    whole = min(timed(run_to_the_end, tmp_path / f"timed{number}") for number in range(2))
    kills, folder, shares = 0, tmp_path / "killed", set()
    for moment in range(100):
        if moment >= 20 and kills >= 5 and len(shares) > 1:
            break
        child = fork()
        if child == 0:
            run_to_the_end(folder)
            os._exit(0)
        time.sleep(whole * (moment + 0.5) / 25)
        os.kill(child, signal.SIGKILL)
        kills += os.waitpid(child, 0)[1] == signal.SIGKILL
        if (folder / "manifest.json").exists():
            found = opened(folder)
            shares.add(round(sum(map(found.share, range(2))), 2))
            for view in filter(found.is_complete, range(2)):
                assert torch.equal(found.read(view, batches()[3])[0], logits(view, batches()[3]))
        if found_all(folder):
            shutil.rmtree(folder)
    run_to_the_end(folder)
    assert content(folder) == content(full) and kills >= 5 and len(shares) > 1, (kills, shares)


def timed(work, *given) -> float:
    """Seconds that it takes."""
    began = time.perf_counter()
    work(*given)
    return time.perf_counter() - began


def found_all(folder) -> bool:
    return (folder / "manifest.json").exists() and opened(folder).covers(2)


def run_to_the_end(folder) -> None:
    """What a fill does: it leaves out the batches whose rows are there."""
    this = opened(folder)
    for view in range(2):
        if not this.is_complete(view):
            this.begin(view)
            fill(this, view, [part for part in batches(view) if not this.filled(part).all()])


def test_a_row_that_is_marked_is_on_the_disk_and_one_that_is_not_is_written_again(tmp_path):
    """Rows come first, marks second: what was not flushed has no mark."""
    this = opened(tmp_path / "c")
    this.begin(0)
    this.write(batches()[0], this.rows.pack(this.rows.encode(logits(0, batches()[0]))))
    assert opened(tmp_path / "c").share(0) == 0
    this.flush()
    assert opened(tmp_path / "c").share(0) == 0.07


def test_a_file_that_is_gone_is_filled_again(full, tmp_path):
    """Of a view that is half filled its marks count no more; of a complete one nothing else is asked again."""
    whole, (first, *rest) = content(full), batches(1)
    fill(opened(tmp_path / "half"), 0, batches(0))
    fill(opened(tmp_path / "half"), 1, [first])
    for folder in (full, tmp_path / "half"):
        (folder / "view-0001-00002.npy").unlink()
        this = opened(folder)
        assert this.lost == ([1] if folder == full else []) and this.is_complete(0) and not this.is_complete(1)
        this.begin(1)
        assert not this.filled(first).any()
        fill(this, 1, [first, *rest])
        assert content(folder) == whole


def test_a_file_that_is_gone_is_named_by_the_check(full):
    (full / "view-0001-00002.npy").unlink()
    with pytest.raises(UserError, match="view-0001-00002.npy is missing: .*asks the teacher again"):
        verify(full)


def test_a_damaged_file_is_named(full):
    shard = full / "view-0001-00002.npy"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(UserError, match="view-0001-00002.npy: mmap length is greater"):
        opened(full)
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert opened(full)  # a changed bit does not show in the size
    with pytest.raises(UserError, match="view-0001-00002.npy is damaged: its BLAKE2 hash"):
        verify(full)
    shard.write_bytes(whole)
    assert verify(full) == 8
    shard.write_bytes(b"")
    with pytest.raises(UserError, match="view-0001-00002.npy"):
        opened(full)
    np.save(shard, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="view-0001-00002.npy"):  # nothing is unpickled
        opened(full)
    shutil.copy(full / "view-0001-00003.npy", shard)
    with pytest.raises(UserError, match=r"view-0001-00002.npy holds \(4,\)"):
        opened(full)


def test_a_lost_file_of_a_view_that_was_begun_takes_the_marks_with_it(tmp_path):
    """A new file in its place has zeros in the rows that were marked as filled."""
    fill(opened(tmp_path / "c"), 0, batches()[:-1])
    (tmp_path / "c/view-0000-00002.npy").unlink()
    cache = opened(tmp_path / "c")
    cache.begin(0)
    assert not any(cache.filled(samples).any() for samples in batches())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"format": 1}',
        '{"format": 1, "settings": {}, "how": {}}',
        '{"a": 1, "format": 1}',
        "\x00",
    ],
)
def test_a_wrong_manifest_is_named(full, text):
    (full / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="manifest.json is no manifest of a teacher cache"):
        opened(full)


def test_manifests_of_another_version_and_of_impossible_values_are_named(full):
    values = json.loads((full / "manifest.json").read_text())
    settings = values["settings"]
    wrong = [settings | change for change in ({"samples": 0}, {"precision": "fp64"}, {"topk": 3}, {"topk": "a"})]
    wrong += [{name: settings[name] for name in settings if name != left_out} for left_out in ("topk", "temperature")]
    for change in ({"format": 2}, {"complete": {"7": {"x": "y"}}}, *({"settings": each} for each in wrong)):
        (full / "manifest.json").write_text(json.dumps(values | change))
        with pytest.raises(UserError, match=r"manifest.json is (of format 2|no manifest)"):
            opened(full)


def test_a_folder_of_other_files_is_refused(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"x")
    with pytest.raises(UserError, match="is no teacher cache .* choose another"):
        opened(tmp_path)
    with pytest.raises(UserError, match="photo.jpg is no teacher cache: it is a file, not a folder"):
        opened(tmp_path / "photo.jpg")
    assert os.listdir(tmp_path) == ["photo.jpg"]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"seed": 3}, "seed: the cache has 0, this run 3"),
        ({"samples": 99}, "samples: the cache has 100, this run 99"),
        ({"classes": ["a", "b"]}, r'classes: the cache has \["a", "b", "c"\], this run \["a", "b"\]'),
        ({"precision": "fp16"}, "precision: the cache has 'fp32', this run 'fp16'"),
        ({"topk": 2}, "topk: the cache has 0, this run 2"),
        ({"views": 5, "seed": 1}, "seed: the cache has 0, this run 1; views: the cache has 2, this run 5"),
    ],
)
def test_another_setting_is_refused_with_both_values(full, change, words):
    before = content(full)
    with pytest.raises(UserError, match=words):
        opened(full, SETTINGS | change)
    assert content(full) == before


def test_a_cache_is_opened_again_with_the_same_tuple_of_classes(tmp_path):
    """A loader's `classes` are a tuple; JSON gives a list back."""
    settings = {"samples": 100, "classes": ("a", "b", "c"), "views": 1}
    fill(TeacherCache.open(tmp_path / "c", settings, {}, 1), 0, batches())
    assert TeacherCache.open(tmp_path / "c", settings, {}, 1).covers(1)


def test_a_cache_is_completed_in_the_way_it_was_begun(tmp_path):
    fill(opened(tmp_path / "c"), 0, batches())
    with pytest.raises(UserError, match="amp dtype: the cache has 'float32', this run 'bfloat16'"):
        opened(tmp_path / "c", how={"amp_dtype": "bfloat16"})
    assert opened(tmp_path / "c", how={"amp_dtype": "bfloat16"}, views=1).covers(1)  # it asks no teacher


def test_unset_values_fit_any_cache_and_a_new_one_has_fp16(tmp_path):
    unset = SETTINGS | {"precision": None, "topk": None}
    assert opened(tmp_path / "new", unset).rows == Rows(3, "fp16", 0, 0.0)
    fill(opened(tmp_path / "top", SETTINGS | {"topk": 2}), 0, batches())
    assert opened(tmp_path / "top", unset).rows == Rows(3, "fp32", 2, 1.0)


def test_the_disk_that_is_needed_is_computed_first(tmp_path, monkeypatch):
    this = opened(tmp_path / "c")
    free = 2 * 100 * (3 * 4 + 1)
    for room in (free, free - 1):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, room=room: shutil._ntuple_diskusage(0, 0, room))
        if room == free:
            this.check_room(2)
        else:
            with pytest.raises(UserError, match="needs 0.003 MB more, and .* has 0.003 MB free: give fewer --views"):
                this.check_room(2)
    fill(this, 0, batches())
    this.check_room(2)  # half of it is there
    assert not (tmp_path / "d").exists()


def test_a_disk_that_fills_up_leaves_what_was_valid(tmp_path, monkeypatch):
    """Room is taken when a file is made, so a memory map never meets a full disk."""
    this = opened(tmp_path / "c")
    fill(this, 0, batches())
    before = content(tmp_path / "c")

    def no_room(descriptor, offset, length):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", no_room)
        with pytest.raises(UserError, match=r"cannot make .*view-0001-00000.npy \(384 bytes\): No space left"):
            this.begin(1)
    assert content(tmp_path / "c") == before
    assert torch.equal(opened(tmp_path / "c").read(0, batches()[0])[0], logits(0, batches()[0]))
    fill(opened(tmp_path / "c"), 1, batches())
    assert opened(tmp_path / "c").covers(2)


def test_files_have_their_place_on_the_disk_from_the_start(tmp_path):
    files.make_view(tmp_path, 0, 32, np.dtype([("values", "<f4", (5000,))]))
    assert (tmp_path / "view-0000-00000.npy").stat().st_blocks * 512 >= 32 * 20_000
