"""Sizes of the training crops: the schedule, the loaders that follow it, and networks that cannot."""

import sys

import pytest
import torch
import yaml

from fastkd.data import DataOptions, create_loaders
from fastkd.data.order import ONE_PROCESS
from fastkd.data.resident import Augmentation, ResidentLoader, ResidentSet
from fastkd.data.train_size import TrainSizes
from fastkd.engine import TrainOptions
from fastkd.errors import UserError
from fastkd.methods import METHODS
from fastkd.models import create_model
from fastkd.train import Trainer

CPU = torch.device("cpu")


def sizes(text, epochs):
    found = TrainSizes.parse(text)
    return [TrainSizes(found.first, found.last, found.step, epochs).size_of(epoch) for epoch in range(epochs + 1)]


@pytest.mark.parametrize(
    ("text", "epochs", "wanted"),
    [
        ("160:224", 3, [160, 192, 224, 224]),
        ("160:224", 1, [224, 224]),
        ("160:224", 2, [160, 224, 224]),
        ("160:224", 6, [160, 160, 192, 192, 224, 224, 224]),
        ("160", 3, [160] * 4),
        ("100", 2, [100] * 3),
        ("24:32:4", 5, [24, 28, 28, 32, 32, 32]),
        ("224:224", 2, [224] * 3),
    ],
)
def test_the_schedule(text, epochs, wanted):
    assert sizes(text, epochs) == wanted


@pytest.mark.parametrize("epochs", [2, 3, 7, 90])
def test_it_grows_from_first_to_last_in_steps(epochs):
    found = sizes("128:256:16", epochs)
    assert found[0] == 128 and found[epochs - 1 :] == [256, 256]
    assert found == sorted(found) and all(side % 16 == 0 for side in found)
    line = [128 + 128 * epoch / (epochs - 1) for epoch in range(epochs)]
    assert all(abs(side - want) <= 8 for side, want in zip(found, line, strict=False))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("224:160", "grow"),
        ("a", "such as 160"),
        ("160:", "such as 160"),
        ("1:2:3:4", "such as 160"),
        ("-160", "such as 160"),
        ("160:224:0", "steps of 1"),
        ("0", "begin at 8"),
        ("150:224", "give 160:224"),
        ("160.5", "such as 160"),
        ("٣٢", "such as 160"),
    ],
)
def test_what_is_no_size_is_an_error(text, words):
    with pytest.raises(UserError, match=words):
        DataOptions(train_size=text)


def loaders(root, epochs=3, workers=0, **more):
    options = DataOptions(data=str(root), workers=workers, batch_size=8, image_size=64, train_size="32:64:16", **more)
    return create_loaders(options, CPU, epochs=epochs, log=lambda line: None)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_folder_loader_gives_each_epoch_its_size(pictures, workers):
    train, val = loaders(pictures, loader="folder", workers=workers)
    assert train.image_size == val.image_size == 64
    for wanted in (32, 48, 64, 64):
        assert {images.shape[2:] for images, _ in train} == {(wanted, wanted)}
        assert next(iter(val))[0].shape[2:] == (64, 64)


def test_a_resumed_loader_gives_the_same_images(pictures):
    train, resumed = (loaders(pictures, loader="folder")[0] for _ in range(2))
    list(train)
    resumed.load_state_dict({"loader": "folder", "epoch": 1, "step": 1})
    for (images, _), (again, _) in zip(list(train)[1:], resumed, strict=True):
        assert images.shape[2] == 48 and torch.equal(images, again)


def test_a_size_that_stays_changes_no_image(pictures):
    """The crop at the last size is the one without train_size."""
    grown = loaders(pictures, epochs=1, loader="folder")[0]
    usual = create_loaders(
        DataOptions(data=str(pictures), loader="folder", workers=0, batch_size=8, image_size=64), CPU
    )
    for (images, _), (others, _) in zip(grown, usual[0], strict=True):
        assert torch.equal(images, others)


def resident(kind="rrc", count=12, side=16):
    images = torch.randint(256, (count, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    held = ResidentSet(("a", "b"), images, torch.arange(count) % 2)
    more = {"train": True, "mean": (0.5,) * 3, "std": (0.5,) * 3, "image_size": side}
    return ResidentLoader(held, Augmentation(kind), 4, CPU, ONE_PROCESS, **more)


def test_resident_images_follow_it():
    loader = resident()
    loader.train_sizes = TrainSizes(8, 16, 4, epochs=3)
    assert [{images.shape[2] for images, _ in loader} for _ in range(3)] == [{8}, {12}, {16}]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"data": "digits"}, "--augment rrc"),
        ({"data": "synthetic", "synthetic_samples": 8, "image_size": 8}, "'synthetic'"),
    ],
)
def test_loaders_that_cannot_follow_refuse(options, words):
    with pytest.raises(UserError, match=words):
        create_loaders(DataOptions(train_size="16", **options), CPU, log=lambda line: None)


