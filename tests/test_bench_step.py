"""The benchmark of a step: its parts are the whole, what is wrong gets no time, the files are written."""

import json
import math
import time
from types import SimpleNamespace

import pytest
import torch

from fastkd.bench.scripts.step_counts import trace
from fastkd.bench.steps import baselines
from fastkd.bench.steps.baselines import BOUNDS, EXTRA, Fastkd, Loop, WithoutLoss, by_hand, eager_step, makers, options
from fastkd.bench.steps.breakdown import PARTS, breakdown
from fastkd.bench.steps.measure import compare, difference, measure_step, prepared, time_steps
from fastkd.bench.steps.report import best_baseline, columns, markdown, notes, ours, rows
from fastkd.bench.steps.workload import Workload, cycle
from fastkd.bench.timing import counted
from fastkd.engine import Step
from fastkd.engine.mixup import Mixup
from fastkd.engine.precision import Precision
from fastkd.errors import UserError
from fastkd.methods import METHODS

CPU = torch.device("cpu")
NONE = Mixup(0.0, 0.0, 0.0, 10)


def small(method: str) -> Workload:
    return Workload(method, "resnet14", "resnet8", (), 4, 16, 10).filled(CPU)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr("fastkd.bench.timing.BOUT", 0)
    monkeypatch.setattr("fastkd.bench.steps.measure.QUICK", 0)


@pytest.mark.parametrize("name", [*METHODS, "iekd+kd"])
def test_every_contender_of_every_method_has_the_loss_of_fastkd(name):
    pair = small(name)
    method, batch = pair.build(CPU), pair.batch(CPU)
    chosen = {
        way: make
        for way, make in makers(method, batch, compiled=False).items()
        if "form" not in way and way not in EXTRA
    }
    found = {way: prepared(make, batch, cycle(method))[0] for way, make in chosen.items()}
    compare(found, torch.float32)
    unavailable = {way for way, record in found.items() if record["status"] == "unavailable"}
    assert unavailable == (set() if name == "kd" else {"timm task"}) | unavailable & {"timm task"}, found
    assert {record["status"] for way, record in found.items() if way not in unavailable} == {"right"}, found


@pytest.mark.parametrize("name", ["kd", "sokd", "dcm", "iekd", "iakd"])
def test_the_parts_are_the_whole(name, monkeypatch):
    # the time of this process alone: other work on the machine does not count
    monkeypatch.setattr("fastkd.bench.steps.breakdown.time", SimpleNamespace(perf_counter=time.process_time))
    pair = Workload(name, "resnet14", "resnet8", (), 16, 32, 10).filled(CPU)
    method, batch = pair.build(CPU), pair.batch(CPU)
    parts = breakdown(eager_step(method, CPU), NONE, batch, cycle(method), rounds=5)
    total, whole = sum(parts[part]["median"] for part in PARTS), parts["whole"]["median"]
    assert 0.6 < total / whole < 1.6, parts
    assert (parts["teacher"]["median"] > 0) == (name in ("kd", "sokd", "iekd"))
    assert (parts["added"]["median"] > 0) == (name in ("sokd", "dcm", "iekd"))
    assert all(parts[part]["median"] > 0 for part in ("data", "student", "loss", "backward", "optimizer"))


def test_a_step_in_parts_changes_the_weights_as_a_step_does():
    pair = small("sokd")
    method, batch = pair.build(CPU), pair.batch(CPU)
    cut, whole = eager_step(method, CPU), eager_step(method, CPU)
    breakdown(cut, NONE, batch, [(None,)], rounds=1)
    for _ in range(4):
        whole(*batch)
    for mine, other in zip(cut.method.parameters(), whole.method.parameters(), strict=True):
        assert torch.equal(mine, other)


def wrong_loss(notes):
    pair = small("kd")
    method = pair.build(CPU)
    return Loop(lambda *batch: 1.01 * sum(method(*batch).values()), method.param_groups(0.01), Precision("auto", CPU))


def wrong_rate(notes):
    run = Fastkd(eager_step(small("kd").build(CPU), CPU))
    run.step.optimizer.param_groups[0]["lr"].zero_()
    return run


def not_a_number(notes):
    method = small("kd").build(CPU)
    return Loop(
        lambda *batch: torch.nan * sum(method(*batch).values()), method.param_groups(0.01), Precision("auto", CPU)
    )


def breaks(notes):
    raise RuntimeError("no compiler here\nand a long story")


