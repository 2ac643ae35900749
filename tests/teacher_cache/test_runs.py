"""Training from a teacher cache: the same student as with the teacher, and no teacher."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from refused import check_refused

from fastkd.data.order import Shard
from fastkd.data.resident import Augmentation, ResidentLoader, ResidentSet
from fastkd.engine import TrainOptions
from fastkd.errors import UserError
from fastkd.methods import DKD, KD, SP, HardKD, find_method
from fastkd.methods.frozen import AbsentTeacher
from fastkd.models import create_model
from fastkd.teacher_cache import Lessons, Manifest, Rows, TeacherCache
from fastkd.train import Trainer

CLASSES, SAMPLES, BATCH = ("a", "b", "c", "d"), 46, 16  # the last batch has 14 images
CPU, SUM = torch.device("cpu"), find_method("hardkd+kd")
TIMES = rb'"(img_per_s|train_s|data_wait_ms|data_wait_percent)": [\d.]+'


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """curves.png takes as long as a run here."""
    monkeypatch.setattr("fastkd.report.plot", lambda history: b"")


def loader(views: int, batch: int = BATCH, paired: bool = True, train: bool = True, seed: int = 0) -> ResidentLoader:
    random = torch.Generator().manual_seed(5)
    images = torch.randint(256, (SAMPLES, 16, 16, 3), generator=random, dtype=torch.uint8)
    held = ResidentSet(CLASSES, images, torch.arange(SAMPLES) % 4)
    kind, shard = Augmentation("pad-crop", 2, "reflect", True), Shard(seed, views=views, paired=paired)
    normal = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "image_size": 16}
    return ResidentLoader(held, kind, batch, CPU, shard, train=train, **normal)


def net(seed: int):
    torch.manual_seed(seed)
    return create_model("resnet8", 4, image_size=16)


def cache_in(folder, views: int, precision="fp32", topk=0, temperature=4.0) -> TeacherCache:
    about = {"samples": SAMPLES, "classes": list(CLASSES), "views": views, "precision": precision}
    about |= {"topk": topk, "temperature": temperature}
    return TeacherCache.open(folder, about, {"amp_dtype": "float32"}, views)


def train(kind, out, views, cache=None, teacher=True, epochs=4, options=None, batch=BATCH, **settings):
    """(the student's weights, the history) of a run on the CPU."""
    given = TrainOptions(epochs=epochs, lr=0.05, mixup=0.4, cutmix=1.0, device="cpu", out=str(out))
    method = kind(net(0), net(1) if teacher else AbsentTeacher(), options)
    run = Trainer(method, loader(views, batch), loader(0, 32, train=False), replace(given, **settings), None, cache)
    history = run.fit().history
    return run.network.state_dict(), history


def equal(one: dict, other: dict) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("kind, views", [(KD, 4), (DKD, 2), (find_method("dist+kd"), 2), (HardKD, 1)])
def test_whole_fp32_logits_give_the_same_student_bit_for_bit(kind, views, tmp_path):
    """Filled on the fly and read, with mixup and CutMix, for as many views as epochs and for fewer."""
    online, _ = train(kind, tmp_path / "online", views)
    first, _ = train(kind, tmp_path / "first", views, cache_in(tmp_path / "cache", views))
    assert cache_in(tmp_path / "cache", views).covers(views)
    again, _ = train(kind, tmp_path / "again", views, cache_in(tmp_path / "cache", views), teacher=False)
    assert equal(first, online) and equal(again, online)


def test_other_views_give_another_student(tmp_path):
    two, _ = train(KD, tmp_path / "two", 2, epochs=3)
    assert not equal(two, train(KD, tmp_path / "three", 3, epochs=3)[0])


def test_a_loader_that_has_given_epochs_before_goes_on_there(tmp_path):
    """In Python: one loader for several runs. The rows are those of its own epochs, not of the run's."""
    train(KD, tmp_path / "first", 3, cache_in(tmp_path / "new", 3), epochs=3)
    used = loader(3)
    used.load_state_dict({"loader": used.name, "epoch": 2, "step": 0})
    options = TrainOptions(epochs=3, lr=0.05, mixup=0.4, cutmix=1.0, device="cpu", out=str(tmp_path / "used"))
    cache = cache_in(tmp_path / "other", 3)
    Trainer(KD(net(0), net(1)), used, loader(0, 32, train=False), options, None, cache).fit()
    for name in (file.name for file in (tmp_path / "new").iterdir()):
        assert (tmp_path / "new" / name).read_bytes() == (tmp_path / "other" / name).read_bytes(), name


@pytest.mark.parametrize("kind, topk", [(KD, 0), (KD, 2), (HardKD, 2)])
def test_a_step_with_given_logits_compiles_without_a_break(kind, topk):
    method, taught = kind(net(0), AbsentTeacher()), cache_rows(topk).example(8)
    images, target = torch.randn(8, 3, 16, 16), torch.arange(8) % 4
    want = method(images, target, None, taught)
    got = torch.compile(method, fullgraph=True, backend="aot_eager")(images, target, None, taught)
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value)


