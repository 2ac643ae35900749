"""report.html says what the run did, escapes what it is given, and costs nothing but itself."""

import base64
import io
import os
import signal
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from fastkd import Trainer, TrainOptions
from fastkd.html_report.charts import charts_of, log_ticks, number, ticks
from fastkd.html_report.compare import Comparison, Shown
from fastkd.html_report.confusion import matrix_of
from fastkd.html_report.page import Page, command_of
from fastkd.html_report.pictures import denormalised
from fastkd.methods import CE, DML, KD
from fastkd.signals import Stopped


class Reader(HTMLParser):
    """The tags of a page, with their attributes, and its text."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.words, self.within = [], [], []
        self.feed(page)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.within.append(tag)

    def handle_endtag(self, tag):
        while self.within and self.within.pop() != tag:
            pass

    def handle_data(self, data):
        if "style" not in self.within:
            self.words.append(data)

    def all(self, tag, **wanted):
        return [found for name, found in self.tags if name == tag and wanted.items() <= found.items()]


def read(folder) -> Reader:
    return Reader((folder / "report.html").read_text())


def fit(method, loaders, out, epochs=2, about=None, **options):
    settings = TrainOptions(epochs=epochs, lr=0.05, out=str(out), device="cpu", **options)
    return Trainer(method, *loaders, settings, {"student": "tiny", **(about or {})}).fit()


def test_a_run_leaves_a_page(tiny_net, tiny_loaders, tmp_path):
    train, val = tiny_loaders()
    method = KD(tiny_net(0), tiny_net(9))
    result = fit(method, (train, val), tmp_path / "run", about={"teacher": ["big"], "method": "kd"})
    page = read(result.out)
    assert "tiny taught by big" in page.text and "22 training and 17 validation images" in page.text
    assert f"student, top-1 {result.top1:.2f}" in page.text
    for title in ("Accuracy", "Training loss", "Validation loss", "Learning rate", "Speed", "Data wait"):
        assert page.all("svg", **{"aria-label": f"{title} by epoch"})
    assert len(page.all("polyline")) == 2 + 2 + 1 + 1 + 1 + 1  # top-1 and top-5, ce and kd, and one of each other
    method.eval()
    with torch.no_grad():
        prediction, taught = (net(val.images).argmax(1) for net in (method.student, method.teacher))
    counts = torch.bincount(val.target * 4 + prediction, minlength=16).view(4, 4)
    for true, row in zip("abcd", counts.tolist(), strict=True):
        for predicted, count in zip("abcd", row, strict=True):
            assert f"{true}, predicted {predicted}: {count} of {sum(row)}" in page.text
    agreement = 100 * (prediction == taught).double().mean().item()
    assert f"agreement {agreement:.2f}" in page.text
    assert len(page.all("img")) == 12 and "Where student and teacher differ most" in page.text
    assert "lr 0.05" in page.text and "packages: torch" in page.text


def test_the_page_needs_nothing_else(tiny_net, tiny_loaders, tmp_path):
    page = read(fit(KD(tiny_net(0), tiny_net(9)), tiny_loaders(), tmp_path / "run").out)
    assert not page.all("script") and not page.all("link") and not page.all("meta", **{"http-equiv": "refresh"})
    sources = [value for _, found in page.tags for name, value in found.items() if name in ("src", "href", "srcset")]
    assert sources and all(source.startswith("data:image/") for source in sources)
    assert "url(" not in (tmp_path / "run/report.html").read_text()


def test_while_it_is_trained_the_page_refreshes_itself(tiny_net, tiny_loaders, tmp_path, monkeypatch):
    monkeypatch.setattr("fastkd.report.Report.examine", lambda *_: None)
    page = read(fit(CE(tiny_net()), tiny_loaders(), tmp_path / "run", epochs=2).out)
    assert "epoch 2 of 2, still training" in page.text and page.all("meta", **{"http-equiv": "refresh"})


def test_without_a_teacher_it_shows_mistakes_or_the_peer(tiny_net, tiny_loaders, tmp_path):
    alone = read(fit(CE(tiny_net()), tiny_loaders(), tmp_path / "ce", epochs=1).out)
    assert "Where the student is most wrong" in alone.text and "agreement" not in alone.text
    peers = read(fit(DML(tiny_net(0), peers=[tiny_net(1)]), tiny_loaders(), tmp_path / "dml", epochs=1).out)
    assert "Where student and peer1 differ most" in peers.text


HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "{{ 7 * 7 }}", "caf\udce9"]


def hostile_page(folder) -> Page:
    likely = torch.full((1, 2, 3), 0.3), torch.ones(1, 2, 3).long()
    shown = Shown(torch.tensor([0.5]), torch.tensor([0]), torch.rand(1, 3, 8, 8), *likely)
    found = Comparison(["student", "teacher"], torch.arange(4), torch.stack([torch.tensor([1, 0, 3, 2])] * 2), shown)
    options = {"student": HOSTILE[0], "teacher": [HOSTILE[1]], "method": HOSTILE[0], "data": HOSTILE[1], "epochs": 1}
    page = Page(folder, options, {"images": 4, "classes": HOSTILE}, {}, {"command": ["x/fastkd", HOSTILE[0]]}, print)
    page.finish([{"epoch": 1, "top1": 5.0, HOSTILE[0]: 1.0, "top5": 6.0, "val_loss": 1.0}], found, 1.0)
    page.add_table(HOSTILE, [HOSTILE])
    return page


def test_every_text_is_escaped(tmp_path):
    folder = tmp_path / HOSTILE[1].replace("/", "")
    folder.mkdir()
    hostile_page(folder)
    page = read(folder)
    assert not page.all("script") and not [found for _, found in page.tags if "onerror" in found]
    assert page.text.count("<script>alert(1)</script>") > 8 and page.text.count("{{ 7 * 7 }}") > 3
    assert "caf\\udce9" in page.text
    pictures = page.all("img")
    assert len(pictures) == 1 and pictures[0]["alt"] == HOSTILE[0]


def test_the_table_and_the_gain_over_the_student_alone(tmp_path):
    rows = [{"epoch": 1, "top1": 90.126, "top5": 99.0, "val_loss": 0.5, "lr": 0.1}]
    page = Page(tmp_path, {"student": "small", "epochs": 1}, {"images": 4, "classes": []}, {}, {}, print)
    page.finish(rows, "not asked", 0.0)
    page.add_table(["", "top-1 %"], [["student alone", "88.00"], ["student, kd", "90.13"]], [rows[0] | {"top1": 88.0}])
    shown = read(tmp_path)
    assert "+2.13 points over the student alone" in shown.text and "student alone 88.00 student, kd 90.13" in shown.text
    assert shown.all("tr", **{"class": "own"})


def test_no_report_makes_no_pass(tiny_net, tiny_loaders, tmp_path):
    train, val = tiny_loaders()
    passes = []

    def batches(self):
        passes.append(1)
        return iter(val)

    counting = type("Counting", (), {"__iter__": batches, "__len__": lambda self: len(val)})()
    out = fit(KD(tiny_net(0), tiny_net(9)), (train, counting), tmp_path / "run", epochs=1, report=False).out
    without = len(passes)
    assert (out / "student.safetensors").exists() and not (out / "report.html").exists()
    fit(KD(tiny_net(0), tiny_net(9)), (train, counting), tmp_path / "with", epochs=1)
    assert len(passes) == 2 * without + 1


def test_a_page_that_cannot_be_drawn_costs_the_page_alone(tiny_net, tiny_loaders, tmp_path, monkeypatch, capsys):
    def broken(page):
        raise ImportError("no module named jinja2\nsecond line")

    monkeypatch.setattr(Page, "render", broken)
    result = fit(KD(tiny_net(0), tiny_net(9)), tiny_loaders(), tmp_path / "run", epochs=3)
    lines = [line for line in capsys.readouterr().out.splitlines() if "WARNING" in line]
    assert lines == ["WARNING: report.html is not written: ImportError: no module named jinja2"] * 2  # epoch 1, the end
    assert result.student.exists() and not (tmp_path / "run/report.html").exists()


def test_a_failed_pass_leaves_the_curves(tiny_net, tiny_loaders, tmp_path, monkeypatch, capsys):
    def failing(*_):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr("fastkd.html_report.compare._candidates", failing)
    result = fit(KD(tiny_net(0), tiny_net(9)), tiny_loaders(), tmp_path / "run", epochs=1)
    reason = "RuntimeError: CUDA error: out of memory"
    assert f"WARNING: report.html has neither confusion matrix nor images: {reason}" in capsys.readouterr().out
    page = read(result.out)
    assert page.all("svg") and not page.all("img") and reason in page.text and result.student.exists()


def test_a_signal_during_the_pass_keeps_the_weights_and_the_resumed_run_has_the_page(tiny_net, tiny_loaders, tmp_path):
    train, val = tiny_loaders()
    passes = []

    def batches(self):
        passes.append(1)
        for place, batch in enumerate(val):
            if len(passes) == 2 and place == 1:  # the first pass is the evaluation of the epoch
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    signalling = type("Signalling", (), {"__iter__": batches, "__len__": lambda self: len(val)})()
    with pytest.raises(Stopped, match="SIGTERM"):
        fit(KD(tiny_net(0), tiny_net(9)), (train, signalling), tmp_path / "run", epochs=1)
    assert len(passes) == 2 and (tmp_path / "run/student.safetensors").exists()
    assert not read(tmp_path / "run").all("img")
    fit(KD(tiny_net(0), tiny_net(9)), (tiny_loaders()[0], val), tmp_path / "run", epochs=1, resume=True)
    page = (tmp_path / "run/report.html").read_text()
    assert "<dt>seed</dt>" in page and "<dt>resume</dt>" not in page and "<dt>extend</dt>" not in page
    assert "1 epochs" not in page
    assert len(read(tmp_path / "run").all("img")) == 12


def test_many_classes_are_a_picture_and_thirty_pairs():
    classes = [f"class {number}" for number in range(1000)]
    target = torch.arange(1000).repeat_interleave(4)
    prediction = target.clone()
    prediction[:120] = (prediction[:120] + 500) % 1000  # the first 30 classes are always wrong
    prediction[120:123] = 7
    matrix = matrix_of(target, prediction, classes)
    assert matrix.step == 4 and len(matrix.pairs) == 30 and not matrix.cells
    assert {(pair.true, pair.predicted, pair.count, pair.share) for pair in matrix.pairs[:1]} == {
        ("class 0", "class 500", 4, 100.0)
    }
    picture = Image.open(io.BytesIO(base64.b64decode(matrix.picture.partition(",")[2])))
    assert picture.size == (250, 250) and picture.mode == "RGBA"
    assert picture.getpixel((125, 0))[3] == 255 and picture.getpixel((0, 0))[3] == 0
    blue, orange = picture.getpixel((200, 200))[:3], picture.getpixel((125, 0))[:3]
    assert blue[2] > blue[0] and orange[0] > orange[2]


def test_images_get_their_colours_back():
    pixels = torch.randint(256, (2, 5, 4, 3), dtype=torch.uint8)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
    normal = (pixels.permute(0, 3, 1, 2) / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert torch.equal(denormalised(normal, mean, std), pixels)
    unknown = denormalised(normal, None, None)
    assert unknown.amin((1, 2, 3)).tolist() == [0, 0] and unknown.amax((1, 2, 3)).tolist() == [255, 255]


def rows(**columns):
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def chart(history, title):
    return next(each for each in charts_of(history) if each.title == title)


def test_losses_are_on_a_log_scale_if_they_can_be():
    history = rows(epoch=[1, 2, 3], ce=[100.0, 10.0, 1.0], kd=[1.0, 1.0, 1.0])
    drawn = chart(history, "Training loss")
    assert "log scale" in drawn.note
    (_, first), (_, second), (_, third) = drawn.lines[0].dots
    assert second - first == pytest.approx(third - second)
    assert "log scale" not in chart(rows(epoch=[1, 2], ce=[1.0, -1.0]), "Training loss").note


def test_a_gap_and_a_number_that_is_not_finite_part_a_line():
    history = rows(epoch=[1, 2, 3, 4, 5, 6, 7], lr=[1.0, 2.0, float("nan"), 3.0, 4.0, float("inf"), 5.0])
    line = chart(history, "Learning rate").lines[0]
    assert [part.count(",") for part in line.parts] == [2, 2] and len(line.dots) == 5 and line.last == "5"


@pytest.mark.parametrize("value", [0.0, 5.0, -3.0, 1e-9, 1e12])
def test_one_epoch_and_constant_values_have_a_chart(value):
    for history in (rows(epoch=[1], lr=[value]), rows(epoch=[1, 2], lr=[value, value])):
        drawn = chart(history, "Learning rate")
        assert len(drawn.lines[0].dots) == len(history)
        assert all(8 <= top <= 186 for _, top in drawn.lines[0].dots)


def test_ticks_are_round():
    assert ticks(0, 100, 5) == [0, 20, 40, 60, 80, 100]
    assert [number(value) for value in ticks(0.013, 0.049, 5)] == ["0.02", "0.03", "0.04"]
    assert log_ticks(0.008, 12) == pytest.approx([0.01, 0.1, 1, 10])
    assert log_ticks(0.9, 9) == [1, 2, 5]
    assert len(log_ticks(1e-9, 1e9)) <= 6


def test_hundreds_of_epochs_stay_small():
    history = rows(epoch=list(range(1, 601)), lr=[0.1] * 600)
    drawn = chart(history, "Learning rate")
    assert len(drawn.tips) <= 100 and not drawn.lines[0].dots and drawn.lines[0].parts[0].count(",") == 600


def test_the_command_as_it_is_typed():
    assert command_of({"command": ["/x/bin/fastkd", "train", "--out", "my run"]}) == "fastkd train --out 'my run'"
    assert command_of({"command": ["/x/fastkd/__main__.py", "train"]}) == "fastkd train"
    assert command_of({}) == ""