@pytest.mark.parametrize(
    "make, status, word",
    [(wrong_loss, "wrong", "its first loss"), (wrong_rate, "wrong", "its last loss"),
     (not_a_number, "wrong", "not finite"), (breaks, "unavailable", "no compiler here")],
)  # fmt: skip
def test_what_is_wrong_gets_no_time(monkeypatch, make, status, word):
    eager = makers(small("kd").build(CPU), small("kd").batch(CPU), False)["fastkd eager"]
    monkeypatch.setattr("fastkd.bench.steps.measure.makers", lambda *_: {"fastkd eager": eager, "other": make})
    record = measure_step(small("kd"), CPU, quick=True, compiled=False)
    assert record["contenders"]["fastkd eager"]["img_per_s"] > 0
    other = record["contenders"]["other"]
    assert other["status"] == status and word in other["reason"] and not {"times", "img_per_s"} & other.keys()
    assert rows(record)[1][:3] == ["other", "-", status] and any(word in note for note in notes(record))


def test_differences_count_against_the_size_of_the_loss():
    assert difference([100.01, 1.0], [100.0, 1.0], torch.float32) == ""
    assert "first" in difference([101.0, 1.0], [100.0, 1.0], torch.float32)
    assert "last" in difference([100.0, math.nan], [100.0, 1.0], torch.float32)


@pytest.mark.parametrize("name", ["dcm", "kd", "iekd", "ofd", "rkd", "sp", "dist"])
def test_without_a_loss_every_network_still_learns_and_no_loss_runs(name):
    method, batch = small(name).build(CPU), small(name).batch(CPU)
    step, full = WithoutLoss(method, options(), CPU), eager_step(method, CPU)
    step(*batch)
    full(*batch)
    before = [weight.clone() for weight in step.parameters]
    step(*batch)
    assert all(not torch.equal(weight, old) for weight, old in zip(step.parameters, before, strict=True))
    assert counted(lambda: step(*batch)).operators < counted(lambda: full(*batch)).operators


def test_the_losses_are_put_back():
    from fastkd import kernels
    from fastkd.losses import logits

    before = {name: getattr(home, name) for home, names in ((logits, baselines.LOGITS), (kernels, baselines.FEATURES))
              for name in names}  # fmt: skip
    step = WithoutLoss(small("kd").build(CPU), options(), CPU)
    with pytest.raises(RuntimeError), baselines.published_losses(), baselines.patch_losses(step.homes):
        assert logits.kd_loss is not before["kd_loss"]
        raise RuntimeError
    assert before == {name: getattr(kernels if name in baselines.FEATURES else logits, name) for name in before}
    assert torch.nn.functional.cross_entropy.__module__ == "torch.nn.functional"


def test_operators_syncs_and_layouts_are_counted():
    method, batch = small("kd").build(CPU), small("kd").batch(CPU)
    step = eager_step(method, CPU)
    fine = counted(lambda: step(*batch))
    assert fine.operators > 50 and fine.convolutions > 20 and (fine.syncs, fine.slow) == (0, 0)
    method.to(memory_format=torch.contiguous_format)
    slow = Step(method, options(), CPU)

    def asks():
        slow(batch[0].contiguous(), batch[1])
        batch[0][0, 0, 0, 0].item()

    found = counted(asks)
    assert found.syncs == 1 and found.slow > 10


def test_the_best_of_each_side_and_the_markdown():
    record = measure_step(small("dcm"), CPU, quick=True, compiled=False)
    assert ours(record) == "fastkd eager" and best_baseline(record) in ("official eager", "eager channels-last")
    assert {name for name, found in record["contenders"].items() if "times" in found} >= set(BOUNDS)
    assert len({len(row) for row in rows(record)} | {len(columns(record))}) == 1
    text = markdown(record)
    assert "dcm resnet8 | resnet8, 4 images of 16 px" in text
    assert "of the speed of that with a constant gradient" in text
    assert record["contenders"]["fastkd eager"]["syncs"] == 0 < record["contenders"]["official eager"]["syncs"]


def test_methods_that_draw_go_through_several_steps_in_turn():
    method = small("iakd").build(CPU)
    assert len({plan for plans in cycle(method) for plan in plans}) > 1
    assert cycle(small("kd").build(CPU)) == [(None,)]


def test_times_are_per_step_and_images_per_batch():
    found, batch = {"fastkd eager": {}}, small("kd").batch(CPU)
    time_steps(found, {"fastkd eager": lambda *_: torch.randn(300, 300) @ torch.randn(300, 300)}, batch, [(0, 1)], 0)
    record = found["fastkd eager"]
    assert record["img_per_s"] == pytest.approx(1e3 * len(batch[0]) / 2 / record["times"]["median"])
    assert record["operators"] == 3


SMALL = ["--teacher", "resnet14", "--student", "resnet8", "-b", "4", "--image-size", "16", "--classes", "10"]


