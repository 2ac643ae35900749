"""One place sets cuDNN's search and TF32, for the library and the commands, and puts the user's settings back."""

import pytest
import torch

from fastkd import Trainer, TrainOptions
from fastkd.engine.backends import backends
from fastkd.methods import CE

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


def settings():
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    return cudnn.benchmark, cudnn.conv.fp32_precision == "tf32", matmul.fp32_precision == "tf32"


@pytest.fixture(autouse=True)
def the_users(monkeypatch):
    """Settings that fastkd would not choose."""
    before = settings()
    torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = False, False
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.filterwarnings("error")
def test_on_cuda_they_are_set_and_put_back_after_an_error():
    with pytest.raises(KeyError), backends(CUDA):
        assert settings() == (True, True, False)
        with backends(CUDA):  # the command around the trainer
            assert settings() == (True, True, False)
        assert settings() == (True, True, False)
        raise KeyError
    assert settings() == (False, False, True)


@pytest.mark.filterwarnings("error")
def test_a_user_of_torchs_new_names_is_served_too():
    torch.backends.cuda.matmul.fp32_precision = "tf32"  # allow_tf32 cannot be read any more
    with backends(CUDA):
        assert settings() == (True, True, False)
    assert settings() == (False, False, True)


def test_nothing_changes_for_the_cpu():
    with backends(CPU):
        assert settings() == (False, False, True)


def test_the_library_trains_with_them(tiny_net, tiny_loaders, tmp_path, monkeypatch):
    """The device is looked at, not used: the trainer asks for the settings of its device."""
    seen = []
    trainer = Trainer(CE(tiny_net()), *tiny_loaders(), TrainOptions(epochs=1, lr=0.1, out=str(tmp_path / "run"),
                      device="cpu", warmup_epochs=0))  # fmt: skip
    monkeypatch.setattr("fastkd.train.backends", lambda device: seen.append(device) or backends(CUDA))
    monkeypatch.setattr(trainer.method, "prepare", lambda *_: seen.append(settings()))
    trainer.fit()
    assert seen == [CPU, (True, True, False)] and settings() == (False, False, True)
