"""Every recipe parses, fits its networks and schedule, and names the source of each value."""

import importlib.resources
import re
from functools import cache

import pytest
import torch
import yaml

from fastkd.config import flat, parse, recipe_names
from fastkd.data.folder import FolderLoader
from fastkd.data.scan import Split
from fastkd.engine import Schedule
from fastkd.methods import METHODS
from fastkd.models import create_model

RECIPES = recipe_names()
SOURCES = r"authors' code|authors' README|abstract|second-hand|usual|formula|ours|arXiv:\d"
LIGHTER = {"wrn_28_10": "wrn_16_1", "timm/resnet34": "timm/resnet18", "timm/resnet50": "timm/resnet26"}
CIFAR_SCHEDULES = {  # epochs, one epoch of each part between drops, factor of a drop
    "iekd": (160, [40, 100, 140], 0.1),
    "sokd": (200, [50, 125, 175], 0.1),
    "dcm": (200, [30, 90, 140, 180], 0.2),
}
SCHEDULED_LIKE = {"kd": "iekd", "iakd": "iekd", "dml": "dcm"}


def text_of(name: str) -> str:
    return (importlib.resources.files("fastkd") / "recipes" / f"{name}.yaml").read_text()


def heading(name: str) -> str:
    """The comment at the top of a recipe, as one line."""
    lines = text_of(name).splitlines()
    return " ".join(line.removeprefix("# ") for line in lines if line.startswith("#"))


@cache
def config_of(name: str, *more: str):
    return parse(["--recipe", name, "--data", "DIR", *more], lambda line: None)


def networks_of(config) -> list[str]:
    kind, names = METHODS[config.run.method], config.networks
    return [names.student, *(names.teacher if kind.needs_teacher else []), *names.peers]


@pytest.mark.parametrize("name", RECIPES)
def test_it_reads_and_every_value_arrives(name):
    effective, written = flat(config_of(name)), yaml.safe_load(text_of(name))
    for key in {"teacher", "teacher_weights"} & written.keys():
        written[key] = [written[key]]  # one name stands for a list of one
    assert {key: effective[key] for key in written} == written | {"data": "DIR"}
    assert config_of(name).run.method in METHODS


@pytest.mark.parametrize("name", RECIPES)
def test_every_value_has_a_source(name):
    lines = [line for line in text_of(name).splitlines() if not line.startswith("#")]
    if "Every number here is ours" in heading(name):
        return
    for line in lines:
        assert re.search(rf"  # ({SOURCES})", line), line
    for word in ("authors' code", "authors' README", "second-hand", "usual", "formula", "ours"):
        used = any(re.search(rf"  # {word}\b", line) for line in lines)
        assert used == (f'"{word}": ' in heading(name)), f"{word}: explained if and only if used"


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "digits"])
def test_it_says_how_it_is_run_and_names_the_paper(name):
    assert f"--recipe {name} --data DIR" in heading(name)
    assert METHODS[config_of(name).run.method].paper in heading(name)


@pytest.mark.parametrize("name", RECIPES)
def test_the_schedule_fits_and_stretches(name):
    train = config_of(name).train
    assert all(0 < drop < train.epochs for drop in train.drops)
    assert train.sched == "cosine" or train.drops
    short = config_of(name, "--epochs", "2").train
    assert len(short.drops) == len(train.drops) and all(0 < drop < 2 for drop in short.drops)


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("cifar")])
def test_cifar_rates_are_those_of_the_papers(name):
    """The learning rate in the middle of each phase, calculated by hand."""
    config = config_of(name)
    epochs, middles, factor = CIFAR_SCHEDULES[SCHEDULED_LIKE.get(config.run.method, config.run.method)]
    group = {"params": [torch.nn.Parameter(torch.zeros(1))], "lr": torch.tensor(0.0), "base_lr": config.train.lr}
    schedule = Schedule(config.train, torch.optim.SGD([group]))
    assert config.train.epochs == epochs
    assert [schedule.write(epoch) for epoch in middles] == pytest.approx([0.1 * factor**n for n in range(len(middles))])


@pytest.mark.parametrize("network", sorted({net for name in RECIPES for net in networks_of(config_of(name))}))
def test_its_networks_exist(network):
    with torch.device("meta"):
        assert sum(p.numel() for p in create_model(network, 10).parameters())


@pytest.mark.parametrize("name", RECIPES)
def test_its_weights_have_that_name(name):
    """timm lists the weights. They are not downloaded here."""
    import timm

    names = config_of(name).networks
    for teacher, weights in zip(names.teacher, names.teacher_weights, strict=bool(names.teacher_weights)):
        assert f"{teacher.removeprefix('timm/')}.{weights}" in timm.list_pretrained()


@pytest.mark.parametrize("name", RECIPES)
def test_its_method_takes_its_networks(name):
    """Large networks are on the meta device. Methods that initialise weights get a smaller network of the same kind."""
    config = config_of(name)
    kind, nets = METHODS[config.run.method], networks_of(config)
    draws = config.run.method in ("sokd", "dcm", "iekd")
    with torch.device("meta" if set(nets) & set(LIGHTER) and not draws else "cpu"):
        student, *others = (create_model(LIGHTER.get(net, net) if draws else net, 10) for net in nets)
        teacher = others.pop(0) if kind.needs_teacher else None
        method = kind(student, teacher, config.method, others)
    assert method.networks()["student"] is student


def test_the_command_prints_one(fastkd):
    status, out, _ = fastkd("train", "--recipe", "cifar-sokd", "--data", "DIR", "--epochs", "20", "--print-config")
    assert status == 0 and "# recipe cifar-sokd, made for 200 epochs, over 20: decay_milestones 100 150 -> 10 15" in out
    effective = yaml.safe_load(out)
    assert effective["decay_milestones"] == [10, 15] and effective["bridge_lr"] == 0.1 and effective["data"] == "DIR"


@pytest.mark.parametrize("name", ["cifar-kd", "imagenet-kd-resnet34-resnet18"])
def test_its_data_options_fit_the_folder_loader(name, tmp_path):
    from PIL import Image

    file = tmp_path / "a.png"
    Image.new("RGB", (32, 32), (129, 124, 112)).save(file)
    options, split = config_of(name, "--workers", "0").data, Split(("a", "b"), [str(file)] * 4, [0, 1, 0, 1])
    images, _ = next(iter(FolderLoader(split, options, torch.device("cpu"), train=False)))
    side = {"cifar-kd": 32}.get(name, 224)
    assert images.shape == (4, 3, side, side)
    if name == "cifar-kd":
        assert images.abs().max() < 0.05  # that colour is the mean of CIFAR-100


def test_each_of_the_papers_has_recipes():
    found = {(name.partition("-")[0], config_of(name).run.method) for name in RECIPES}
    assert {("cifar", m) for m in ("kd", "dml", "iakd", "iekd", "sokd", "dcm")} <= found
    assert {("imagenet", m) for m in ("kd", "iakd", "iekd", "sokd", "dcm")} <= found


@pytest.mark.parametrize(("weights", "epochs"), [("none_x/t.pth", 0), ("t.pth", 0), ("none", 3), ("t.pth none", 3)])
def test_weights_are_used_as_they_are_but_none_is_trained(tmp_path, weights, epochs):
    file, words = tmp_path / "c.yaml", weights.split()
    file.write_text("teacher_epochs: 3\n")
    given = ["--data", "DIR", "--teacher", *["resnet8"] * len(words), "--teacher-weights", *words]
    config = parse(["--config", str(file), *given], lambda line: None)
    assert config.networks.teacher_epochs == epochs
