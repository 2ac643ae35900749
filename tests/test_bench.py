"""The benchmarks: what is wrong gets no time, the ratios are right, the command writes what it says."""

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from fastkd.bench import timing
from fastkd.bench.losses import baselines
from fastkd.bench.losses.cases import COMPILED, Case, cases, logits, ways
from fastkd.bench.losses.measure import bars_of, judge, measure, notes, ratios, rows, show_losses, verdict
from fastkd.bench.timing import Work, interleaved, wall_ms

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


def wrong_value(student, teacher, target):
    return baselines.kd(student, teacher, target) * 1.01


def wrong_gradient(student, teacher, target):
    right = baselines.kd(student, teacher, target)
    return right.detach() + 0.98 * (right - right.detach())


def spoils_its_input(student, teacher, target):
    loss = baselines.kd(student, teacher, target)
    teacher.mul_(0.5)
    return loss


def nothing_but_nan(student, teacher, target):
    return baselines.kd(student, teacher, target) * torch.nan


def breaks(student, teacher, target):
    raise RuntimeError("no compiler here\nand a long story")


def case_of(**others) -> Case:
    return Case("KD 6 x 5", partial(logits, 2, 6, 5), baselines.kd, baselines.kd, 1, others)


@pytest.mark.parametrize("wrong", [wrong_value, wrong_gradient, spoils_its_input, nothing_but_nan])
def test_a_wrong_contender_is_reported_and_gets_no_time(wrong):
    record = measure(case_of(wrong=wrong), CPU, 0.0, compiled=False, bandwidth=1e9)
    found = record["contenders"]
    assert found["wrong"]["status"] == "wrong" and "off by" in found["wrong"]["reason"]
    assert "times" not in found["wrong"] and "copy_rate_percent" not in found["wrong"]
    assert set(found["eager"]["times"]) == {"forward", "backward", "both"}
    assert "wrong" not in ratios(record, "call")


def test_when_fastkd_is_wrong_its_row_has_no_number():
    case = Case("KD 6 x 5", partial(logits, 2, 6, 5), wrong_value, baselines.kd, 1)
    record = measure(case, CPU, 0.0, compiled=False, bandwidth=1e9)
    assert rows(record) == [["KD 6 x 5", "-", "-", "-", "-", "wrong", "-"]]


def test_what_cannot_be_built_is_unavailable_with_the_reason():
    record = measure(case_of(broken=breaks), CPU, 0.0, compiled=False, bandwidth=1e9)
    assert record["contenders"]["broken"] == {"status": "unavailable", "reason": "no compiler here"}


@pytest.mark.parametrize(
    "case", [c for c in cases(CPU) if "AT" not in c.name and "21841" not in c.name], ids=lambda c: c.name
)
def test_every_contender_of_every_case_is_right(case):
    tensors = case.make(CPU, torch.float32)
    found = judge(case, ways(case, compiled=False), tensors)
    assert {verdict["status"] for verdict in found.values()} == {"right"}, found


def test_the_data_are_no_zeros_and_the_same_every_time():
    for case in (c for c in cases(CPU) if c.name.startswith(("KD 128", "IE-KD pair 128", "hint"))):
        first, again = case.make(CPU, torch.float32), case.make(CPU, torch.float32)
        for x, y in zip(first, again, strict=True):
            assert x.equal(y) and x.count_nonzero() > 0.9 * x.numel()


def test_the_least_bytes_of_kd():
    record = measure(case_of(), CPU, 0.0, compiled=False, bandwidth=1e9)
    assert record["least_bytes"] == 3 * 6 * 5 * 4 + 6 * 8  # both logits, the gradient; the labels


def contender(low: float, median: float, high: float) -> dict:
    times = {"n": 9, "median": median, "p20": low, "p80": high}
    return {"status": "right", "times": {"forward": {}, "both": {"call": times}}, "copy_rate_percent": 12.3}


