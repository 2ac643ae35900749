"""DataOptions and the choice of the loader."""

import numpy as np
import pytest
import torch

from fastkd.data import DataOptions, create_eval_loader, create_loaders, dali_package
from fastkd.errors import UserError, as_typed

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"loader": "dalli"}, r"--loader must be one of .*, got 'dalli'.*did you mean 'dali'"),
        ({"batch_size": 1}, "--batch-size 1: give at least 2"),
        ({"image_size": 7}, "--image-size 7: give at least 8"),
        ({"workers": -1}, "--workers -1: give at least 0"),
        ({"hw_decoder_load": 1.5}, "--hw-decoder-load 1.5: give a fraction"),
        ({"mean": (0.5, 0.5)}, r"--mean 0.5 0.5: give three finite numbers"),
        ({"mean": (0.5, 0.5, float("nan"))}, "--mean .*finite"),
        ({"std": (1.0, 0.0, 1.0)}, "--std .*above 0"),
        ({"synthetic_classes": 1}, "--synthetic-classes 1"),
        ({"augment": "padcrop"}, r"--augment must be .*, got 'padcrop'.*did you mean 'pad-crop'"),
        ({"pad_mode": "zero"}, r"--pad-mode must be .*, got 'zero'.*did you mean 'zeros'"),
        ({"flip": "yes"}, "--flip must be one of auto, on, off, got 'yes'"),
        ({"pad": -2}, "--pad -2: give at least -1"),
        ({"augment": "rrc", "pad": 2}, "--pad 2 is for --augment pad-crop, and --augment is rrc: drop it"),
        ({"augment": "none", "pad_mode": "zeros"}, "--pad-mode zeros is for --augment pad-crop, and --augment is none"),
        (
            {"augment": "none", "flip": "on"},
            "--flip on changes nothing with --augment none: .* with --pad 0",
        ),
        ({"data": "folder", "loader": "dali", "augment": "pad-crop"}, "--augment pad-crop is for images in memory"),
        ({"data": "folder", "loader": "folder", "augment": "none"}, "--augment none is for images in memory"),
        ({"data": "folder", "loader": "folder", "pad": 1}, "--pad 1 is for images in memory"),
        ({"data": "cifar10"}, "--data cifar10 needs --data-dir DIR"),
        ({"data": "mnist", "data_dir": "x", "loader": "dali"}, "--loader dali decodes a folder"),
        ({"data": "mnist", "data_dir": "x", "val_fraction": 0.1}, "--val-fraction 0.1 is for a folder of images"),
        ({"data": "mnist", "data_dir": "x", "unlabelled": "y"}, "--unlabelled y is for a folder of images"),
        ({"data": "folder", "data_dir": "x"}, "--data-dir x is for --data cifar10.*a folder of images is --data x"),
        ({"data": "fashion_mnist", "data_dir": "x"}, "--data is 'fashion_mnist' .did you mean 'fashion-mnist'"),
        ({"data": "CIFAR-10", "data_dir": "x"}, "--data is 'CIFAR-10' .did you mean 'cifar10'"),
        ({"data": "digits", "data_dir": "x"}, "--data-dir x is for .* and --data is 'digits'"),
        ({"data": "folder", "download": True}, "--download is for"),
        ({"data": "synthetic", "flip": "off"}, "--flip off: --data synthetic is not augmented"),
        ({"data": "synthetic", "loader": "resident"}, "--loader resident holds real images"),
        ({"synthetic_samples": 1}, "--synthetic-samples 1"),
        ({"batch_size": "8"}, "--batch-size must be a whole number, got '8'"),
        ({"batch_size": 8.5}, "--batch-size must be a whole number, got 8.5"),
        ({"data": 3}, "--data must be text, a str, such as 'digits', got 3"),
        ({"flip": True}, "--flip must be one of auto, on, off, got True"),
        ({"exif": "no"}, "--exif must be True or False, got 'no'"),
        ({"mean": 0.5}, "--mean must be a tuple of values, got 0.5"),
        ({"std": ("1", "1", "1")}, "--std must be a number, got '1'"),
    ],
)
def test_a_wrong_option_is_named_with_its_value(wrong, message):
    with pytest.raises(UserError, match=message) as caught:
        DataOptions(**wrong)
    assert "\n" not in str(caught.value)


def test_paths_and_arrays_are_taken(tmp_path):
    options = DataOptions(data=tmp_path, batch_size=np.int64(8), mean=np.full(3, 0.5), std=[1, 1, 1])
    assert options.mean == (0.5, 0.5, 0.5) and options.std == (1.0, 1.0, 1.0) and options.data == str(tmp_path)