def cache_rows(topk: int) -> Rows:
    return Rows(4, "fp16", topk, 4.0)


def test_micro_batches_get_their_own_rows(tmp_path):
    online, _ = train(KD, tmp_path / "online", 2, grad_accum=3)
    train(KD, tmp_path / "first", 2, cache_in(tmp_path / "cache", 2))
    again, _ = train(KD, tmp_path / "again", 2, cache_in(tmp_path / "cache", 2), teacher=False, grad_accum=3)
    assert equal(again, online)


def test_another_batch_size_reads_the_same_cache(tmp_path):
    """An image has the same logits whatever its batch is; a batch of 2 images alone takes other kernels."""
    assert loader(2, 44).slices == [(0, 44), (44, 46)]
    for batch in (16, 44):
        train(KD, tmp_path / f"run{batch}", 2, cache_in(tmp_path / f"cache{batch}", 2), batch=batch)
    one, other = (cache_in(tmp_path / f"cache{batch}", 2) for batch in (16, 44))
    samples = torch.arange(SAMPLES)
    assert all(torch.equal(one.read(view, samples)[0], other.read(view, samples)[0]) for view in (0, 1))


def test_fp16_logits_are_within_a_thousandth_of_those_asked(tmp_path):
    for precision in ("fp16", "fp32"):
        train(KD, tmp_path / f"run{precision}", 2, cache_in(tmp_path / precision, 2, precision), epochs=2)
    (half,), (whole,) = (cache_in(tmp_path / each, 2, each).read(1, torch.arange(SAMPLES)) for each in ("fp16", "fp32"))
    assert 0 < (half - whole).abs().max() <= 1e-3 * whole.abs().max()
    first, history = train(KD, tmp_path / "a", 2, cache_in(tmp_path / "fp16", 2, "fp16"), teacher=False)
    second, _ = train(KD, tmp_path / "b", 2, cache_in(tmp_path / "new", 2, "fp16"))
    assert equal(first, second) and len(history) == 4  # the epochs that ask have the rounded logits too


@pytest.mark.parametrize("kind", [KD, HardKD])
def test_a_student_learns_from_the_largest_logits(kind, tmp_path):
    first, _ = train(kind, tmp_path / "a", 2, cache_in(tmp_path / "c", 2, "fp16", 2))
    again, history = train(kind, tmp_path / "b", 2, cache_in(tmp_path / "c", 2, "fp16", 2), teacher=False)
    assert equal(first, again) and np.isfinite([value for row in history for value in row.values()]).all()
    if kind is HardKD:  # the largest is the teacher's class
        assert equal(first, train(kind, tmp_path / "online", 2)[0])


def test_other_methods_say_why_not(tmp_path):
    with pytest.raises(UserError, match="method SP needs more of its teacher than the logits"):
        train(SP, tmp_path / "a", 2, cache_in(tmp_path / "c", 2))
    with pytest.raises(UserError, match="the largest logits alone are given"):
        train(DKD, tmp_path / "b", 2, cache_in(tmp_path / "c", 2, topk=2))
    with pytest.raises(UserError, match="the teacher is not loaded"):
        train(KD, tmp_path / "d", 2, cache_in(tmp_path / "c", 2), teacher=False)
    plain = [(torch.zeros(4, 3, 16, 16), torch.arange(4))]
    method = KD(net(0), net(1))
    with pytest.raises(UserError, match="needs to know which images a batch has: train_loader"):
        Trainer(method, NotOurs(plain), plain, TrainOptions(device="cpu"), None, cache_in(tmp_path / "c", 2))


def test_images_that_are_not_the_caches_are_refused(tmp_path):
    """In Python, where the caller makes the loader and the cache."""
    options, cache = TrainOptions(device="cpu", mixup=0.2, out=str(tmp_path / "run")), cache_in(tmp_path / "c", 2)
    cases = {"has {'views': 2, .*train_loader {'views': 3": loader(3), "partners": loader(2, paired=False)}
    for words, images in cases.items():
        with pytest.raises(UserError, match=words):
            Trainer(KD(net(0), net(1)), images, loader(0, train=False), options, None, cache)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "kind, options, words",
    [
        (KD, KD.Options(temperature=2.0), "KD has temperature 2, and the teacher cache .* is for 4"),
        (KD, KD.Options(standardize=True), "KD with standardize needs the mean"),
        (SUM, SUM.Options(kd_temperature=1.0), "KD has temperature 1"),
    ],
)
def test_options_that_the_largest_logits_do_not_fit_are_refused(kind, options, words, tmp_path):
    """In Python, where the caller gives the cache's temperature."""
    with pytest.raises(UserError, match=words):
        train(kind, tmp_path / "run", 1, cache_in(tmp_path / "c", 1, topk=2, temperature=4.0), options=options)
    assert not list(tmp_path.iterdir())


