"""Checkpoints as other codes write them: each is renamed here by hand, and gives equal logits or one line."""

import argparse
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastkd.errors import UserError
from fastkd.models import create_model, layout_note_of, load_weights
from fastkd.models.zoo import hidden_kernels

State = dict[str, Tensor]


def trained(name: str, seed: int = 1) -> nn.Module:
    """A network whose statistics are not 0 and 1."""
    torch.manual_seed(seed)
    net = create_model(name, 7)
    net(torch.randn(4, 3, 32, 32))
    return net.eval()


def below(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


def renamed(state: State, *pairs: tuple[str, str]) -> State:
    for old, new in pairs:
        state = {re.sub(old, new, key): value for key, value in state.items()}
    return state


def functional(state: State) -> State:
    """A Wide ResNet's keys in Zagoruyko's functional code."""
    names = {"bn1": "bn0", "bn2": "bn1", "conv1": "conv0", "conv2": "conv1", "convShortcut": "convdim"}
    table = {}
    for key, value in state.items():
        if key.endswith("num_batches_tracked"):
            continue
        parts = key.split(".")
        if parts[0].startswith("block"):
            group, _, block, layer, *rest = parts
            new = [f"group{int(group[5:]) - 1}", f"block{block}", names[layer], *rest]
            table[".".join(new if "bn" in layer else new[:3])] = value
        else:
            table[{"conv1.weight": "conv0"}.get(key, key.replace("bn1.", "bn."))] = value
    return table


def options() -> argparse.Namespace:
    return argparse.Namespace(model_s="resnet8", lr=0.05, path=Path("/x"))


def numbers() -> dict:
    return {"acc": np.float64(93.4), "epoch": np.int64(159), "best": np.float32(0.5), "done": np.bool_(True)}


def heads(prefix: str = "") -> State:
    return {f"{prefix}ep1_bn.weight": torch.ones(3), f"{prefix}ep2_fc.weight": torch.ones(3, 3)}


LAYOUTS = {  # network, the content of the file by its state dict, a word of the line that says how it was read
    "RepDistiller": ("resnet8", lambda s: {"opt": options(), "model": s}, "model"),
    "RepDistiller's best": ("vgg8", lambda s: {"epoch": 3, "model": s, "best_acc": torch.tensor(71.0)}, "model"),
    "RepDistiller's ShuffleNet": ("shufflenet_v2", lambda s: {"model": s, "accuracy": torch.tensor(1.0)}, "model"),
    "mdistiller's student_best": ("wrn_16_1", lambda s: {"model": s}, "model"),
    "mdistiller's latest": (
        "resnet8",
        lambda s: {
            "epoch": 1,
            "model": below("module.student.", s) | below("module.teacher.", trained("wrn_10_1").state_dict()),
            "optimizer": {"state": {}, "param_groups": [{"lr": 0.05}]},
            "best_acc": np.float64(1.0),
        },
        "student of a whole distiller",
    ),
    "a teacher beside a student": (
        "resnet8",
        lambda s: {"model": below("module.teacher.", s) | below("module.student.", trained("wrn_10_1").state_dict())},
        "teacher of a whole distiller",
    ),
    "SOKD": (
        "resnet8",
        lambda s: s | {"auxiliary_layer3.0.conv1.weight": torch.ones(2), "auxiliary_fc.bias": torch.ones(1)},
        "SOKD's code",
    ),
    "IE-KD": (
        "resnet14",
        lambda s: {"net": renamed(s, (r"downsample\.", "shortcut."), (r"^fc\.", "linear.")), **numbers()},
        "IE-KD's code",
    ),
    "IE-KD, numbers beside the weights": (
        "resnet8",
        lambda s: renamed(s, (r"downsample\.", "shortcut."), (r"^fc\.", "linear.")) | numbers(),
        "IE-KD's code",
    ),
    "DCM's Wide ResNet": (
        "wrn_16_2",
        lambda s: {"params": functional(s) | heads(), "epoch": 3, "optimizer": {"state": {}}},
        "functional Wide ResNet",
    ),
    "Zagoruyko's old names": (
        "wrn_16_1",
        lambda s: {"params": {key.replace(".", "-"): value for key, value in functional(s).items()}},
        "functional Wide ResNet",
    ),
    "DCM's MobileNet": ("mobilenet", lambda s: {"params": s | heads()}, "DCM's code"),
    "DCM's MobileNet under DataParallel": ("mobilenet", lambda s: below("module.", s | heads()), "DCM's code"),
    "Lightning": (
        "resnet8",
        lambda s: {
            "state_dict": below("model.", s) | {"criterion.weight": torch.ones(7)},
            "epoch": 3,
            "pytorch-lightning_version": "2.5",
            "hyper_parameters": {"lr": 0.1, "path": Path("/x")},
            "callbacks": {},
        },
        "model of a whole distiller or Lightning module; 1 other keys",
    ),
    "Lightning's student": ("resnet8", lambda s: {"state_dict": below("student.", s)}, "student"),
    "Lightning's student in DDP": ("resnet8", lambda s: {"state_dict": below("student.module.", s)}, "student"),
    "a name of one's own": (
        "resnet8",
        lambda s: {"state_dict": below("classifier.", s)},
        "all keys below 'classifier'",
    ),
    "timm": ("resnet8", lambda s: {"epoch": 2, "arch": "resnet8", "state_dict": s, "args": options()}, "state_dict"),
    "timm's averages alone": ("resnet8", lambda s: {"state_dict_ema": below("module.", s)}, "state_dict_ema"),
    "torchvision's references": (
        "resnet8",
        lambda s: {"model": s, "model_ema": below("module.", s) | {"n_averaged": torch.tensor(3)}, "args": options()},
        "model",
    ),
    "torchvision's averages alone": (
        "resnet8",
        lambda s: {"model_ema": below("module.", s) | {"n_averaged": torch.tensor(3)}},
        "averaged",
    ),
    "one table of unknown name": ("resnet8", lambda s: {"my_weights": s, "epoch": 3}, "my_weights"),
}


FILES = [*((name, "ckpt.pth") for name in LAYOUTS), ("mdistiller's student_best", "student_best")]
FILES += [("mdistiller's latest", "latest"), ("DCM's Wide ResNet", "model.pt7"), ("Lightning", "epoch=3-step=9.ckpt")]


@pytest.mark.parametrize(("name", "file"), FILES)
def test_equal_logits_and_one_line(name, file, tmp_path):
    kind, content, says = LAYOUTS[name]
    net = trained(kind)
    torch.save(content(net.state_dict()), tmp_path / file)
    found = create_model(kind, 7, tmp_path / file).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(found(x), net(x))
    assert says in layout_note_of(found) and "\n" not in layout_note_of(found)


def first_key(content) -> list:
    """The path to a table of weights and one of its keys, that of a tensor of the network."""
    path = []
    while isinstance(content, dict) and not any(
        isinstance(value, Tensor) and value.dim() > 1 for value in content.values()
    ):
        inner = [key for key, value in content.items() if isinstance(value, dict) and value]
        wanted = [key for key in inner if key in ("model", "state_dict", "params", "net")]
        path.append((wanted or inner)[0])
        content = content[path[-1]]
    return [*path, next(key for key, value in content.items() if isinstance(value, Tensor) and value.dim() > 1)]


@pytest.mark.parametrize("name", LAYOUTS)
def test_one_changed_key_is_refused_by_name(name, tmp_path):
    kind, make, _ = LAYOUTS[name]
    content = make(trained(kind).state_dict())
    *path, key = first_key(content)
    table = content
    for part in path:
        table = table[part]
    changed = f"{key}_x"
    table[changed] = table.pop(key)
    torch.save(content, tmp_path / "net.pth")
    net = create_model(kind, 7)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(UserError) as error:
        load_weights(net, tmp_path / "net.pth")
    line = str(error.value)
    assert changed.rsplit(".", 2 if "." in changed else 0)[-1] in line and "missing 1: " in line, line
    assert "unexpected 1: " in line and "\n" not in line
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_one_changed_shape_is_refused_by_name(tmp_path):
    state = functional(trained("wrn_16_2").state_dict())
    state["group1.block0.convdim"] = torch.zeros(64, 32, 3, 3)
    torch.save({"params": state}, tmp_path / "net.pt7")
    words = r"nearest layout: functional Wide ResNet.*different 1: block2.layer.0.convShortcut.weight"
    with pytest.raises(UserError, match=words + r" \(file float32 \[64, 32, 3, 3\]"):
        create_model("wrn_16_2", 7, tmp_path / "net.pt7")


def test_both_parts_of_a_distiller_may_fit(tmp_path):
    student, teacher = trained("resnet8", 1), trained("resnet8", 2)
    table = below("module.student.", student.state_dict()) | below("module.teacher.", teacher.state_dict())
    torch.save({"model": table}, tmp_path / "latest")
    net = create_model("resnet8", 7, tmp_path / "latest")
    assert torch.equal(net.fc.weight, student.fc.weight)
    assert "teacher of a whole distiller or Lightning module would fit too" in layout_note_of(net)


def test_two_names_of_one_layout_are_no_choice(tmp_path):
    """The same tensors under the same keys: there is nothing to warn of."""
    state = trained("resnet8").state_dict()
    torch.save({"state_dict": below("model.", state)}, tmp_path / "net.ckpt")
    torch.save({"params": dict(state) | {"ep1_fc.weight": torch.ones(2)}}, tmp_path / "net.pt7")
    for name, words in (("net.ckpt", "layout: model of a whole"), ("net.pt7", "layout: DCM's code")):
        note = layout_note_of(create_model("resnet8", 7, tmp_path / name))
        assert words in note and "would fit too" not in note


def test_a_new_classifier_with_a_layout(tmp_path):
    net = trained("resnet8")
    table = renamed(net.state_dict(), (r"downsample\.", "shortcut."), (r"^fc\.", "linear."))
    torch.save({"net": table}, tmp_path / "net.pth")
    found = create_model("resnet8", 5, tmp_path / "net.pth", new_classifier=True)
    assert torch.equal(found.layer3[0].downsample[0].weight, net.layer3[0].downsample[0].weight)
    start = r"net.pth is for 7 classes, and resnet8 for 5 classes \(nearest layout: .*; only the classifier"
    with pytest.raises(UserError, match=start):
        create_model("resnet8", 5, tmp_path / "net.pth")


def test_safetensors_by_content(tmp_path):
    net = trained("resnet8")
    save_file(net.state_dict(), tmp_path / "weights")
    assert torch.equal(create_model("resnet8", 7, tmp_path / "weights").fc.weight, net.fc.weight)


@pytest.mark.parametrize("form", ["one file", "shards"])
def test_a_folder_of_transformers(tmp_path, form):
    """Its names differ from those of the module in this version."""
    pytest.importorskip("transformers")
    with hidden_kernels():  # the test runs beside the folder kernels/
        import transformers

        transformers.utils.is_kernels_available()
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=16,
        num_labels=7,
    )
    with hidden_kernels():  # the test runs beside the folder kernels/
        theirs = transformers.ViTForImageClassification(config).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="10KB" if form == "shards" else "5GB")
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 or form == "shards"
    x = torch.randn(2, 3, 32, 32)
    files = [tmp_path] if form == "shards" else [tmp_path, tmp_path / "model.safetensors"]
    for weights in files:
        ours = create_model(f"hf/{tmp_path}", 7, weights).eval()
        assert torch.equal(ours(x), theirs(pixel_values=x).logits)
    with pytest.raises(UserError, match="only the classifier differs"):
        create_model(f"hf/{tmp_path}", 5, tmp_path)
    fresh = create_model(f"hf/{tmp_path}", 5, tmp_path, new_classifier=True)
    assert fresh.classifier.out_features == 5