def test_every_option_is_described():
    import ast
    import inspect

    body = ast.parse(inspect.getsource(DataOptions)).body[0].body
    fields = [i for i, node in enumerate(body) if isinstance(node, ast.AnnAssign)]
    assert len(fields) == len(DataOptions.__dataclass_fields__)
    assert all(isinstance(body[i + 1], ast.Expr) and isinstance(body[i + 1].value.value, str) for i in fields)


@pytest.fixture
def no_dali(monkeypatch):
    monkeypatch.setattr(dali_package, "find_spec", lambda name: None)


@pytest.fixture
def broken_dali(monkeypatch):
    """DALI is installed, but one of its libraries is missing."""

    def broken(name):
        raise OSError("libnvjpeg.so.13: cannot open shared object file")

    monkeypatch.setattr(dali_package, "find_spec", lambda name: name)
    monkeypatch.setattr(dali_package.importlib, "import_module", broken)


def test_auto_says_in_one_line_what_it_took(pictures, no_dali):
    said = []
    train, val = create_loaders(DataOptions(data=str(pictures), workers=0), CPU, log=said.append)
    assert type(train).__name__ == type(val).__name__ == "FolderLoader" and train.train and not val.train
    assert len(said) == 2 and "torchvision" in said[0] and dali_package.install_command() in said[0]


@pytest.mark.parametrize("batch_size, world_size", [(28, 1), (1000, 1), (14, 2), (27, 1), (13, 2)])
def test_a_batch_of_more_than_all_training_images_is_said(pictures, batch_size, world_size):
    """It has them all: an epoch gives each image once."""
    said = []
    options = DataOptions(data=str(pictures), loader="folder", workers=0, batch_size=batch_size, image_size=32)
    train, _ = create_loaders(options, CPU, world_size=world_size, log=said.append)
    is_large = batch_size * world_size > 27
    assert len(train) == 1 and len(next(iter(train))[1]) == 27 // world_size
    assert len(said) == is_large and (not is_large or said[0].startswith(f"WARNING: --batch-size {batch_size}"))


def test_dali_that_is_not_installed_is_an_error_with_the_remedy(pictures, no_dali):
    with pytest.raises(UserError, match=r"--loader dali.*pip install 'fastkd\[dali.*--loader folder"):
        create_loaders(DataOptions(data=str(pictures), loader="dali"), CPU)


def test_auto_takes_torchvision_if_dali_cannot_be_imported_and_says_why(pictures, broken_dali):
    said = []
    train, _ = create_loaders(DataOptions(data=str(pictures), workers=0), CPU, log=said.append)
    assert type(train).__name__ == "FolderLoader"
    assert len(said) == 2 and "torchvision" in said[0] and "OSError: libnvjpeg.so.13" in said[0]


def test_dali_that_cannot_be_imported_is_an_error_if_it_was_asked_for(pictures, broken_dali):
    with pytest.raises(UserError, match=r"--loader dali.*libnvjpeg.*--loader folder"):
        create_loaders(DataOptions(data=str(pictures), loader="dali"), CPU)


def test_the_folder_loader_asks_no_process(pictures, broken_dali):
    def gather(thing):
        raise AssertionError

    create_loaders(DataOptions(data=str(pictures), loader="folder", workers=0), CPU, log=print, gather=gather)


@pytest.mark.parametrize("data", ["digits", "synthetic"])
def test_a_decoder_for_data_without_files_is_an_error(data):
    with pytest.raises(UserError, match=f"--loader dali decodes a folder.*--data {data} is none"):
        create_loaders(DataOptions(data=data, loader="dali"), CPU)


def test_the_folder_of_a_set_s_name_is_pointed_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cifar100").mkdir()
    with pytest.raises(UserError, match=r"needs --data-dir DIR.*--data \./cifar100"):
        DataOptions(data="cifar100")


@pytest.mark.parametrize("more", [{}, {"augment": "rrc"}, {"flip": "on"}, {"augment": "rrc", "flip": "off"}])
def test_what_a_decoding_loader_does_may_be_said(pictures, more):
    options = DataOptions(data=str(pictures), loader="folder", workers=0, **more)
    assert create_loaders(options, CPU)[0].name == "folder"


@pytest.mark.parametrize("given", [{"augment": "none"}, {"pad": 2}, {"pad_mode": "zeros"}, {"flip": "on"}])
def test_evaluation_refuses_options_of_the_augmentation(given):
    with pytest.raises(UserError, match=f"^{as_typed(*next(iter(given.items())))} is for training"):
        create_eval_loader(DataOptions(**given), CPU)


def test_the_digits_ignore_another_size_and_say_so():
    said = []
    train, _ = create_loaders(DataOptions(image_size=224), CPU, log=said.append)
    assert train.image_size == 32 and "--image-size 224 is not used" in said[0]