@pytest.mark.parametrize(
    "compiled, said, best, least",
    [((4, 5, 5.5), "faster", "compile", "2.50x"), ((1.8, 1.9, 2.2), "even", "compile", "0.95x"),
     ((1, 1.2, 3), "even ?", "compile", "0.60x"), ((0.5, 1, 1.5), "slower ?", "compile", "0.50x"),
     ((9, 10, 11), "faster", "eager", "3.00x")],
)  # fmt: skip
def test_the_table_of_ratios(compiled, said, best, least):
    found = {"fastkd": contender(1.9, 2, 2.1), "eager": contender(5, 6, 7), "compile": contender(*compiled)}
    record = {"case": "KD", "contenders": found}
    assert ratios(record, "call") == {"eager": 3.0, "compile": compiled[1] / 2}
    assert verdict(record, "call") == said
    assert rows(record) == [["KD", "2.000", "3.00x", "-", f"{least} {best}", said, "12"]]


def test_compiled_fastkd_is_compared_with_compiled_torch_alone():
    found = {"fastkd": contender(1.9, 2, 2.1), "eager": contender(5, 6, 7)}
    found |= {COMPILED: contender(0.5, 1, 1.5), "compile": contender(2.9, 3, 3.1)}
    record = {"case": "KD", "contenders": found}
    assert ratios(record, "call") == {"eager": 3.0, "compile": 1.5}
    assert rows(record) == [["KD", "2.000", "3.00x", "3.00x", "1.50x compile", "faster", "12"]]


def test_a_graph_has_a_row_of_its_own(capsys):
    found = {"fastkd": contender(1.9, 2, 2.1), "eager": contender(5, 6, 7)}
    for name in found:
        found[name]["times"]["both"]["graph"] = {"n": 9, "median": 1.0, "p20": 1.0, "p80": 1.0}
    found["eager"]["no_graph"] = "a sync"
    record = {"case": "KD", "contenders": found}
    assert [(row[0], row[5]) for row in rows(record)] == [("KD", "faster"), ("KD (graph)", "even")]
    show_losses({"cases": [record], "quick": False, **ABOUT})
    assert "KD: eager cannot be captured: a sync" in capsys.readouterr().out


ABOUT = {"device": "cpu", "dtype": "float32", "copy_gb_per_s": 1, "load_average": 0.5, "environment": {"cpus": 1}}


def test_a_bar_is_grey_where_the_two_are_even():
    found = {"fastkd": contender(1.9, 2, 2.1), "eager": contender(5, 6, 7), "compile": contender(1, 1.9, 3)}
    record = {"case": "KD", "contenders": found | {"liger": contender(0.5, 1, 1.5)}}
    assert [shade for *_, shade in bars_of(record, "call")] == ["C0", "grey", "C3"]


def test_the_bar_of_compiled_torch_is_against_compiled_fastkd():
    found = {"fastkd": contender(1.9, 2, 2.1), "fastkd compile": contender(0.9, 1, 1.1), "compile": contender(3, 4, 5)}
    assert bars_of({"case": "KD", "contenders": found}, "call") == [("KD, compile", 4.0, "C0")]


def test_the_table_explains_its_words_and_says_what_disturbed_it():
    steady, other = {"fastkd": contender(1.9, 2, 2.1)}, {"eager": contender(5, 6, 7)}
    steady, shaken = {"case": "KD", "contenders": steady | other}, {"case": "DKD", "contenders": steady | other}
    shaken["contenders"]["fastkd"] = contender(1.9, 2, 2.9)
    run = {"cases": [steady], "quick": False, **ABOUT}
    (words,) = notes(run)
    assert "even: " in words and "% copy: " in words
    _, loaded = notes(run | {"load_average": 2.3})
    assert "Other work disturbed these figures: the load before was 2.3 on 1 CPUs" in loaded
    _, unsteady = notes(run | {"cases": [steady, shaken]})
    assert "may have disturbed DKD: measure again" in unsteady


def test_benchmarks_are_collected_without_a_warning():
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-W", "error::pytest.PytestWarning", "bench"]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    run = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True)
    assert run.returncode == 0 and "KD 128 x 100-ours compiled-both" in run.stdout, run.stdout + run.stderr


