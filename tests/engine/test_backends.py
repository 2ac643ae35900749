"""One place sets cuDNN's search, for the library and the commands, and puts the user's settings back."""

import os

import pytest
import torch

from fastkd import Trainer, TrainOptions
from fastkd.engine.backends import backends
from fastkd.errors import UserError
from fastkd.methods import CE

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.fixture(autouse=True)
def the_users(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)


def test_on_cuda_the_search_is_on_and_put_back_after_an_error():
    with pytest.raises(KeyError), backends(CUDA):
        with backends(CUDA):  # the command around the trainer
            assert torch.backends.cudnn.benchmark
        assert torch.backends.cudnn.benchmark
        raise KeyError
    assert not torch.backends.cudnn.benchmark


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_tf32_is_the_users(precision):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with backends(CUDA):
            assert torch.get_float32_matmul_precision() == precision
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


def test_nothing_changes_for_the_cpu():
    with backends(CPU):
        assert not torch.backends.cudnn.benchmark


def test_the_library_trains_with_them(tiny_net, tiny_loaders, tmp_path, monkeypatch):
    """The device is looked at, not used: the trainer asks for the settings of its device."""
    seen = []
    options = TrainOptions(epochs=1, lr=0.1, out=str(tmp_path / "run"), device="cpu", warmup_epochs=0)
    trainer = Trainer(CE(tiny_net()), *tiny_loaders(), options)
    monkeypatch.setattr("fastkd.train.backends", lambda device, _: seen.append(device) or backends(CUDA))
    monkeypatch.setattr(trainer.method, "prepare", lambda *_: seen.append(torch.backends.cudnn.benchmark))
    trainer.fit()
    assert seen == [CPU, True] and not torch.backends.cudnn.benchmark


def test_deterministic_algorithms_are_put_back(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    fills = torch.utils.deterministic.fill_uninitialized_memory
    with backends(CUDA, deterministic=True):
        assert not torch.utils.deterministic.fill_uninitialized_memory
        assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
        with backends(CUDA):  # of a part that does not ask for them
            assert not torch.backends.cudnn.benchmark and torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory == fills
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_an_operation_without_a_deterministic_form_is_named():
    text = "kthvalue CUDA does not have a deterministic implementation, but you set it. You can turn it off."
    with pytest.raises(UserError, match="--deterministic: kthvalue CUDA does not have"):
        with backends(CPU, deterministic=True):
            raise RuntimeError(text)
    for deterministic, error in ((False, text), (True, "another")):
        with pytest.raises(RuntimeError, match=error.split(",")[0]) as problem:
            with backends(CPU, deterministic):
                raise RuntimeError(error)
        assert not isinstance(problem.value, UserError)
