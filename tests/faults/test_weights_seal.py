"""A checkpoint that is read for its weights: a checksum that does not fit is said, wherever the file is read."""

from pathlib import Path

import pytest
import torch
from refused import check_refused
from stopped_run import StoppedRun

from fastkd.errors import UserError
from fastkd.models.checkpoint_files import read_state_dict
from fastkd.weights_file import read_about


@pytest.fixture(scope="module")
def states(tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        return StoppedRun(tmp_path_factory.mktemp("states") / "r", patch, 6).folder


@pytest.mark.parametrize("name", ["last.pt", "best.pt"])
def test_a_changed_bit_in_the_weights_is_said(fastkd, states, tmp_path, name):
    data = bytearray((states / name).read_bytes())
    weights = read_state_dict(states / name)
    place = bytes(data).index(weights["fc.weight"].numpy().tobytes()[:64])
    data[place + 3] ^= 1
    (tmp_path / name).write_bytes(data)
    (tmp_path / "config.yaml").write_bytes((states / "config.yaml").read_bytes())
    for read in (read_state_dict, read_about):
        with pytest.raises(UserError, match=f"{name} is not a torch file.*its checksum does not fit its content"):
            read(tmp_path / name)
    words = (name, "its checksum does not fit its content")
    check_refused(
        fastkd("eval", "--weights", name, "--model", "resnet8", "--data", "digits", "--device", "cpu"), *words
    )
    frozen = ("--method", "kd", "--student", "resnet8", "--teacher", "resnet8", "--teacher-epochs", "0")
    check_refused(fastkd("train", *frozen, "--teacher-weights", name, "--out", "run"), *words)


def test_a_whole_state_is_a_weights_file_with_a_note(states):
    assert read_about(states / "best.pt")["data"]["classes"] == [str(number) for number in range(10)]
    assert read_state_dict(states / "best.pt")["fc.weight"].shape == (10, 6)


def test_a_torch_file_without_a_checksum_is_read_as_before(tmp_path):
    torch.save({"fc.weight": torch.ones(2)}, tmp_path / "x.pth")
    assert read_state_dict(tmp_path / "x.pth")["fc.weight"].tolist() == [1, 1]