@pytest.mark.parametrize("script", ["aot.py", "gpu_gate.py", "step_counts.py"])
def test_scripts_know_their_options(script):
    command = [sys.executable, ROOT / "bench" / "scripts" / script]
    wrong, helped = (subprocess.run([*command, x], capture_output=True, text=True) for x in ("--foo", "--help"))
    assert wrong.returncode == 2 and "unrecognized arguments: --foo" in wrong.stderr
    assert helped.returncode == 0 and f"python bench/scripts/{script}" in helped.stdout


def noted(order: list[str], name: str) -> Work:
    return Work(lambda: order.append(f"prepare {name}"), lambda _: order.append(name))


def test_bouts_take_turns_and_preparing_is_not_timed(monkeypatch):
    monkeypatch.setattr(timing, "BOUT", 0)
    order, timed = [], []
    calls = {name: noted(order, name) for name in "ab"}
    found = interleaved(calls, lambda work: (work.run(work.prepare()), timed.append(1), 1.0)[2], seconds=0, least=3)
    assert [name for name in order if name in calls] == [*"ab", *"ab", *"ba", *"ab"]  # the first of each warms up
    assert found == {"a": [1.0] * 3, "b": [1.0] * 3}
    slow = Work(lambda: time.sleep(0.02), lambda _: None)
    assert min(wall_ms(slow) for _ in range(5)) < 10 <= wall_ms(Work(lambda: None, lambda _: time.sleep(0.02)))


def test_a_bout_is_many_calls_of_one():
    order = []
    interleaved({name: noted(order, name) for name in "ab"}, wall_ms, seconds=0, least=1)
    runs = [name for name in order if name in "ab"]
    assert sum(x != y for x, y in zip(runs, runs[1:], strict=False)) == 3 and runs.count("a") > 10


def test_the_command_writes_json_and_a_picture(fastkd, tmp_path):
    arguments = ["--quick", "--cases", "KD 128", "--json", "deep/kd.json", "--plot", "deep/kd.png"]
    status, out, err = fastkd("bench", "loss", *arguments)
    assert (status, err) == (0, "") and "KD 128 x 100" in out and "left out (--quick)" in out
    run = json.loads((tmp_path / "deep/kd.json").read_text())
    assert run["environment"]["torch"] == torch.__version__.partition("+")[0] and run["device"] == "cpu"
    assert [record["case"] for record in run["cases"]] == ["KD 128 x 100"]
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert (run["commit"] or "").removesuffix("-dirty") == head
    assert (tmp_path / "deep/kd.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], ["which target?", "loss"]),
        (["los"], ["unknown target 'los'", "did you mean 'loss'"]),
        (["loss", "--cases", "LSTM"], ["--cases 'LSTM'", "KD 128 x 100"]),
        (["loss", "--plot", "a.jpg"], ["--plot", ".png", "'a.jpg'"]),
        (["loss", "--json", "/dev/null/a.json"], ["--json", "/dev/null"]),
        (["loss", "--json", "/tmp"], ["--json", "'/tmp' is a folder"]),
        (["loss", "--plot", "a.png", "--json", "a.png"], ["two of --plot, --json", "'a.png'"]),
        (["loss", "--fast"], ["'--fast'"]),
    ],
)
def test_bad_options_are_one_line(fastkd, arguments, words):
    status, out, err = fastkd("bench", *arguments)
    assert status == 2 and err.startswith("fastkd: ") and err.count("\n") == 1, err
    assert all(word in err for word in words), err


def test_help_teaches(fastkd):
    assert "fastkd bench loss" in fastkd("--help")[1]
    assert "loss" in fastkd("bench", "--help")[1]
    assert "--quick" in fastkd("bench", "loss", "--help")[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gate_without_a_gpu_says_so():
    settings = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, ROOT / "bench/scripts/gpu_gate.py"]
    run = subprocess.run(command, capture_output=True, text=True, env=settings)
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and "no CUDA device" in run.stderr, run.stderr
