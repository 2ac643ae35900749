"""Wrong kinds of arguments in Python: one clear error, before anything is trained."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from tiny import TinyLoader, TinyNet
from torch import nn

from fastkd import Trainer, TrainOptions, create_model
from fastkd.callbacks import Callbacks
from fastkd.data import DataOptions
from fastkd.data.preprocess import Preprocess
from fastkd.errors import UserError
from fastkd.methods import CE, DML, IAKD, KD, SOKD
from fastkd.trained import names_of
from fastkd.weights_file import read_about


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: TrainOptions(epochs="3"), "--epochs must be a whole number, got '3'"),
        (lambda: TrainOptions(lr=True), "--lr must be a number, got True"),
        (lambda: TrainOptions(sched="cos"), "--sched must be one of .*, got 'cos' .did you mean 'cosine'"),
        (lambda: TrainOptions(log="csv"), r"--log must be a tuple of values, got 'csv'"),
        (lambda: TrainOptions(decay_milestones=iter((1.0, 2.0))), "--decay-milestones must be a tuple of values"),
        (lambda: TrainOptions(log=("cvs",)), "--log must be one of .*got 'cvs'"),
        (lambda: TrainOptions(out=3), "--out must be text, a str.*, got 3"),
        (lambda: DataOptions(data=3), "--data must be text, a str.*, got 3"),
        (lambda: DataOptions(data=None), "--data must be text, a str.*, got None"),
        (lambda: TrainOptions(channels_last="no"), "--channels-last must be True or False, got 'no'"),
        (lambda: TrainOptions(opt=torch.optim.AdamW), "--opt must be text, a str, such as 'sgd', got <class .*AdamW"),
        (lambda: TrainOptions(device=torch.device("cpu")), "--device must be text, a str, such as 'auto', got device"),
        (lambda: TrainOptions(checkpoint_every=2.5), "--checkpoint-every must be text, a str, such as '10m', got 2.5"),
    ],
)
def test_options_of_training(make, words):
    with pytest.raises(UserError, match=words):
        make()


def test_a_path_is_as_good_as_its_name(tmp_path):
    assert DataOptions(data=tmp_path, file_list=tmp_path / "a") == DataOptions(str(tmp_path), file_list=f"{tmp_path}/a")
    assert TrainOptions(out=tmp_path).out == tmp_path
    assert DataOptions(data_dir=None) == DataOptions() and not TrainOptions(out=None).out


@pytest.mark.parametrize("classes", [["a", "b", "a", "c"], None])
def test_two_classes_of_one_name_get_the_numbers_of_their_labels(classes, tmp_path, capsys):
    """As of ImageNet, which has two classes called crane. A weights file with one name twice could not be read."""
    loader = TinyLoader()
    batches = [(loader.images[:8], loader.target[:8])]
    train = DataSetLoader(batches) if classes is None else batches
    options = TrainOptions(epochs=1, out=str(tmp_path / "run"), report=False, device="cpu")
    result = Trainer(CE(TinyNet()), train, batches, options, classes=classes).fit()
    assert read_about(result.student)["data"]["classes"] == ["a (0)", "b", "a (2)", "c"]
    assert "classes of one name get the number of their label: a (0), a (2)" in capsys.readouterr().out


def test_a_class_is_typed_once():
    with pytest.raises(UserError, match="^--classes name 1 class more than once, such as 'a'"):
        names_of(["a", "b", "a"])


class DataSetLoader(list):
    """Batches with the names of a data set."""

    classes = ("a", "b", "a", "c")


@pytest.mark.parametrize(
    "kind, options, words",
    [
        (IAKD, {"schedule": "unifrom"}, "--schedule must be one of .*did you mean 'uniform'"),
        (IAKD, {"gates": "stag"}, "--gates must be one of stage, block, got 'stag'"),
        (SOKD, {"teacher_bn": "foo"}, "--teacher-bn must be one of eval, batch, got 'foo'"),
        (KD, {"standardize": "yes"}, "--standardize must be True or False, got 'yes'"),
    ],
)
def test_options_of_methods(kind, options, words):
    nets = [create_model("resnet8", 4) for _ in range(2)]
    with pytest.raises(UserError, match=words):
        kind(*nets, kind.Options(**options))


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: KD(TinyNet(), "resnet20"), "the teacher of KD must be a network.* got a str: 'resnet20'"),
        (lambda: DML(TinyNet(), peers=TinyNet()), "peers of DML must be a list of networks, got a TinyNet"),
        (lambda: KD({}, TinyNet()), "the student of KD must be a network.* got a dict"),
        (
            lambda: KD(TinyNet(), TinyNet(), {"temperature": 3}),
            r"made by KD.Options\(...\), got a dict",
        ),
        (lambda: KD(TinyNet(), TinyNet(), IAKD.Options()), "made by KD.Options.* got a IAKDOptions"),
        (lambda: Trainer(TinyNet(), [], [], TrainOptions(epochs=1)), "the trainer needs a method, got a TinyNet: "),
        (lambda: Trainer(CE(TinyNet()), [], [], {"epochs": 1}), "the trainer needs TrainOptions, got a dict: "),
    ],
)
def test_networks_and_options_of_the_wrong_class(make, words):
    with pytest.raises(UserError, match=words):
        make()


def test_a_refused_trainer_leaves_no_folder(tmp_path, monkeypatch, tiny_loaders):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="callbacks holds"):
        Trainer(CE(TinyNet()), *tiny_loaders(), TrainOptions(epochs=1), callbacks=[3])

    def refuse(*given, **named):
        raise UserError("no step")

    monkeypatch.setattr("fastkd.train.Step", refuse)
    with pytest.raises(UserError, match="no step"):
        Trainer(CE(TinyNet()), *tiny_loaders(), TrainOptions(epochs=1, device="cpu"))
    assert not any(tmp_path.iterdir())


def test_numbers_of_numpy_and_other_iterables_are_taken():
    options = TrainOptions(sched="multistep", epochs=np.int64(90), decay_milestones=range(30, 90, 30), lr=np.float32(1))
    assert options.drops == range(30, 90, 30)
    assert TrainOptions(checkpoint_every=500, out=Path("runs")).checkpoint_every == "500"
    assert TrainOptions(channels_last=np.bool_(True)).memory_format == torch.channels_last
    assert len(DML(TinyNet(), peers=nn.ModuleList([TinyNet()])).peers) == 1


def test_options_of_a_method_of_ones_own_have_any_kinds():
    @dataclass(frozen=True)
    class Own:
        pair: tuple[int, str] = (1, "a")
        none: tuple[()] = ()
        level: Literal[1, 2] = 2
        later: "OnlyForTypeCheckers" = 3  # noqa: F821

    class Odd(CE):
        Options = Own

    assert Odd(TinyNet()).options.pair == (1, "a")
    Own.__annotations__.pop("later")
    with pytest.raises(UserError, match="--level must be one of 1, 2, got 3"):
        Odd(TinyNet(), options=Own(level=3))
    with pytest.raises(UserError, match="made by Odd.Options"):
        Odd(TinyNet(), options=Own)


def test_callbacks_that_would_never_be_called():
    class Misspelt:
        def on_step(self, step):
            pass

        def on_epoch_end(self, epoch):
            pass

        def _on_end(self):
            pass

    with pytest.raises(UserError, match="Misspelt.on_epoch_end would never be called: did you mean on_epoch"):
        Callbacks([Misspelt()])
    Misspelt.on_epoch = Misspelt.on_step  # an object that serves another trainer as well
    Callbacks([Misspelt()])
    with pytest.raises(UserError, match="callbacks must be a list of objects, got a Misspelt"):
        Callbacks(Misspelt())


def test_images_that_are_not_what_a_picture_is_read_as():
    with pytest.raises(UserError, match=r"normalise takes uint8 \[N, H, W, 3\].* torch.float32 \[2, 3, 8, 8\]"):
        Preprocess(8, 8, (0.5,) * 3, (0.5,) * 3).normalise(torch.rand(2, 3, 8, 8))
