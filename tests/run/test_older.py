"""Runs of versions that had other options are resumed, and their teachers are used again."""

import pytest
import yaml

from fastkd.config import parse
from fastkd.foreign import parse_yaml


def as_before(folder, value):
    """Let config.yaml have the option --tensorboard, in the place of --log."""
    file = folder / "config.yaml"
    options = yaml.safe_load(file.read_text())
    del options["log"]
    file.write_text(yaml.safe_dump(options | {"tensorboard": value}))


@pytest.mark.parametrize("value", [False, True])
def test_a_run_with_the_option_tensorboard_goes_on_and_lends_its_teacher(fastkd, few_digits, tmp_path, value):
    if value:
        pytest.importorskip("tensorboard")
    train = ["train", "--student", "resnet8", "--teacher", "resnet14", "--teacher-epochs", "1", "--no-baseline"]
    status, _, err = fastkd(*train, "--epochs", "1", "--no-report", "--out", "run")
    assert status == 0, err
    as_before(tmp_path / "run", value)
    as_before(tmp_path / "run/teacher", value)
    status, out, err = fastkd("train", "--out", "run", "--resume")
    assert status == 0 and "resuming run after epoch 1 of 1" in out and "trained before" in out, err
    saved = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert saved["log"] == ["tensorboard"] * value and "tensorboard" not in saved
    status, out, err = fastkd(*train, "--epochs", "1", "--no-report", "--out", "another")
    assert status == 0 and "trained before, taken from run/teacher" in out, err


def test_the_option_in_a_file_for_config(tmp_path):
    (tmp_path / "old.yaml").write_text("epochs: 2\ntensorboard: true\n")
    assert parse(["--config", str(tmp_path / "old.yaml")]).train.log == ("tensorboard",)


@pytest.mark.parametrize("text", ["tensorboard: true\nlog: [csv]\n", "tensorboard: 3\n"])
def test_what_no_version_wrote_stays_as_it_is(text):
    assert "tensorboard" in parse_yaml(text)[0]