@pytest.mark.parametrize(
    ("name", "words"), [("../secret.safetensors", "files of its own folder alone"), (3, "no weights file .*/3")]
)
def test_an_index_that_names_no_file_of_its_folder_is_refused(tmp_path, name, words):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UserError, match=words):
        create_model("resnet8", 7, tmp_path)


def test_a_folder_without_weights_does_not_hide_a_tag_of_its_name(tmp_path, monkeypatch):
    """Many keep their downloads in a folder called `pretrained`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pretrained").mkdir()
    with pytest.raises(UserError, match="'pretrained' is not a file, and 'resnet8' has no pre-trained weights"):
        create_model("resnet8", 7, "pretrained")
    net = trained("resnet8")
    save_file(net.state_dict(), tmp_path / "pretrained" / "model.safetensors")
    assert torch.equal(create_model("resnet8", 7, "pretrained").fc.weight, net.fc.weight)


def test_versions_of_the_modules_reach_their_hooks(tmp_path):
    """Weights of torch before 0.4.1 have BatchNorms of version 1, without num_batches_tracked."""
    net = trained("resnet8")
    state = net.state_dict()
    for key in [key for key in state if key.endswith("num_batches_tracked")]:
        del state[key]
    for about in state._metadata.values():
        about["version"] = 1
    torch.save(state, tmp_path / "old.pth")
    found = create_model("resnet8", 7, tmp_path / "old.pth")
    assert torch.equal(found.fc.weight, net.fc.weight)
    mnasnet = create_model("torchvision/mnasnet0_5", 7)
    torch.save({"model": mnasnet.state_dict()}, tmp_path / "mnasnet.pth")
    again = create_model("torchvision/mnasnet0_5", 7, tmp_path / "mnasnet.pth")
    assert torch.equal(again.classifier[1].weight, mnasnet.classifier[1].weight)


class Sly(dict):
    """A class of the file's own."""


def test_hyper_parameters_of_an_unknown_class_are_refused_by_name(tmp_path):
    torch.save({"state_dict": trained("resnet8").state_dict(), "hyper_parameters": Sly(a=1)}, tmp_path / "n.ckpt")
    with pytest.raises(UserError, match="Sly.*save model.state_dict"):
        create_model("resnet8", 7, tmp_path / "n.ckpt")
