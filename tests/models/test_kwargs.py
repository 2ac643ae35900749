"""--model-kwargs and --teacher-kwargs: arguments of a network's constructor."""

from dataclasses import replace

import pytest
import yaml

from fastkd import create_model
from fastkd.cli import main
from fastkd.commands.networks import kwargs_of
from fastkd.errors import UserError
from fastkd.models.kwargs import parse_kwargs
from fastkd.network_options import NetworkOptions
from fastkd.weights_file import read_about


def test_values_are_python_literals_or_text():
    words = ("drop_path_rate=0.1", "depths=(1, 1)", "act_layer=gelu", "zero_init_last=False")
    assert parse_kwargs(words) == {
        "drop_path_rate": 0.1, "depths": (1, 1), "act_layer": "gelu", "zero_init_last": False,
    }  # fmt: skip


WRONG = [
    (("drop_path_rate",), "'drop_path_rate': give NAME=VALUE"),
    (("a=1", "a=2"), "a is given twice"),
    (("checkpoint_path=evil.pt",), "checkpoint_path=evil.pt: give the weights by their own option"),
    (("num_classes=3",), "num_classes=3: the data have their classes"),
]


@pytest.mark.parametrize(("words", "message"), WRONG)
def test_wrong_words_are_one_line(words, message):
    with pytest.raises(UserError, match=message):
        parse_kwargs(words)


RATES = [("timm/resnet10t", "drop_path_rate", "drop_prob"), ("torchvision/convnext_tiny", "stochastic_depth_prob", "p")]


@pytest.mark.parametrize(("name", "argument", "attribute"), RATES)
def test_the_network_gets_them(name, argument, attribute):
    net = create_model(name, 3, image_size=32, kwargs={argument: 0.3})
    layers = [each for each in net.modules() if type(each).__name__ in ("DropPath", "StochasticDepth")]
    assert max(getattr(each, attribute) for each in layers) == pytest.approx(0.3)


UNKNOWN = [
    ("timm/resnet18", {"drop_path": 0.1}, "timm/resnet18 has no argument drop_path.*it has .*drop_path_rate"),
    ("torchvision/resnet18", {"foo": 1}, "torchvision/resnet18 has no argument foo; it has .*zero_init_residual"),
    ("timm/resnet18", {"drop_path_rate": "much"}, "timm/resnet18 cannot be made with drop_path_rate=much"),
    ("timm/mobileone_s0", {"foo": 1}, "timm/mobileone_s0 cannot be made with foo=1.*it has .*drop_path_rate"),
    ("resnet20", {"foo": 1}, r"resnet20 takes no arguments \(foo\): they are for networks of timm and torchvision"),
]


@pytest.mark.parametrize(("name", "kwargs", "words"), UNKNOWN)
def test_what_a_network_does_not_take_is_refused_with_what_it_takes(name, kwargs, words):
    with pytest.raises(UserError, match=words) as error:
        create_model(name, 3, image_size=32, kwargs=kwargs)
    assert "\n" not in str(error.value)


def test_a_run_keeps_them_and_an_evaluation_reads_them_again(tmp_path, capsys, monkeypatch):
    def fastkd(*arguments):
        monkeypatch.setattr("sys.argv", ["fastkd", *arguments])
        main()

    out, kwargs = tmp_path / "run", ["channels=(8, 8, 16, 16)", "drop_path_rate=0.1"]
    common = ["--student", "timm/resnet10t", "--epochs", "1", "--batch-size", "512", "--device", "cpu"]
    fastkd("train", "--method", "ce", *common, "--model-kwargs", *kwargs, "--out", str(out))
    assert yaml.safe_load((out / "config.yaml").read_text())["model_kwargs"] == kwargs
    weights = out / "student.safetensors"
    assert read_about(weights)["kwargs"] == kwargs
    for file in (weights, out / "best.pt"):
        fastkd("eval", "--weights", str(file), "--device", "cpu")
        assert "timm/resnet10t" in capsys.readouterr().out
    names, lines = NetworkOptions(teacher=("timm/resnet10t",), teacher_weights=(str(weights),)), []
    assert kwargs_of(names, str(weights), lines.append) == tuple(kwargs)
    assert lines == [f"--teacher-kwargs {' '.join(kwargs)}, as the weights {weights} note"]
    given = replace(names, teacher_kwargs=("drop_rate=0.2",))
    assert kwargs_of(given, str(weights), lines.append) == ("drop_rate=0.2",) and len(lines) == 1
    with pytest.raises(UserError, match="does not fit timm/resnet10t"):
        create_model("timm/resnet10t", 10, weights)