class NotOurs(list):
    classes, samples = CLASSES, 4

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def test_a_view_that_was_begun_is_finished_by_the_next_run(tmp_path, monkeypatch):
    """A run that stops within an epoch, and is resumed, leaves the cache and the student of one that does not."""
    whole, _ = train(KD, tmp_path / "whole", 2, cache_in(tmp_path / "one", 2))
    calls, ask = [], Lessons._ask

    def stops(self, images, samples):
        calls.append(len(samples))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return ask(self, images, samples)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Lessons, "_ask", stops)
        train(KD, tmp_path / "run", 2, cache_in(tmp_path / "two", 2))
    assert list(Manifest.read(tmp_path / "two").complete) == ["0"]
    resumed, _ = train(KD, tmp_path / "run", 2, cache_in(tmp_path / "two", 2), resume=True)
    assert equal(resumed, whole)
    names = {file.name for file in (tmp_path / "one").iterdir()}
    assert names == {file.name for file in (tmp_path / "two").iterdir()}
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in names)


@pytest.fixture
def photos(tmp_path):
    """A folder of JPEGs of several sizes, two classes, 20 images to train; and a teacher's weights."""
    random = np.random.default_rng(0)
    for part, count in (("train", 10), ("val", 3)):
        for label in ("cat", "dog"):
            (tmp_path / "photos" / part / label).mkdir(parents=True)
            for number in range(count):
                colours = Image.fromarray(random.integers(0, 255, (8, 8, 3), dtype=np.uint8))
                size = tuple(random.integers(70, 130, 2).tolist())
                colours.resize(size).save(tmp_path / "photos" / part / label / f"{number}.jpg")
    return tmp_path / "photos"


DATA = ["--loader", "folder", "--image-size", "32", "--workers", "0", "-b", "8", "--mixup", "0.4", "--cutmix", "1"]
NETS = ["--student", "resnet8", "--teacher", "resnet8", "--device", "cpu", "--lr", "0.01"]


def test_the_commands_fill_show_verify_and_train_from_a_cache(fastkd, photos, monkeypatch):
    """A JPEG folder: ahead of training and on the fly, with the teacher trained first or given."""
    run = ["train", *NETS, "--data", photos, *DATA, "--views", "2", "--epochs", "3"]
    status, out, err = fastkd(*run, "--teacher-epochs", "1", "--teacher-cache", "fly", "--out", "fly-run")
    assert status == 0, err
    weights = ["--teacher-weights", "fly-run/teacher/student.safetensors"]
    ahead = ["cache-teacher", *NETS, "--data", photos, *DATA, "--views", "2", *weights, "--out", "ahead"]
    status, out, err = fastkd(*ahead)
    assert "WARNING: the teacher's top-1 is" in out
    assert status == 0 and re.search(r"view 2 of 2 is complete: [\d,]+ img/s", out), err
    for name in (file.name for file in Path("fly").iterdir()):
        assert Path("fly", name).read_bytes() == Path("ahead", name).read_bytes(), name
    assert "is complete: 2 views of 20 images" in fastkd(*ahead)[1]
    status, out, err = fastkd("cache-teacher", "--info", "ahead")
    assert status == 0 and "2, of which 2 are complete" in out and "mixup 0.4 and cutmix 1" in out, err
    assert "ahead: 2 files checked, all as they were written" in fastkd("cache-teacher", "--verify", "ahead")[1]

    built = []
    create = create_model
    monkeypatch.setattr("fastkd.commands.networks.create_model", lambda *a, **k: built.append(a) or create(*a, **k))
    status, out, err = fastkd(*run[:-4], "--epochs", "3", *weights, "--teacher-cache", "ahead", "--out", "cached")
    assert status == 0, err
    assert "--views 2, as it has" in out and "its logits are in ahead" in out and len(built) == 1  # the student
    for name in ("student.safetensors", "history.jsonl"):
        one, other = (re.sub(TIMES, b"", Path(each, name).read_bytes()) for each in RUNS)
        assert one == other
    assert fastkd("train", "--out", "cached", "--resume")[0] == 0

    Path("other.safetensors").write_bytes(Path("cached/student.safetensors").read_bytes())
    changes = {
        "teacher: the cache has": ["--teacher-weights", "other.safetensors"],
        "seed: the cache has 0, this run 1": ["--seed", "1"],
        "mixup: the cache has 0.4, this run 0.2": ["--mixup", "0.2"],
        'images: the cache has {"image_size": 32}, this run {"image_size": 48}': ["--image-size", "48"],
        "precision: the cache has 'fp16', this run 'fp32'": ["--teacher-cache-precision", "fp32"],
        "views: the cache has 2, this run 3": ["--views", "3"],
        'the cache has {"train_size": null}, this run {"train_size": [32, 32]}': ["--train-size", "32"],
    }
    for words, options in changes.items():
        refused = fastkd(*run, *weights, "--teacher-cache", "ahead", "--out", "no", *options)
        check_refused(refused, words, "the teacher cache ahead does not fit")
    (photos / "train/cat/9.jpg").rename(photos / "train/cat/x.jpg")
    check_refused(fastkd(*run, *weights, "--teacher-cache", "ahead", "--out", "no"), "data: the images are other ones")
    assert not Path("no").exists()


