"""Every recipe parses, fits its networks and schedule, and names the source of each value."""

import itertools
import math
import re
from functools import cache

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from refused import check_refused

from fastkd.commands.recipes import _published, _row
from fastkd.config import flat, parse
from fastkd.engine import Schedule
from fastkd.methods import METHODS
from fastkd.models import create_model
from fastkd.recipes import recipe_names, recipe_text
from fastkd.recipes.benchmark import FIGURES, PAIRS, published

RECIPES = [name for name in recipe_names() if name not in PAIRS]
COMPANIONS = ("kd", "fitnet", "at", "ft", "ofd", "dkd", "dist", "rkd", "sp")
SOURCES = r"authors' code|authors' README|abstract|second-hand|usual|formula|ours|arXiv:\d"
UNTRIED = [name for name in RECIPES if "# Not run here" in recipe_text(name)]
LIGHTER = {"timm/resnetv2_152x2_bit": "timm/resnetv2_50x1_bit", "timm/resnet152": "timm/resnet26"} | {
    "wrn_28_10": "wrn_16_1",
    "timm/resnet34": "timm/resnet18",
    "timm/resnet50": "timm/resnet26",
}
IEKD, SOKD = [(80, 0.1), (40, 0.01), (40, 0.001)], [(100, 0.1), (50, 0.01), (50, 0.001)]
DCM = [(59, 0.1), (60, 0.02), (40, 0.004), (41, 0.0008)]  # the code drops the rate at 59, 119 and 159, counted from 0
IMAGENET = [(30, 0.1), (30, 0.01), (30, 0.001)]
RATES = {  # epochs and their learning rate, of each phase
    **dict.fromkeys(["cifar100-iekd", "cifar100-kd", "cifar100-iakd"], IEKD),
    "cifar100-sokd": SOKD,
    **dict.fromkeys(["cifar100-dcm", "cifar100-dcm-mobilenet", "cifar100-dml"], DCM),
    "imagenet-dkd-resnet34-resnet18": [(30, 0.2), (30, 0.02), (30, 0.002), (10, 0.0002)],
}


def text_of(name: str) -> str:
    return recipe_text(name)


def heading(name: str) -> str:
    """The comment at the top of a recipe, as one line."""
    lines = text_of(name).splitlines()
    return " ".join(line.removeprefix("# ") for line in lines if line.startswith("#"))


@cache
def config_of(name: str, *more: str):
    place = "--data-dir" if name.startswith("cifar100") else "--data"
    return parse(["--recipe", name, place, "DIR", *more], lambda line: None)


def networks_of(config) -> list[str]:
    kind, names = METHODS[config.run.method], config.networks
    return [names.student, *(names.teacher if kind.needs_teacher else []), *names.peers]


@pytest.mark.parametrize("name", RECIPES)
def test_it_reads_and_every_value_arrives(name):
    effective, written = flat(config_of(name)), yaml.safe_load(text_of(name))
    for key in {"teacher", "teacher_weights"} & written.keys():
        written[key] = [written[key]]  # one name stands for a list of one
    typed = {} if name.startswith("cifar100") else {"data": "DIR"}
    assert {key: effective[key] for key in written} == written | typed
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
    assert re.search(rf"--recipe {name} --data(-dir)? DIR", heading(name))
    assert METHODS[config_of(name).run.method].paper in heading(name)


@pytest.mark.parametrize("name", RECIPES)
def test_the_schedule_fits_and_stretches(name):
    train = config_of(name).train
    assert all(0 < drop < train.epochs for drop in train.drops)
    assert train.sched == "cosine" or train.drops
    short = config_of(name, "--epochs", "2").train
    assert len(short.drops) == len(train.drops) and all(0 < drop < 2 for drop in short.drops)


def rates_of(train) -> list[tuple[float, float]]:
    """The learning rate at the first and just before the last step of every epoch."""
    group = {"params": [torch.nn.Parameter(torch.zeros(1))], "lr": torch.tensor(0.0), "base_lr": train.lr}
    schedule = Schedule(train, torch.optim.SGD([group]))
    return [(schedule.write(epoch), schedule.write(epoch + 0.999)) for epoch in range(train.epochs)]


