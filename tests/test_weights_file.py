"""Weights files: tied tensors, odd layouts and dtypes, and what cannot be saved."""

import json
import os
from pathlib import Path

import pytest
import torch
from forked import forked
from safetensors import safe_open
from safetensors.torch import load_file, save_model
from torch import nn

from fastkd import Trainer, TrainOptions, create_model
from fastkd.errors import UserError
from fastkd.files import sha256_of
from fastkd.methods import METHODS
from fastkd.models import load_weights, read_state_dict
from fastkd.weights_file import check_savable, read_about, save_network


class Tied(nn.Module):
    """Two layers with one weight; parameters that are overlapping views of one buffer; buffers of several kinds."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight
        flat = torch.randn(32)
        self.v, self.w = (nn.Parameter(flat[start : start + 16].view(4, 4)) for start in (0, 8))
        self.t = nn.Parameter(self.v.detach().t())
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("none", torch.zeros(0))
        self.register_buffer("short", torch.randn(2).bfloat16())
        self.register_buffer("last", torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last))


def equal(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def test_tied_tensors_are_saved_for_every_reader(tmp_path):
    net, path = Tied(), tmp_path / "net.safetensors"
    save_network(path, net, {"model": "x"})
    with safe_open(path, framework="pt") as file:
        note = json.loads(file.metadata()["fastkd"])
    assert note == {"model": "x", "shared": {"b.weight": "a.weight"}}
    plain, ours = Tied(), Tied()
    plain.load_state_dict(load_file(path))
    load_weights(ours, path)
    assert equal(plain, net) and equal(ours, net)


def test_a_network_with_a_tied_layer_loads_in_timm_and_torchvision(tmp_path):
    import timm
    from torchvision.models import resnet18

    net, path = create_model("torchvision/resnet18", 3), tmp_path / "net.safetensors"
    net.layer1[1].conv1.weight = net.layer1[0].conv1.weight
    save_network(path, net, {})
    other = resnet18(num_classes=3)
    other.load_state_dict(load_file(path))
    assert equal(other, net)
    assert equal(timm.create_model("resnet18", num_classes=3, checkpoint_path=str(path)), net)


def test_files_that_hold_a_tied_tensor_once(tmp_path):
    """save_model of safetensors drops the second name and notes it."""
    net, tied = Tied(), tmp_path / "tied.safetensors"
    del net.v, net.w, net.t
    save_model(net, str(tied))
    assert "b.weight" not in load_file(tied)
    for other in (Tied(), Tied()):
        del other.v, other.w, other.t
        load_weights(other, tied)
        assert equal(other, net)


def test_a_file_with_two_values_for_one_tensor_is_refused(tmp_path):
    net = Tied()
    state = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    torch.save(state | {"b.weight": torch.zeros(4, 4)}, tmp_path / "net.pth")
    with pytest.raises(UserError, match="one tensor in the model, two in the file 1: b.weight and a.weight"):
        load_weights(Tied(), tmp_path / "net.pth")


class Extra(nn.Linear):
    def get_extra_state(self):
        return {"a": 1}


def sparse() -> nn.Module:
    net = nn.Linear(2, 2)
    net.register_buffer("table", torch.eye(3).to_sparse())
    return net


@pytest.mark.filterwarnings("ignore:Complex modules")
@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: nn.LazyLinear(3), "weight has no shape yet"),
        (lambda: nn.Linear(2, 2, device="meta"), "weight is on the meta device"),
        (lambda: nn.Linear(2, 2).to(torch.complex128), "weight is torch.complex128, which safetensors cannot hold"),
        (sparse, "table is torch.sparse_coo"),
        (lambda: Extra(2, 2), "_extra_state is a dict"),
    ],
    ids=["lazy", "meta", "complex", "sparse", "extra"],
)
def test_what_cannot_be_saved_is_named(make, said):
    with pytest.raises(UserError) as error:
        check_savable(make(), "student")
    assert str(error.value).startswith("the student (") and said in str(error.value)


def test_a_trainer_refuses_what_it_could_not_save(tiny_net, tiny_loaders, tmp_path):
    net = tiny_net()
    net.register_buffer("table", torch.eye(3).to_sparse())
    with pytest.raises(UserError, match="the student .* cannot be saved: table"):
        Trainer(METHODS["ce"](net), *tiny_loaders(), TrainOptions(epochs=1, out=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_a_folder_whose_name_is_not_utf8(tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    net, path = create_model("resnet8", 3), folder / "student.safetensors"
    save_network(path, net, {"model": "resnet8"})
    assert read_about(path) == {"model": "resnet8"}
    other = create_model("resnet8", 3, path)
    assert all(map(torch.equal, net.state_dict().values(), other.state_dict().values()))


@pytest.mark.parametrize("read", [read_about, sha256_of, read_state_dict])
@pytest.mark.parametrize("name", ["net.safetensors", "best.pt"])
def test_a_file_without_permission_is_not_said_to_be_missing(tmp_path, monkeypatch, name, read):
    save_network(tmp_path / "net.safetensors", nn.Linear(2, 2), {})
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "best.pt")
    tmp_path.chmod(0o755)
    (tmp_path / name).chmod(0)
    monkeypatch.chdir(tmp_path)  # another user cannot come here by a whole path

    def as_somebody_else():
        if not os.getuid():
            os.setuid(65534)
        read(Path(name))

    done = forked(tmp_path, as_somebody_else)
    assert done.err == f"fastkd: the weights file {name} cannot be read: Permission denied\n" and done.status == 2
