"""The weights of a `Trainer` in a script: what they note, and the commands and calls that use them."""

import re
import shlex

import pytest
import torch
from export_runs import pictures
from refused import check_refused
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastkd import Trainer, TrainOptions, create_model
from fastkd.errors import UserError
from fastkd.methods import CE
from fastkd.weights_file import read_about

CLASSES = ["ant", "bee", "cat", "dog"]
IMAGES = ["--mean", "0.5", "0.5", "0.5", "--std", "0.5", "0.5", "0.5"]


def train(net, out="run", **more):
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(images, torch.arange(16) % 4)
    loaders = [DataLoader(data, batch_size=8) for _ in range(2)]
    options = TrainOptions(epochs=1, out=out, device="cpu", report=False, **more.pop("options", {}))
    return Trainer(CE(net), *loaders, options, classes=CLASSES, **more).fit()


@pytest.mark.parametrize("weights", ["student.safetensors", "best.pt"])
def test_the_name_and_the_image_size_are_noted(tmp_path, weights):
    train(create_model("timm/resnet10t", 4, kwargs={"drop_path_rate": 0.1}), str(tmp_path / "run"))
    about = read_about(tmp_path / "run" / weights)
    assert about["model"] == "timm/resnet10t" and about["kwargs"] == ["drop_path_rate=0.1"]
    assert about["input"] == {"image_size": 32} and about["data"]["classes"] == CLASSES


def test_what_the_caller_says_comes_first(tmp_path):
    about = {"student": "resnet14", "image_size": 24, "mean": [0.1] * 3, "std": [0.2] * 3}
    result = train(create_model("resnet8", 4), str(tmp_path / "run"), about=about)
    found = read_about(result.student)
    assert found["model"] == about.pop("student") and found["input"] == about


def test_the_commands_of_the_readme_work(fastkd, tmp_path):
    train(create_model("resnet8", 4))
    pictures(tmp_path / "set/val", 2)
    commands = re.findall(r"fastkd (.*)", (tmp_path / "run/README.txt").read_text())
    lines = [line for line in commands if line.startswith("eval")]
    assert len(lines) == 2 and not any(line.startswith("train") for line in commands)
    for line in lines:
        words = line.replace("FOLDER", "run").replace("DIR", "set").replace("R G B", "0.5 0.5 0.5")
        status, out, err = fastkd(*shlex.split(words), "--loader", "folder", "--workers", "0")
        assert status == 0 and "evaluated on 8 images of set" in out, err


def test_the_command_does_not_go_on_with_the_run_of_a_script(fastkd):
    train(create_model("resnet8", 4))
    check_refused(fastkd("train", "--out", "run", "--resume"), "a script made the run in run", "TrainOptions(out='run'")


def test_what_a_script_says_may_have_any_names(tmp_path):
    train(create_model("resnet8", 4), str(tmp_path), about={"workers": 4})
    assert (tmp_path / "README.txt").is_file()


def test_the_readme_of_an_own_network_loads_it(tmp_path, monkeypatch):
    import fastkd

    monkeypatch.chdir(tmp_path)
    net = own_network()
    train(net)
    calls = re.findall(r"Load it: (.*)", (tmp_path / "run/README.txt").read_text())
    assert len(calls) == 2
    for call in calls:
        other = own_network()
        exec(call.replace("FOLDER", "run"), {"net": other, "fastkd": fastkd})
        assert torch.equal(other[0].weight, net[0].weight)


def own_network():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))


def test_messages_name_the_options_that_are_lacking(fastkd, tmp_path):
    result = train(own_network())
    command = ["export", "run", "--format", "torch-export", "--out", "x"]
    check_refused(fastkd(*command), "give --model NAME, --mean R G B, --std R G B", "docs/export.md")
    check_refused(fastkd("predict", "a.png", "--weights", result.student), "give --model NAME, --mean R G B, ")
    check_refused(fastkd("eval", "--weights", result.student), "give --model NAME")
    check_refused(fastkd("eval", "--weights", result.student, "--model", "resnet8"), "give --data")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("classes", [["4"], CLASSES])