@pytest.mark.parametrize("name", UNTRIED)
def test_rates_rise_and_fall_along_a_cosine(name):
    train = config_of(name).train
    rates, warm = [first for first, _ in rates_of(train)], int(train.warmup_epochs)
    assert rates[0] == 0 and rates[warm] == pytest.approx(train.lr) == max(rates)
    half = (warm + train.epochs) // 2
    assert rates[half] == pytest.approx(train.lr / 2, rel=0.02) and rates[-1] < 0.001 * train.lr


@pytest.mark.every
@pytest.mark.parametrize("name", UNTRIED)
def test_a_small_run_of_it(name, fastkd, tmp_path):
    """One step for the teacher and one for the student, with all options of the recipe but sizes and networks."""
    pixels = np.random.default_rng(0)
    for part, label, number in itertools.product(("train", "val"), "ab", range(4)):
        (tmp_path / part / label).mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(pixels.integers(0, 256, (70, 80, 3), dtype=np.uint8))
        image.save(tmp_path / part / label / f"{number}.png")
    networks = ["--student", "timm/resnet10t", "--teacher", "timm/resnet10t", "--teacher-weights", "none"]
    sizes = ["--image-size", "64", "--batch-size", "8", "--epochs", "1", "--teacher-epochs", "1", "--loader", "folder"]
    sizes += ["--workers", "0", *(["--train-size", "48"] if config_of(name).data.train_size else [])]
    out = str(tmp_path / "out")
    status, text, error = fastkd("train", "--recipe", name, "--data", str(tmp_path), *networks, *sizes, "--out", out)
    assert status == 0, error
    assert "student, kd" in text and (tmp_path / "out" / "student.safetensors").exists()


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in ("digits", *UNTRIED)])
def test_rates_are_those_of_the_papers_in_every_epoch(name):
    wanted = [rate for epochs, rate in RATES.get(name, IMAGENET) for _ in range(epochs)]
    assert rates_of(config_of(name).train) == [(pytest.approx(rate), pytest.approx(rate)) for rate in wanted]


def some(*methods: str) -> list:
    """Pairs and methods: kd and dkd with every pair, all `methods` with one pair; the others with `-m every`."""
    cases = []
    for name, method in itertools.product(PAIRS, methods):
        default = method in ("kd", "dkd") or name == "cifar100-240-vgg13-mobilenetv2"
        cases.append(pytest.param(name, method, marks=[] if default else pytest.mark.every))
    return cases


@pytest.mark.parametrize(("name", "method"), some(*COMPANIONS))
def test_rates_of_the_benchmark_in_every_epoch(name, method):
    """RepDistiller: 0.05, or 0.01 for MobileNetV2 and ShuffleNets, x 0.1 from epochs 151, 181, 211, counted from 1."""
    first = 0.01 if name.rpartition("-")[2] in ("mobilenetv2", "shufflenet_v1", "shufflenet_v2") else 0.05
    wanted = [first] * 150 + [first / 10] * 30 + [first / 100] * 30 + [first / 1000] * 30
    train = config_of(name, "--method", method).train
    assert rates_of(train) == [(pytest.approx(rate), pytest.approx(rate)) for rate in wanted]
    assert (train.opt, train.momentum, train.weight_decay, train.amp_dtype) == ("sgd", 0.9, 5e-4, "float32")


def test_rates_of_the_digits():
    train = config_of("digits").train
    shape = [0.05 * (1 + math.cos(math.pi * (epoch - 1) / 11)) / 2 for epoch in range(1, 12)]
    assert [first for first, _ in rates_of(train)] == pytest.approx([0, *shape])


@pytest.mark.parametrize(("name", "method"), some(*COMPANIONS, "kd+at", "iekd", "sokd", "dcm", "ce"))
def test_every_value_of_a_pair_arrives_and_has_a_source(name, method):
    text = recipe_text(name, method)
    written, effective = yaml.safe_load(text), flat(config_of(name, "--method", method))
    written = {key: [value] if key == "teacher" else value for key, value in written.items()}
    written.pop("method")
    assert {key: effective[key] for key in written} == written
    for line in text.splitlines():
        assert line.startswith("#") or re.search(r"  # (RepDistiller|mdistiller|ours|arXiv:\d)", line), line
    assert all(len(line) <= 120 for line in text.splitlines())


