"""What is printed: progress where the output is no terminal, less with --quiet, more with --verbose, JSON alone."""

import io
import json
import logging
import sys

import pytest
import torch
from rich.console import Console

from fastkd import Trainer, TrainOptions
from fastkd.engine.precision import Precision
from fastkd.evaluate import evaluate
from fastkd.methods import CE
from fastkd.progress import Bar, Counter, Display, Notebook, track
from fastkd.report import LOGGER, PRINTER, log_rank0, set_output


@pytest.fixture(autouse=True)
def usual_output():
    yield
    set_output()


def fit(tiny_net, tiny_loaders, out, **options):
    return Trainer(CE(tiny_net()), *tiny_loaders(), TrainOptions(epochs=2, out=str(out), device="cpu", **options)).fit()


def test_a_file_gets_lines_within_the_steps_and_the_evaluation(tiny_net, tiny_loaders, tmp_path, capsys):
    fit(tiny_net, tiny_loaders, tmp_path / "run", log_interval=1e-9)
    lines = capsys.readouterr().out.splitlines()
    steps = [line for line in lines if "  step " in line]
    assert len(steps) == 6
    assert steps[1].startswith("epoch 1/2  step 2/3  ") and steps[-1].startswith("epoch 2/2  step 3/3  ")
    assert all(word in steps[1] for word in (" img/s  ", "data wait ", "  ce ", " left"))
    assert [line.split("  ")[:2] for line in lines if "evaluation" in line] == [
        [title, f"evaluation: batch {batch}/3"]
        for title in ("epoch 1/2", "epoch 2/2", "report.html")
        for batch in (1, 2, 3)
    ]


def test_the_usual_interval_is_silent_in_a_short_run(tiny_net, tiny_loaders, tmp_path, capsys):
    fit(tiny_net, tiny_loaders, tmp_path / "run")
    out = capsys.readouterr().out
    assert "  step " not in out and "evaluation" not in out and out.count("epoch ") >= 2


