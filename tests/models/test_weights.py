"""Reading weights: every form that trainers write is found, every bad file is one line and changes nothing."""

import argparse
import os
import pickle
import warnings

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fastkd.errors import UserError
from fastkd.models import create_model, load_weights, read_state_dict


@pytest.fixture
def net():
    torch.manual_seed(0)
    return create_model("resnet8", 10)


@pytest.fixture
def other():
    torch.manual_seed(1)
    return create_model("resnet8", 10).state_dict()


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def refused(model: nn.Module, path) -> str:
    """The one line that says why `path` was refused; the model has not changed."""
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(UserError) as error, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about pickles of unusual protocols before it refuses them
        load_weights(model, path)
    assert same(before, model.state_dict())
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".safetensors"])
def test_every_ending(net, other, tmp_path, suffix):
    path = tmp_path / f"net{suffix}"
    save_file(other, path) if suffix == ".safetensors" else torch.save(other, path)
    load_weights(net, path)
    assert same(net.state_dict(), other)


def test_the_old_torch_format(net, other, tmp_path):
    torch.save(other, tmp_path / "net.pth", _use_new_zipfile_serialization=False)
    load_weights(net, tmp_path / "net.pth")
    assert same(net.state_dict(), other)


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict", "student", "state_dict_ema"])
def test_wrapped(other, tmp_path, key):
    torch.save({"epoch": 3, "optimizer": {"lr": 0.1}, key: other, "acc": torch.tensor(0.5)}, tmp_path / "net.pth")
    assert same(read_state_dict(tmp_path / "net.pth"), other)


def test_wrapped_twice_with_options(other, tmp_path):
    torch.save({"args": argparse.Namespace(lr=0.1), "model": {"state_dict": other}}, tmp_path / "net.pth")
    assert same(read_state_dict(tmp_path / "net.pth"), other)


def test_order_of_wrappers(net, other, tmp_path):
    torch.save({"state_dict_ema": net.state_dict(), "model": other}, tmp_path / "net.pth")
    assert same(read_state_dict(tmp_path / "net.pth"), other)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module."]
)
def test_prefixes(net, other, tmp_path, prefix):
    torch.save({prefix + key: tensor for key, tensor in other.items()}, tmp_path / "net.pth")
    load_weights(net, tmp_path / "net.pth")
    assert same(net.state_dict(), other)


def test_prefix_of_a_compiled_part(net, other, tmp_path):
    torch.save(
        {key.replace("layer1.", "layer1._orig_mod."): tensor for key, tensor in other.items()}, tmp_path / "n.pt"
    )
    load_weights(net, tmp_path / "n.pt")
    assert same(net.state_dict(), other)


def test_into_a_wrapped_model(net, other, tmp_path):
    torch.save(other, tmp_path / "net.pth")
    load_weights(torch.compile(net), tmp_path / "net.pth")
    assert same(net.state_dict(), other)


def test_half_precision_is_converted(net, other, tmp_path):
    half = {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in other.items()}
    save_file(half, tmp_path / "net.safetensors")
    load_weights(net, tmp_path / "net.safetensors")
    assert net.fc.weight.dtype == torch.float32
    assert torch.equal(net.fc.weight, half["fc.weight"].float())


def test_only_the_batch_counter_may_be_missing(net, other, tmp_path):
    counters = [key for key in other if key.endswith("num_batches_tracked")]
    torch.save({key: tensor for key, tensor in other.items() if key not in counters}, tmp_path / "net.pth")
    load_weights(net, tmp_path / "net.pth")
    assert counters and torch.equal(net.bn1.running_mean, other["bn1.running_mean"])
    torch.save({key: tensor for key, tensor in other.items() if key != "bn1.running_mean"}, tmp_path / "net.pth")
    assert "missing 1: bn1.running_mean" in refused(net, tmp_path / "net.pth")


def test_keys_that_do_not_fit_are_listed(net, other, tmp_path):
    for i in range(7):
        other[f"extra{i}"] = torch.zeros(1)
    del other["fc.bias"], other["conv1.weight"]
    other["fc.weight"] = torch.zeros(100, 64)
    other["bn1.weight"] = torch.zeros(16, dtype=torch.int64)
    torch.save(other, tmp_path / "net.pth")
    message = refused(net, tmp_path / "net.pth")
    assert "missing 2: conv1.weight, fc.bias" in message
    assert "unexpected 7: extra0, extra1, extra2, extra3, extra4, +2 more" in message and "extra5" not in message
    assert "different 2: bn1.weight (file int64 [16], model float32 [16])" in message
    assert "fc.weight (file float32 [100, 64], model float32 [10, 64])" in message


def test_names_that_collide_without_their_prefix(net, other, tmp_path):
    torch.save({**other, "module.fc.bias": other["fc.bias"]}, tmp_path / "net.pth")
    assert "same name" in refused(net, tmp_path / "net.pth")


def test_missing_file_directory_and_ending(net, tmp_path):
    assert "no weights file" in refused(net, tmp_path / "none.pth")
    assert "is a directory without weights" in refused(net, tmp_path)
    (tmp_path / "net.onnx").write_bytes(b"x")
    assert "net.onnx is" in refused(net, tmp_path / "net.onnx")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_empty_file(net, tmp_path, suffix):
    (tmp_path / f"net{suffix}").write_bytes(b"")
    assert "is empty" in refused(net, tmp_path / f"net{suffix}")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "content", [b"\0" * 64, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", b"PK\3\4"]
)
def test_other_content(net, tmp_path, suffix, content):
    (tmp_path / f"net{suffix}").write_bytes(content)
    refused(net, tmp_path / f"net{suffix}")


@pytest.mark.parametrize("kept", [10, 1000, -100])
@pytest.mark.parametrize("form", ["zip", "old", "safetensors"])
def test_truncated_file(net, other, tmp_path, form, kept):
    path = tmp_path / ("net.safetensors" if form == "safetensors" else "net.pth")
    save_file(other, path) if form == "safetensors" else torch.save(
        other, path, _use_new_zipfile_serialization=form == "zip"
    )
    path.write_bytes(path.read_bytes()[:kept])
    refused(net, path)


class Touch:
    """Unpickled without care, it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("form", ["zip", "old", "plain"])
def test_a_file_with_code_is_refused_and_nothing_runs(net, other, tmp_path, form):
    path, mark = tmp_path / "net.pth", tmp_path / "ran"
    content = {"state_dict": other, "extra": Touch(mark)}
    if form == "plain":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    message = refused(net, path)
    assert not mark.exists()
    assert form == "plain" or "posix.mkdir" in message and "none of its code was run" in message
    pickle.loads(pickle.dumps(Touch(mark)))
    assert mark.exists()  # the trap itself works


def test_a_whole_pickled_model_is_refused(net, tmp_path):
    torch.save(net, tmp_path / "net.pth")
    line = refused(net, tmp_path / "net.pth")
    assert "CifarResNet was not an allowed global by default) and was refused" in line and "Please" not in line


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({}, "no entries"),
        ({"epoch": 3, "best": 0.5}, "entries 2: 'epoch' (int), 'best' (float)"),
        ({"weight": torch.zeros(1), "epoch": 3}, "'epoch' (int)"),
        ([torch.zeros(1)], "a list"),
        (torch.zeros(1), "a Tensor"),
        ({0: torch.zeros(1)}, "0 (Tensor)"),
        ({"state_dict": {}}, "no entries"),
    ],
)
def test_content_without_a_state_dict(net, tmp_path, content, says):
    torch.save(content, tmp_path / "net.pth")
    message = refused(net, tmp_path / "net.pth")
    assert "holds no state dict" in message and says in message