def test_the_command_writes_its_files(fastkd, tmp_path, monkeypatch):
    monkeypatch.setattr(baselines, "best_form", lambda method, images, *_, **__: eager_step(method, images.device))
    files = ["--json", "deep/kd.json", "--plot", "deep/kd.png", "--trace", "deep/kd.trace.json"]
    status, out, err = fastkd("bench", "step", "--quick", *SMALL, *files)
    assert (status, err) == (0, "") and "kd resnet14 -> resnet8, 4 images of 16 px, 10 classes" in out
    record = json.loads((tmp_path / "deep/kd.json").read_text())
    assert (record["method"], record["teacher"], record["peers"]) == ("kd", "resnet14", [])
    assert record["contenders"]["fastkd eager"]["status"] == "right" and set(PARTS) < set(record["parts"])
    assert (tmp_path / "deep/kd.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "deep/kd.trace.json").read_text())["traceEvents"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--method", "kdd"], ["--method kdd", "did you mean 'kd'"]),
        (["--teacher", "resnet57"], ["--teacher resnet57", "unknown model"]),
        (["--student", "resnet57"], ["--student resnet57"]),
        (["--peers", "resnet8"], ["--peers resnet8", "kd trains the student alone"]),
        (["-b", "1"], ["--batch-size must be 2 or more", "got 1"]),
        (["--image-size", "4"], ["--image-size", "got 4"]),
        (["--classes", "-1"], ["--classes", "got -1"]),
        (["--plot", "a.jpg"], ["--plot", ".png", "'a.jpg'"]),
        (["--trace", "/dev/null/a"], ["--trace", "/dev/null"]),
        (["--json", "/tmp"], ["--json", "'/tmp' is a folder"]),
        (["--fast"], ["'--fast'", "fastkd bench step --help"]),
    ],
)
def test_bad_options_are_one_line(fastkd, arguments, words):
    status, out, err = fastkd("bench", "step", *arguments)
    assert status == 2 and err.startswith("fastkd: ") and err.count("\n") == 1, err
    assert all(word in err for word in words), err


def test_a_pair_that_does_not_fit_is_said():
    with pytest.raises(UserError, match="stages"):
        Workload("iakd", "timm/resnet18", "resnet8", (), 2, 32, 10).build(CPU)


def test_doctor_of_a_pair(fastkd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    status, out, err = fastkd("doctor", "--method", "kd", "--teacher", "resnet14", "--student", "resnet8")
    assert (status, err) == (0, "") and "kd resnet14 -> resnet8" in out
    assert "33 of 33 convolutions, forward and backward, are channels-last" in out
    assert "the host never waits" in out and "operators" in out and "folded" in out and "fused" in out
    assert torch.cuda.is_available() or "there is no CUDA device" in out


@pytest.mark.parametrize("method, word", [("dcm", "no teacher"), ("ofd", "before the activation")])
def test_doctor_says_why_a_teacher_is_plain(method, word):
    from fastkd.commands.step_doctor import examine_step

    (row,) = (
        row
        for row in examine_step(vars(Workload(method, "resnet14", "resnet8")) | {"batch_size": 4})
        if "form" in row[0]
    )
    assert word in row[2]


def test_doctor_of_a_wrong_network_names_the_option(fastkd):
    status, out, err = fastkd("doctor", "--teacher", "resnet57")
    assert status == 2 and "--teacher resnet57" in err and out == ""


def test_help_teaches(fastkd):
    assert "step" in fastkd("bench", "--help")[1]
    out = fastkd("bench", "step", "--help")[1]
    assert "--trace" in out and "-b" not in out.split() or "--batch-size" in out
    assert "--teacher" in fastkd("doctor", "--help")[1]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["kd", "dcm", "iakd", "sokd"])
def test_on_a_gpu_graphs_are_right_and_nothing_waits(name):
    pair = Workload(name, "resnet14", "resnet8", (), 16, 32, 10)
    record = measure_step(pair, torch.device("cuda"), quick=True, compiled=False)
    for way in (way for way in record["contenders"] if way.startswith("fastkd")):
        found = record["contenders"][way]
        assert found["status"] == "right" and found["syncs"] == 0 < min(found["kernels"], found["peak_mb"]), found
    assert "peak MB" in columns(record) and len({len(row) for row in rows(record)} | {len(columns(record))}) == 1


def test_operators_of_a_step():
    method, batch = small("dcm").build(CPU), small("dcm").batch(CPU)
    step, published = eager_step(method, CPU), by_hand(method, CPU, published=True)
    step(*batch), published(*batch, None)  # the first step makes the optimizer's state
    ours, theirs = counted(lambda: step(*batch)), counted(lambda: published(*batch, None))
    assert 0 < ours.operators < theirs.operators


def test_the_files_of_a_call_are_counted():
    pair = small("kd")
    step, batch = eager_step(pair.build(CPU), CPU), pair.batch(CPU)
    step(*batch)  # the first one looks at the layers
    found = trace(lambda: step(*batch))
    assert found[0] == "fastkd/engine/step.py" and "fastkd/methods/kd.py" in found
    assert all(before != after for before, after in zip(found, found[1:], strict=False))
    assert len(set(found)) <= 14 and len(found) - len(set(found)) <= 18  # a reader follows a step
    assert trace(lambda: sum([1])) == []