def test_a_line_comes_once_per_interval_and_says_what_is_left(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    bar = Bar(2, 60, 0, interval=30.0)
    bar.start_epoch(0)
    meter = type("Meter", (), {"read": lambda self, everywhere: {"ce": 0.5}})()
    for _ in range(60):
        now[0] += 1.0
        bar.advance(16, meter, 0.1)
    first, second = capsys.readouterr().out.splitlines()
    assert first == "epoch 1/2  step 30/60  16 img/s  data wait 0 %  ce 0.5000  0:01:30 left"
    assert second.startswith("epoch 1/2  step 60/60") and second.endswith("0:01:00 left")


def test_first_phases_and_evaluations_have_lines_too(tiny_net, tiny_loaders, capsys):
    assert list(track(range(3), "Training it", 1e-9)) == [0, 1, 2]
    loader = tiny_loaders()[1]
    with Counter("teacher x", loader, 1e-9) as count:
        evaluate(tiny_net(), loader, Precision("float32", torch.device("cpu")), count)
    lines = [line.split("  ")[:2] for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        ["Training it"],
        *(["Training it", f"{number}/3"] for number in (1, 2, 3)),
        *(["teacher x", f"batch {number}/3"] for number in (1, 2, 3)),
    ]


def test_quiet_prints_warnings_on_stderr_and_verbose_prints_saved_states(tiny_net, tiny_loaders, tmp_path, capsys):
    set_output(quiet=True)
    fit(tiny_net, tiny_loaders, tmp_path / "quiet", log_interval=1e-9)
    log_rank0("WARNING: something")
    assert capsys.readouterr() == ("", "WARNING: something\n")
    set_output(verbose=True)
    fit(tiny_net, tiny_loaders, tmp_path / "verbose")
    out = capsys.readouterr().out
    assert f"saved {tmp_path}/verbose/last.pt after step 3 of epoch 1" in out and "options: {'epochs': 2" in out


def test_messages_go_through_logging(capsys):
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    LOGGER.addHandler(handler)
    LOGGER.removeHandler(PRINTER)
    try:
        log_rank0("100 % of [dali]")
        log_rank0("WARNING: of something")
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.addHandler(PRINTER)
    assert [(each.levelname, each.getMessage()) for each in records] == [
        ("INFO", "100 % of [dali]"),
        ("WARNING", "WARNING: of something"),
    ]
    assert capsys.readouterr() == ("", "")


def test_a_narrow_terminal_shows_the_time_that_is_left(monkeypatch):
    screen = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
    monkeypatch.setattr("fastkd.progress.console", lambda: screen)
    with Display(100, title="epoch 2/2") as display:
        display.show("epoch 2/2", "step 19/23  441 img/s  data wait 2 %  ce 0.2244  kd 0.0014", 5)
        screen.file.truncate(0)
        display.bar.refresh()
    line = screen.file.getvalue().split("left")[0]
    assert "step 19/23  441 img/s" in line and "…" in line and line.endswith(("-:--:-- ", "0:00:00 "))


def test_a_notebook_has_one_bar_that_is_drawn_in_place(monkeypatch):
    shown, updates = [], []

    class Handle:
        def update(self, data, raw):
            updates.append(data)

    def display(data, raw, display_id):
        shown.append(data)
        return Handle()

    monkeypatch.setitem(sys.modules, "IPython", None)
    monkeypatch.setitem(sys.modules, "IPython.display", type(sys)("IPython.display"))
    sys.modules["IPython.display"].display = display
    one = Notebook()
    one.show("epoch 1/2  <b>", 1, 4)
    one.show("epoch 2/2", 3, 4)
    assert [each["text/plain"] for each in shown + updates] == ["epoch 1/2  <b>", "epoch 2/2"]
    assert '<progress value="1" max="4"></progress>' in shown[0]["text/html"] and "&lt;b&gt;" in shown[0]["text/html"]


@pytest.mark.libraries
def test_in_a_real_kernel(tmp_path):
    """With IPython's kernel alone, as `pip install fastkd ipykernel` gives it: no ipywidgets."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    code = f"""
import torch
from fastkd import Trainer, TrainOptions, create_model
from fastkd.methods import CE
batches = [(torch.randn(4, 3, 32, 32), torch.arange(4))] * 3
Trainer(CE(create_model("resnet8", 4)), batches, batches, TrainOptions(epochs=2, out={str(tmp_path / "run")!r}),
        classes=list("abcd")).fit()
"""
    lived = "import fastkd.progress as p; p.LIVE_S = 1e-9"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(lived + code)])
    nbclient.NotebookClient(notebook, kernel_name="python3").execute()
    outputs = notebook.cells[0].outputs
    bars = [each for each in outputs if "<progress" in each.get("data", {}).get("text/html", "")]
    assert len(bars) == 1 and "report.html" in bars[0]["data"]["text/plain"]
    text = "".join(each["text"] for each in outputs if each["output_type"] == "stream" and each["name"] == "stdout")
    assert text.count("top-1") == 2 and "\x1b" not in text


def test_the_commands_quiet_and_json(fastkd, few_digits, tmp_path):
    train = ["train", "--method", "ce", "--student", "resnet8", "--epochs", "1", "--out", "run"]
    status, out, err = fastkd(*train, "--quiet")
    assert (status, err) == (0, "") and "student, ce" in out and "epoch" not in out and "everything is in" not in out
    status, out, err = fastkd("eval", "--weights", "run/student.safetensors", "--json")
    found = json.loads(out)
    assert status == 0 and found["model"] == "resnet8" and found["images"] > 0 and 0 <= found["top1"] <= 100
    assert out.count("\n") == 1 and "as in training" in err
    status, out, err = fastkd("eval", "--weights", "run/student.safetensors", "--json", "--quiet")
    assert json.loads(out)["top1"] == found["top1"] and err == ""
    status, out, err = fastkd(*train, "--quiet", "--verbose")
    assert status == 2 and "--quiet and --verbose exclude each other" in err
    assert "quiet" not in (tmp_path / "run/config.yaml").read_text()


def test_a_line_is_in_the_file_when_it_is_logged(monkeypatch):
    """Not when a buffer is full."""
    file = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(file)))
    log_rank0("a line")
    assert file.getvalue() == b"a line\n"