RUNS = ("fly-run", "cached")


def test_growing_crops_are_those_of_the_student_when_the_teacher_is_trained_first(fastkd, photos):
    """The teacher's training has other epochs, over which its crops grow."""
    sizes = ["--views", "3", "--epochs", "3", "--train-size", "16:32:8", "--no-baseline", "--teacher-epochs", "2"]
    run = ["train", *NETS, "--data", photos, "--loader", "folder", "--image-size", "32", "--workers", "0", *sizes]
    for out in ("first", "again"):
        status, _, err = fastkd(*run, "--teacher-cache", "cache", "--out", out)
        assert status == 0, err
    assert Manifest.read(Path("cache")).settings["augmentation"]["train_size"] == [16, 24, 32]


def test_what_does_not_fit_is_refused_before_anything_is_written(fastkd, photos):
    weights = ["--teacher-weights", "none", "--teacher-epochs", "1"]
    run = ["train", *NETS, "--data", photos, *DATA, *weights, "--epochs", "1", "--views", "1", "--teacher-cache", "c"]
    cases = {
        "method iekd needs the teacher's feature maps, and a cache holds the logits": ["--method", "iekd"],
        "method iakd needs blocks of the teacher": ["--method", "kd+iakd"],
        "method rkd needs the input of the teacher's classifier": ["--method", "rkd"],
        "method dkd compares all classes": ["--method", "dkd", "--teacher-cache-topk", "1"],
        "method dist compares all classes": ["--method", "kd+dist", "--teacher-cache-topk", "1"],
        "--standardize needs the mean": ["--standardize", "--teacher-cache-topk", "1"],
        "--teacher-cache-topk 2: there are 2 classes": ["--teacher-cache-topk", "2"],
        "c is new: give --views V": ["--views", "0"],
        "--teacher-cache-topk must be -1 or more": ["--teacher-cache-topk", "-2"],
        "the method has no teacher (dml)": ["--method", "dml", "--teacher-weights", "none"],
    }
    for words, options in cases.items():
        check_refused(fastkd(*run, *options, "--out", "no"), words)
    check_refused(fastkd(*run[:-2], "--teacher-cache-topk", "3", "--out", "no"), "are for --teacher-cache DIR")
    fill = ["cache-teacher", *NETS, "--data", photos, *DATA]
    check_refused(fastkd(*fill, "--views", "1"), "--out DIR is missing")
    check_refused(fastkd(*fill, *weights, "--views", "1", "--out", "c"), "the teacher has yet to be trained")
    check_refused(fastkd(*fill, "--views", "1", "--out", "c"), "resnet8 has no weights", "let fastkd train --teacher-c")
    assert "--teacher-epochs" not in fastkd(*fill, "--views", "1", "--out", "c")[2]
    check_refused(fastkd("cache-teacher", "--info", "c"), "there is no teacher cache in c")
    check_refused(fastkd("cache-teacher", "--info", "c", "--views", "1"), "--info takes one folder")
    assert not Path("no").exists() and not Path("c").exists()


def test_a_cache_that_was_made_in_python_is_shown(fastkd, tmp_path):
    """It notes what the caller gave; the command knows more."""
    settings = {"samples": SAMPLES, "classes": list(CLASSES), "views": 1, "seed": 7}
    train(KD, tmp_path / "run", 1, TeacherCache.open(tmp_path / "c", settings, {}, 1), epochs=1)
    status, out, err = fastkd("cache-teacher", "--info", tmp_path / "c")
    assert status == 0, err
    assert "1, of which 1 are complete" in out and re.search(r"seed\W+7", out) and "augmentation" not in out


def test_the_help_has_a_table_of_sizes(fastkd):
    status, out, _ = fastkd("cache-teacher", "--help")
    assert status == 0
    size = 1_281_167 * 16 * (2 * 1000 + 1)
    assert f"{size / 1e9:.1f} GB" in out and f"{50_000 * 201 / 1e6:.1f} MB" in out
    assert f"{1_281_167 * 43 / 1e6:.1f} MB" in out
