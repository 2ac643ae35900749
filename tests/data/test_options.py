"""DataOptions and the choice of the loader."""

import pytest
import torch

import fastkd.data
from fastkd.data import DataOptions, create_loaders
from fastkd.errors import UserError

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"loader": "dalli"}, r"loader='dalli'.*did you mean 'dali'"),
        ({"batch_size": 1}, "batch_size=1: give at least 2"),
        ({"image_size": 0}, "image_size=0: give at least 8"),
        ({"workers": -1}, "workers=-1: give at least 0"),
        ({"hw_decoder_load": 1.5}, "hw_decoder_load=1.5: give a fraction"),
        ({"mean": (0.5, 0.5)}, r"mean=\(0.5, 0.5\): give three finite numbers"),
        ({"mean": (0.5, 0.5, float("nan"))}, "mean=.*finite"),
        ({"std": (1.0, 0.0, 1.0)}, "std=.*above 0"),
        ({"synthetic_classes": 1}, "synthetic_classes=1"),
        ({"synthetic_samples": 1}, "synthetic_samples=1"),
    ],
)
def test_a_wrong_option_is_named_with_its_value(wrong, message):
    with pytest.raises(UserError, match=message) as caught:
        DataOptions(**wrong)
    assert "\n" not in str(caught.value)


def test_every_option_is_described():
    import ast
    import inspect

    body = ast.parse(inspect.getsource(DataOptions)).body[0].body
    fields = [i for i, node in enumerate(body) if isinstance(node, ast.AnnAssign)]
    assert len(fields) == len(DataOptions.__dataclass_fields__)
    assert all(isinstance(body[i + 1], ast.Expr) and isinstance(body[i + 1].value.value, str) for i in fields)


def test_auto_says_in_one_line_what_it_took(pictures, monkeypatch):
    monkeypatch.setattr(fastkd.data, "find_spec", lambda name: None)
    said = []
    train, _ = create_loaders(DataOptions(data=str(pictures), workers=0), CPU, log=said.append)
    assert type(train).__name__ == "FolderLoader"
    assert len(said) == 1 and "torchvision" in said[0] and "fastkd[dali]" in said[0]


def test_dali_that_is_not_installed_is_an_error_with_the_remedy(pictures, monkeypatch):
    monkeypatch.setattr(fastkd.data, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'fastkd\[dali\]'"):
        create_loaders(DataOptions(data=str(pictures), loader="dali"), CPU)


@pytest.mark.parametrize("data", ["digits", "synthetic"])
def test_a_decoder_for_data_without_files_is_an_error(data):
    with pytest.raises(UserError, match=f"loader='dali' decodes a folder.*data='{data}' needs none"):
        create_loaders(DataOptions(data=data, loader="dali"), CPU)
