"""`fastkd bench data`: a loader that gives other images gets no time, and the advice follows from the figures."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from fastkd.bench.loaders import measure
from fastkd.bench.loaders.advice import advice, choose, limit
from fastkd.data import DataOptions
from fastkd.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path):
    """Ten pictures of two classes for training and four for evaluation, of 80 x 70 pixels."""
    for part, count in (("train", 10), ("val", 4)):
        for number in range(count):
            place = tmp_path / "pictures" / part / "ab"[number % 2]
            place.mkdir(parents=True, exist_ok=True)
            noise = torch.randint(256, (7, 8, 3), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
            Image.fromarray(noise.numpy()).resize((80, 70)).save(place / f"{number}.jpg")
    return tmp_path / "pictures"


def first_batches(folder, size=32):
    loader = measure.build(
        DataOptions(data=str(folder), loader="folder", workers=0, batch_size=4, image_size=size), CPU
    )
    return loader, list(loader)[:2]


def test_equal_batches_are_right(folder):
    loader, batches = first_batches(folder)
    assert measure.judge(loader, batches, *first_batches(folder)) == {"difference": 0.0}


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda images, target: (images, target.flip(0)), "order or labels"),
        (lambda images, target: (images.flip(0), target), "pixels differ"),
        (lambda images, target: (images + 0.5, target), "pixels differ"),
        (lambda images, target: (images * float("nan"), target), "NaN"),
        (lambda images, target: (images[:, :, 1:], target), "its batches are"),
    ],
    ids=["labels", "images of others", "brighter", "nan", "smaller"],
)
def test_other_batches_are_wrong(folder, spoil, words):
    loader, wanted = first_batches(folder)
    found = measure.judge(loader, wanted, loader, [spoil(*batch) for batch in wanted])
    assert found["status"] == "wrong" and words in found["reason"]


def test_a_wrong_loader_and_one_that_is_missing_get_no_time(folder, monkeypatch):
    def build(options, device, build=measure.build):
        if options.loader == "dali":
            raise UserError("it is not installed")
        loader = build(replace(options, loader="folder") if options.loader == "auto" else options, device)
        if options.loader == "auto":
            loader.name = "packed"
            loader.seed += 1  # other crops
            loader.decoded.dataset.seed += 1
        return loader

    monkeypatch.setattr(measure, "build", build)
    options = DataOptions(data=str(folder), workers=0, batch_size=4, image_size=32)
    found, about = measure.compare_loaders(options, CPU, lambda line: None)
    assert {name: each["status"] for name, each in found.items()} == {
        "folder": "right",
        "dali": "unavailable",
        "resident": "unavailable",
        "auto": "wrong",
    }
    assert about == {"images": 10, "classes": 2, "image_size": 32}


class Slow:
    """3 batches of 8 an epoch; each takes 10 ms, of which the processor works for `busy`."""

    def __init__(self, clock, busy=0.004):
        self.clock, self.busy = clock, busy

    def __iter__(self):
        for _ in range(3):
            self.clock["now"] += 0.01
            self.clock["cpu"] += self.busy
            yield torch.zeros(8, 1), None


def test_the_pace_is_that_of_the_batches(monkeypatch):
    clock = {"now": 50.0, "cpu": 7.0}
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock["now"])
    monkeypatch.setattr(measure, "cpu_seconds", lambda: clock["cpu"])
    taken = measure.pace(Slow(clock), seconds=0.5)
    assert taken.img_per_s == pytest.approx(800) and taken.cpu_ms == pytest.approx(0.5)


def record_of(rates, step, device="H200"):
    loaders = {}
    for (name, workers), (rate, cpu) in rates.items():
        loader = loaders.setdefault(name, {"status": "right", "workers": {}})
        loader["workers"][str(workers)] = {"img_per_s": {"median": rate}, "cpu_ms": {"median": cpu}}
    loaders["resident"] = {"status": "unavailable", "reason": "large"}
    return {"loaders": loaders, "step": {"pair": "a -> b", "img_per_s": step}, "device": device}


RATES = {("folder", 1): (400, 2), ("folder", 2): (790, 2), ("folder", 4): (800, 3), ("dali", 4): (1500, 1.5)}


@pytest.mark.parametrize(
    ("step", "wanted"),
    [({"x": 300}, ("folder", 1)), ({"x": 500, "y": 700}, ("folder", 2)), ({"x": 1000}, ("dali", 4)), ({}, ("dali", 4))],
)
def test_the_fewest_workers_that_feed_the_step(step, wanted):
    record = record_of(RATES, step)
    rate = 1.1 * max(step.values()) if step else float("inf")
    assert choose(record, rate)[:2] == wanted
    assert advice(record)[0].startswith(f"Use --loader {wanted[0]} --workers {wanted[1]}: ")


def test_what_limits_the_run():
    assert "the step limits the run, at 500 img/s; the loader could feed 3.0 times" in limit(1500, 500, 2.0, True)
    words = limit(1000, 4000, 2.0, True)
    assert "the loader limits the run: the step takes 4,000 img/s, 4.0 times" in words and "about 8.0 cores" in words
    words = limit(300, 100, 2.0, False)
    assert "about 75 img/s" in words and "25 % of the time" in words


def test_the_command(fastkd, folder, tmp_path):
    words = ["--seconds", "0.5", "--image-size", "32", "--workers", "1", "-b", "4", "--json", str(tmp_path / "r.json")]
    networks = ["--teacher", "resnet8", "--student", "resnet8"]
    status, out, err = fastkd("bench", "data", str(folder), *words, *networks)
    assert status == 0, err
    record = json.loads((tmp_path / "r.json").read_text())
    rate = record["loaders"]["folder"]["workers"]["1"]["img_per_s"]
    assert rate["median"] > 0 and rate["n"] == 3
    assert set(record["step"]["img_per_s"]) == {measure.TAUGHT, measure.ALONE}
    for line in advice(record):
        assert line in " ".join(out.split())
    assert "folder" in out and "10 training images" in out


def test_small_images_are_measured_at_their_own_size(fastkd, tmp_path):
    """As training reads them: in memory. The torchvision loader would enlarge them to 224 pixels."""
    for number in range(12):
        place = tmp_path / "small" / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        noise = torch.randint(256, (16, 16, 3), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(place / f"{number}.png")
    words = ["--val-fraction", "0.3", "--seconds", "0.3", "--workers", "1", "2", "-b", "4", "--student", "resnet8"]
    words += ["--teacher", "resnet8", "--json", str(tmp_path / "r.json")]
    status, out, err = fastkd("bench", "data", str(tmp_path / "small"), *words)
    assert status == 0, err
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["image_size"] == 16 and record["loaders"]["resident"]["status"] == "right"
    assert list(record["loaders"]["resident"]["workers"]) == ["1"]  # it has none
    assert "labels alone were compared" in record["loaders"]["resident"]["note"]


def test_a_wrong_network_is_an_error_before_a_loader_is_timed(fastkd, folder):
    words = ["--seconds", "0.5", "--image-size", "32", "--workers", "1", "-b", "4", "--teacher", "resnet9"]
    status, out, err = fastkd("bench", "data", str(folder), *words)
    assert status == 2 and "unknown model 'resnet9'" in err and "round 1" not in out


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["nowhere"], "nowhere"),
        (["--workers", "0"], "--workers must be 1 or more, got 0"),
        (["--seconds", "0"], "--seconds must be above 0"),
        (["--seconds", "nan"], "--seconds must be above 0"),
        (["--method", "kdd"], "did you mean 'kd'"),
        (["--json", "/proc"], "--json must be a file"),
    ],
)
def test_wrong_options_are_errors(fastkd, words, error):
    status, _, err = fastkd("bench", "data", *words)
    assert status == 2 and error in err and "Traceback" not in err