def test_the_settings_of_the_pairs():
    """mdistiller's configs/cifar100/dkd; RepDistiller's scripts/run_cifar_distill.sh."""
    betas = {name: yaml.safe_load(recipe_text(name, "dkd"))["beta"] for name in PAIRS}
    two = {"cifar100-240-resnet56-resnet20", "cifar100-240-resnet110-resnet32"}
    six = {f"cifar100-240-{pair}" for pair in ("wrn_40_2-wrn_16_2", "wrn_40_2-wrn_40_1", "vgg13-vgg8")}
    six |= {"cifar100-240-vgg13-mobilenetv2"}
    assert {name for name, beta in betas.items() if beta == 2} == two
    assert {name for name, beta in betas.items() if beta == 6} == six
    assert {name for name, beta in betas.items() if beta == 8} == betas.keys() - two - six
    at = yaml.safe_load(recipe_text("cifar100-240-vgg13-vgg8", "at"))
    assert at["attention_weight"] == 1000 and at["batch_size"] == 64 and at["pad_mode"] == "zeros"
    sp = yaml.safe_load(recipe_text("cifar100-240-vgg13-vgg8", "sp"))
    assert (sp["similarity_weight"], sp["features"]) == (3000, "maps")


def test_a_pair_says_that_its_teacher_has_another_learning_rate_than_the_published_one():
    """RepDistiller's train_teacher.py: 0.05 for every network."""
    for name in PAIRS:
        text = recipe_text(name)
        apart = yaml.safe_load(text)["lr"] != 0.05
        assert ("RepDistiller's teachers have 0.05" in text) == ("--lr 0.05; then --teacher-weights" in text) == apart


def test_published_figures_stand_where_the_readme_has_them():
    wrn = published(("wrn_40_2", "wrn_16_2"))
    assert (wrn["teacher"], wrn["ce"], wrn["kd"], wrn["at"], wrn["ft"]) == (75.61, 73.26, 74.92, 74.08, 73.25)
    vgg = published(("vgg13", "vgg8"))
    assert (vgg["teacher"], vgg["ce"], vgg["kd"], vgg["at"], vgg["ft"]) == (74.64, 70.36, 72.98, 71.43, 70.58)
    small = published(("resnet110", "resnet20"))
    assert (small["kd"], small["ft"]) == (70.67, 70.22) and "dkd" not in small
    assert len(FIGURES) == 13 and all(len(row) == 9 for row in FIGURES.values())


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
    status, out, _ = fastkd("train", "--recipe", "cifar100-sokd", "--data-dir", "D", "--epochs", "20", "--print-config")
    assert (
        status == 0 and "# recipe cifar100-sokd, made for 200 epochs, over 20: decay_milestones 100 150 -> 10 15" in out
    )
    effective = yaml.safe_load(out)
    assert effective["decay_milestones"] == [10, 15] and effective["bridge_lr"] == 0.1 and effective["data_dir"] == "D"


def test_each_of_the_papers_has_recipes():
    found = {(name.partition("-")[0], config_of(name).run.method) for name in RECIPES}
    assert {("cifar100", m) for m in ("kd", "dml", "iakd", "iekd", "sokd", "dcm")} <= found
    assert {("imagenet", m) for m in ("kd", "iakd", "iekd", "sokd", "dcm", "dkd", "dist")} <= found


