"""A state belongs to its teacher, its images and its options; another one is refused, and what is harmless is said."""

import pytest
import torch
import yaml

from fastkd import Trainer, TrainOptions
from fastkd.errors import UserError
from fastkd.methods import KD
from fastkd.run import checkpoint


@pytest.fixture
def fit(tiny_net, tiny_loaders, tmp_path):
    """fit() begins or resumes a run of an epoch."""

    def run(teacher=9, fingerprint="one", **options):
        train, val = tiny_loaders()
        train.fingerprint = lambda: fingerprint
        settings = TrainOptions(epochs=1, out=str(tmp_path / "run"), **options)
        return Trainer(KD(tiny_net(), tiny_net(teacher)), train, val, settings).fit()

    return run


def test_another_teacher_is_refused(fit):
    fit()
    with pytest.raises(UserError, match="teacher's weights are not those of the run: their hash was [0-9a-f]{12}"):
        fit(teacher=8, resume=True)
    fit(resume=True)


def test_images_of_other_names_sizes_or_labels_are_refused(fit):
    fit()
    with pytest.raises(UserError, match="training images .names, sizes or labels. are not those of the run"):
        fit(fingerprint="another", resume=True)


def test_an_edited_configuration_is_refused(fit, tmp_path):
    """The command and config.yaml agree, and the state knows better."""
    fit()
    file = tmp_path / "run/config.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"lr": 0.7}))
    with pytest.raises(UserError, match="other options than config.yaml.*lr was 0.1, now 0.7"):
        fit(lr=0.7, resume=True)


def test_another_number_of_threads_is_said(fit, capsys):
    fit()
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        fit(resume=True)
    finally:
        torch.set_num_threads(threads)
    assert "threads" in capsys.readouterr().out


@pytest.mark.parametrize("keep, files", [(1, ["last.pt"]), (3, ["last.pt", "last-1.pt", "last-2.pt"])])
def test_the_newest_states_are_kept(tmp_path, keep, files):
    for step in range(6):
        checkpoint.save_run(tmp_path, {"history": [], "step": step}, keep)
        steps = [checkpoint.load(path)["step"] for path in checkpoint.generations(tmp_path)]
        assert steps == list(range(step, max(-1, step - keep), -1))
    assert [path.name for path in checkpoint.generations(tmp_path)] == files