@pytest.mark.parametrize(
    ("text", "views", "epochs", "is_right"),
    [
        ("16:32:8", 2, 3, False),
        ("16:32:8", 3, 3, True),
        ("16:32:8", 9, 3, True),
        ("16", 1, 3, True),
        ("16:32:8", 0, 3, True),
    ],
)
def test_a_view_has_one_size(text, views, epochs, is_right):
    """What a teacher said of a view of 16 pixels is not its answer to that view of 32."""
    options = DataOptions(data="digits", augment="rrc", train_size=text, views=views)
    if is_right:
        create_loaders(options, CPU, epochs=epochs, log=lambda line: None)
        return
    with pytest.raises(UserError, match=f"give --views {epochs}"):
        create_loaders(options, CPU, epochs=epochs, log=lambda line: None)


def test_the_digits_follow_it_with_random_resized_crops():
    lines = []
    options = DataOptions(data="digits", augment="rrc", train_size="16:32:8", batch_size=500)
    train, val = create_loaders(options, CPU, epochs=3, log=lines.append)
    assert [next(iter(train))[0].shape[2], train.size_of(1), train.size_of(2)] == [16, 24, 32]
    assert next(iter(val))[0].shape[2] == val.size_of(0) == 32
    assert any("16, 24, 32 pixels over 3 epochs" in line for line in lines)


def small_run(tmp_path, net, epochs=3, **more):
    train, val = resident(side=32), resident("none", side=32)
    train.train_sizes = TrainSizes(16, 32, 8, epochs)
    val.train = False
    options = TrainOptions(epochs=epochs, lr=0.01, out=str(tmp_path), device="cpu", **more)
    return Trainer(METHODS["ce"](net), train, val, options)


def test_a_run_is_resumed_with_the_same_sizes(tmp_path, monkeypatch):
    net = lambda: torch.manual_seed(0) and create_model("resnet8", 2)  # noqa: E731
    whole = small_run(tmp_path / "whole", net()).fit()
    finish = Trainer._finish_epoch

    def stop_after_two(trainer):
        finish(trainer)
        if trainer.epoch == 2:
            raise InterruptedError

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(Trainer, "_finish_epoch", stop_after_two)
        small_run(tmp_path / "cut", net()).fit()
    resumed = small_run(tmp_path / "cut", net(), resume=True).fit()
    assert whole.student.read_bytes() == resumed.student.read_bytes()


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_network_of_one_size_is_refused_before_anything_is_written(tmp_path, role, monkeypatch):
    pytest.importorskip("timm")
    from fastkd.commands.train import run

    monkeypatch.chdir(tmp_path)
    fixed, other = "timm/visformer_tiny", "resnet8"
    student, teacher = (fixed, other) if role == "student" else (other, fixed)
    words = ["--data", "digits", "--augment", "rrc", "--train-size", "16:32:8", "--epochs", "3", "--no-baseline"]
    words += ["--student", student, "--teacher", teacher, "--teacher-epochs", "1", "-b", "200", "--out", "run"]
    with pytest.raises(UserError, match=rf"train_size does not fit, drop it: at 16 pixels, .*{role}.*visformer"):
        run(words)
    assert not (tmp_path / "run").exists()


def test_the_configuration_keeps_the_size_of_evaluation(tmp_path, monkeypatch, few_digits, fastkd):
    words = ["--data", "digits", "--augment", "rrc", "--train-size", "16:32:8", "--epochs", "2", "--no-baseline"]
    words += ["--method", "ce", "--student", "resnet8", "-b", "200", "--out", "run"]
    status, out, err = fastkd("train", *words)
    assert status == 0, err
    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert config["image_size"] == 32 and config["train_size"] == "16:32:8"
    assert "training crops of 16, 32 pixels over 2 epochs" in out.replace("\n", " ")


@pytest.mark.parametrize("text", ["24:32", "24:32:4", "'24:32'", "160", "160:224", '""'])
def test_a_yaml_file_may_leave_out_the_quotes(tmp_path, text):
    """In YAML 1.1, 24:32 is a number of base 60."""
    from fastkd.config import parse

    (tmp_path / "o.yaml").write_text(f"data: digits\ntrain-size: {text}\n")
    try:
        found = parse(["--config", str(tmp_path / "o.yaml")], lambda line: None).data.train_size
    except UserError as error:  # 24 is no multiple of 32
        assert text.strip("'") == "24:32" and "--train-size 24:32:" in str(error)
    else:
        assert found == text.strip("'\"")


def test_a_compiled_teacher_is_compiled_for_each_size(monkeypatch):
    from fastkd.engine.teacher_forms import TeacherForm

    compiled = []
    monkeypatch.setattr(torch, "compile", lambda run, **_: lambda x: compiled.append(x.shape[2]) or run(x))
    form = TeacherForm([torch.nn.AdaptiveAvgPool2d(1)], torch.float32, False, compiled=True)
    for count, side in ((4, 16), (4, 16), (3, 16), (4, 24)):
        form(torch.zeros(count, 3, side, side))
    assert compiled == [16, 16, 24]


@pytest.mark.parametrize("text", ["", "32:64:16"])
def test_a_folder_is_read_without_dali(pictures, monkeypatch, text):
    monkeypatch.setitem(sys.modules, "fastkd.data.dali", None)  # its import fails, as without DALI
    monkeypatch.setattr("fastkd.data.dali_start.import_problem", lambda: "is not installed")
    options = DataOptions(data=str(pictures), workers=0, batch_size=8, image_size=64, train_size=text)
    train, _ = create_loaders(options, CPU, epochs=3, log=lambda line: None)
    assert train.name == "folder" and train.size_of(0) == (32 if text else 64)