@pytest.mark.parametrize(("weights", "epochs"), [("none_x/t.pth", 0), ("t.pth", 0), ("none", 3), ("t.pth none", 3)])
def test_weights_are_used_as_they_are_but_none_is_trained(tmp_path, weights, epochs):
    file, words = tmp_path / "c.yaml", weights.split()
    file.write_text("teacher_epochs: 3\n")
    given = ["--data", "DIR", "--teacher", *["resnet8"] * len(words), "--teacher-weights", *words]
    config = parse(["--config", str(file), *given], lambda line: None)
    assert config.networks.teacher_epochs == epochs


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cifar-dcm", ["did you mean 'cifar100-dcm'?"]),
        ("cifar100-sokk", ["did you mean 'cifar100-sokd'?"]),
        ("cifar100-240-resnet56-resnet2", ["did you mean 'cifar100-240-resnet56-resnet20'?", "`fastkd recipes` lists"]),
    ],
)
def test_a_name_that_does_not_exist(fastkd, name, words):
    check_refused(fastkd("train", "--recipe", name), *words)
    check_refused(fastkd("recipes", "--show", name), *words)


def test_the_list_has_every_recipe_and_its_figures(fastkd):
    status, out, _ = fastkd("recipes")
    assert status == 0 and all(name.removeprefix("cifar100-240-") in out for name in recipe_names())
    row = next(line for line in out.splitlines() if "resnet56-resnet20" in line)
    assert [float(word) for word in re.findall(r"\d\d\.\d\d", row)] == [72.34, 69.06, 70.66, 70.55, 69.84, 71.97]
    assert (
        "\ncifar100-dcm, published: error %, mean of 5 runs: alone 18.72, DML 17.89 | 17.95, DCM 16.61 | 16.65 (" in out
    )
    assert max(len(line) for line in out.splitlines() if line.startswith("│")) <= 80 and len(out.splitlines()) < 80


def test_networks_that_learn_together_are_in_the_order_of_their_figures():
    assert _row("cifar100-dcm-mobilenet")[2] == "wrn_28_10 | mobilenet"
    assert "alone 18.72 | 26.30" in _published("cifar100-dcm-mobilenet") and _published("cifar100-kd") == ""


def test_the_teacher_of_a_shorter_run_keeps_its_epochs_and_a_line_says_so():
    lines: list[str] = []
    words = ["--recipe", "cifar100-240-resnet56-resnet20", "--data-dir", "D", "--epochs", "24"]
    assert parse(words, lines.append).networks.teacher_epochs == 240
    assert "decay_milestones 150 180 210 -> 15 18 21, --teacher-epochs 240 is not changed" in lines[0]
    lines.clear()
    assert parse([*words, "--teacher-epochs", "9"], lines.append).networks.teacher_epochs == 9
    assert "teacher" not in lines[0]


@pytest.mark.parametrize(("method", "is_said"), [("kd", True), ("dml", False), ("ce", False)])
def test_the_teachers_epochs_are_named_only_where_there_is_a_teacher(method, is_said):
    lines: list[str] = []
    parse(["--method", method, "--student", "resnet8", "--epochs", "1"], lines.append)
    assert "recipe digits, made for 12 epochs, over 1" in lines[0]
    assert ("--teacher-epochs 12 is not changed" in lines[0]) == is_said


@pytest.mark.parametrize("name", ["cifar100-dcm", "imagenet-dkd-resnet34-resnet18", "cifar100-240-vgg13-vgg8"])
def test_what_is_shown_can_be_run_as_a_file(fastkd, name, tmp_path):
    status, out, _ = fastkd("recipes", "--show", name)
    assert status == 0
    (tmp_path / "r.yaml").write_text(out)
    place = ["--data-dir", "D"] if name.startswith("cifar100") else []
    by_file = parse(["--config", str(tmp_path / "r.yaml"), *place], lambda line: None)
    assert flat(by_file) == flat(parse(["--recipe", name, *place], lambda line: None))


def test_a_method_is_for_the_pairs(fastkd):
    status, out, _ = fastkd("recipes", "--show", "cifar100-240-vgg13-vgg8", "--method", "dkd+at")
    assert status == 0 and "dkd_beta: 6.0" in out and "at_attention_weight: 1000.0" in out
    check_refused(fastkd("recipes", "--show", "cifar100-240-vgg13-vgg8", "--method", "kdd"), "'kdd'")
    check_refused(fastkd("recipes", "--show", "cifar100-dcm", "--method", "kd"), "drop --method")
    check_refused(fastkd("recipes", "--method", "kd"), "drop --method")
