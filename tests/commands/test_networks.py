"""The networks of a run: several teachers, and options of older versions."""

from pathlib import Path

import pytest
import yaml

from fastkd.config import NetworkOptions
from fastkd.errors import UserError

SHORT = ["--epochs", "1", "--warmup-epochs", "0", "-b", "256", "--no-baseline"]
QUICK = [*SHORT, "--teacher-epochs", "1"]


def ok(result) -> str:
    """The output of a command that succeeded."""
    status, out, err = result
    assert status == 0, err
    return out


def refused(result) -> str:
    """The one line of a command that was refused."""
    status, out, err = result
    assert status == 2 and err.startswith("fastkd: ") and err.count("\n") == 1, (status, out, err)
    return err


def test_a_run_whose_file_names_one_teacher_as_text_resumes(fastkd, few_digits):
    ok(fastkd("train", *QUICK, "--teacher", "resnet8", "--out", "run"))
    for file in (Path("run/config.yaml"), Path("run/teacher/config.yaml")):
        options = yaml.safe_load(file.read_text())
        options |= {"teacher": options["teacher"][0], "teacher_weights": ""}
        file.write_text(yaml.safe_dump(options))
    assert "resuming run after epoch 1 of 1" in ok(fastkd("train", "--out", "run", "--resume"))
    assert "trained before" in ok(fastkd("train", *QUICK, "--teacher", "resnet8", "--out", "other"))
    assert "teacher was ['resnet8']" in refused(fastkd("train", "--out", "run", "--resume", "--teacher", "resnet20"))


def test_two_teachers(fastkd, few_digits):
    out = ok(fastkd("train", *QUICK, "--teacher", "resnet8", "resnet8", "--out", "run"))
    assert "student resnet8: kd from resnet8, resnet8" in out and "teachers' mean" in out
    first, second = (Path(f"run/{name}/student.safetensors").read_bytes() for name in ("teacher", "teacher2"))
    assert first != second
    given = [*SHORT, "--teacher-epochs", "0", "--teacher", "resnet8", "resnet8", "--teacher-ratios", "2", "1"]
    given += ["--teacher-weights", "run/teacher/student.safetensors", "run/teacher2/student.safetensors"]
    out = ok(fastkd("train", *given, "--ensemble", "logits"))
    assert "trained before" not in out and "teachers' mean" in out
    assert "one teacher" in refused(fastkd("train", *given, "--method", "iekd"))


def test_weights_and_ratios_are_counted():
    assert NetworkOptions(teacher=("a", "b"), teacher_weights=("f", "none")).weights_of_teachers == ("f", "")
    assert NetworkOptions(teacher=("a", "b"), teacher_weights=("",)).weights_of_teachers == ("", "")
    with pytest.raises(UserError, match="1 for 2 teachers"):
        NetworkOptions(teacher=("a", "b"), teacher_weights=("f",))
    with pytest.raises(UserError, match="--teacher-ratios 1.0 2.0: 2 for 1 teachers"):
        NetworkOptions(teacher_ratios=(1.0, 2.0))
