"""What a run records of the machine, and what it names when that changes."""

import json

import torch

from fastkd import environment as module
from fastkd.environment import changes, code_hash, continued, environment


def test_what_changes_results_is_recorded(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("MY_TOKEN", "secret")
    found = json.loads(json.dumps(environment(4)))
    assert found["processes"] == 4 and found["cpu_threads"] == torch.get_num_threads()
    assert found["variables"]["OMP_NUM_THREADS"] == "3" and "secret" not in json.dumps(found["variables"])
    assert found["packages"]["torch"] and set(found["tf32"]) == {"matmul", "cudnn"} and len(found["code"]) == 64


def test_an_edited_file_is_another_code(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "__file__", str(tmp_path / "environment.py"))
    (tmp_path / "one.py").write_text("x = 1\n")
    (tmp_path / "data.txt").write_text("no code")
    first = code_hash()
    (tmp_path / "data.txt").write_text("other")
    assert code_hash() == first
    (tmp_path / "one.py").write_text("x = 2\n")
    second = code_hash()
    (tmp_path / "one.py").rename(tmp_path / "two.py")
    assert len({first, second, code_hash()}) == 3


def test_changes_are_named_one_by_one():
    now = environment()
    assert changes(json.loads(json.dumps(now)), now) == []
    before = now | {"cpu_threads": 7, "command": ["other"], "packages": now["packages"] | {"torch": "1.0"}}
    threads, torch_version = now["cpu_threads"], now["packages"]["torch"]
    assert changes(before, now) == [f"cpu_threads was 7, now {threads}", f"torch was 1.0, now {torch_version}"]
    assert changes({"python": now["python"]}, now) == []  # an older version wrote less


def test_a_run_that_goes_on_keeps_what_earlier_starts_have_written(tmp_path):
    path, starts = tmp_path / "environment.json", [{"command": ["one"]}, {"command": ["two"]}, {"command": ["three"]}]
    for start in starts:
        path.write_text(json.dumps(continued(path, start)))
    assert json.loads(path.read_text()) == {"command": ["three"], "earlier": starts[:2]}
    path.write_text("[]")
    assert continued(path, starts[0]) == starts[0]


def test_changed_code_is_said_without_its_whole_hash():
    now = environment()
    assert changes(now | {"code": "0" * 64}, now) == [f"fastkd's own code has changed (0000000, now {now['code'][:7]})"]


def test_packages_without_an_influence_are_recorded_where_installed(monkeypatch):
    monkeypatch.setattr(module, "version", {"torch": "2", "mlflow": "3"}.get)
    now = environment()
    assert now["packages"]["mlflow"] == "3" and now["packages"]["triton"] is None and "wandb" not in now["packages"]
    assert changes(now | {"packages": now["packages"] | {"mlflow": "2"}}, now) == []