def test_a_file_without_a_note_gets_all_by_options(fastkd, tmp_path, classes):
    torch.save(create_model("resnet8", 4).state_dict(), tmp_path / "net.pth")
    pictures(tmp_path / "set", 1)
    given = ["--model", "resnet8", "--classes", *classes, "--image-size", "32", *IMAGES]
    status, out, err = fastkd("predict", "set/ant", "--weights", "net.pth", "--top", "4", *given)
    names = [str(number) for number in range(4)] if classes == ["4"] else CLASSES
    assert status == 0 and all(re.search(rf"│ {name} +│", out) for name in names), err
    status, out, err = fastkd("export", "net.pth", "--format", "torch-export", "--out", "x", *given)
    assert status == 0 and (tmp_path / "x/model.pt2").is_file(), err
    check_refused(fastkd("predict", "set/ant", "--weights", "net.pth", *given[:2]), "give --classes NAME")
    twice, no_std = [*given[:2], "--classes", "a", "a", *given[-10:]], given[: given.index("--std")]
    check_refused(fastkd("predict", "p", "--weights", "net.pth", *twice), "--classes name 1 class more than once")
    check_refused(fastkd("predict", "p", "--weights", "net.pth", *no_std, "--std", "0", "1", "1"), "std")


def test_torchvision_reads_the_images_of_an_export(fastkd, tmp_path):
    """Also where DALI is installed."""
    train(create_model("resnet8", 4))
    pictures(tmp_path / "set/val", 1)
    command = ["export", "run", "--format", "torch-export", "--data", "set", "--workers", "0", *IMAGES]
    status, out, err = fastkd(*command, "--out", "x")
    assert status == 0 and "top-1 %" in out and "DALI" not in out + err, err


def test_an_own_network_is_exported_in_python(tmp_path):
    from fastkd.export import export, load_trained

    net = own_network()
    result = train(net, str(tmp_path / "run"))
    trained = load_trained(result.student, own_network(), mean=[0.5] * 3, std=[0.5] * 3)
    (file,) = export(trained, ["torch-export"], tmp_path / "x")
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(file.net(images), net.eval()(images))
    with pytest.raises(UserError, match="Sequential is a network of your own"):
        export(trained, ["timm"], tmp_path / "x")
    assert export(trained, "torch-export", str(tmp_path / "y"))[0].path == tmp_path / "y" / "model.pt2"
    with pytest.raises(UserError, match="--format onx: give some of timm, .*did you mean 'onnx'"):
        export(trained, ["onx"], tmp_path / "z")


def test_a_run_of_an_older_version_resumes(tmp_path):
    """Its config.yaml lacks the notes."""
    import yaml

    path = tmp_path / "run"
    train(create_model("resnet8", 4), str(path))
    old = yaml.safe_load((path / "config.yaml").read_text())
    for name in ("student", "model_kwargs", "image_size"):
        old.pop(name)
    (path / "config.yaml").write_text(yaml.safe_dump(old))
    train(create_model("resnet8", 4), str(path), options={"resume": True})
    assert yaml.safe_load((path / "config.yaml").read_text())["student"] == "resnet8"


def test_probabilities_are_targets(tmp_path):
    """In training, for both losses. Accuracy is of class indices."""
    images, soft = torch.randn(16, 3, 32, 32), torch.rand(16, 4).softmax(1)
    train_loader = DataLoader(TensorDataset(images, soft), batch_size=8)
    val = DataLoader(TensorDataset(images, soft.argmax(1)), batch_size=8)
    for number, more in enumerate([{}, {"loss": "bce"}]):
        options = TrainOptions(epochs=1, out=str(tmp_path / str(number)), device="cpu", report=False, **more)
        result = Trainer(CE(create_model("resnet8", 4)), train_loader, val, options, classes=CLASSES).fit()
        assert result.history[0]["ce"] > 0
    options = TrainOptions(out=str(tmp_path / "x"), device="cpu", smoothing=0.1)
    with pytest.raises(UserError, match="need class indices"):
        Trainer(CE(create_model("resnet8", 4)), train_loader, val, options, classes=CLASSES)
