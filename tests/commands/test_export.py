"""`fastkd export`: every file is loaded as a user of its library loads it, and its logits are the network's."""

import json
import re
import sys
from dataclasses import replace

import pytest
import timm
import torch
import yaml
from export_runs import COLOURS, MEAN, STD, pictures, weights_of
from PIL import Image
from refused import check_refused
from safetensors.torch import load_file
from torchvision import models

from fastkd.export import FORMATS
from fastkd.export.verify import Reloaded

DATA = ["--data", "set", "--loader", "folder", "--workers", "0"]
IMAGES = torch.randn(7, 3, 32, 32, generator=torch.Generator().manual_seed(3))
TRAIN = ["--method", "ce", "--image-size", "32", "-b", "8", "--loader", "folder", "--workers", "0", "--lr", "0.05"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with the images set/ and the run r/ of a small network of timm that tells most of them apart."""
    from fastkd.cli import main

    root = tmp_path_factory.mktemp("run")
    pictures(root / "set/train", 6)
    pictures(root / "set/val", 15)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        options = [*TRAIN, "--data", "set", "--student", "timm/test_resnet", "--epochs", "2", "--out", "r"]
        options += ["--crop-pct", "0.8", "--interpolation", "bicubic", "--model-kwargs", "drop_path_rate=0.1"]
        patch.setattr("sys.argv", ["fastkd", "train", *options])
        main()
    return root


def logits(net, images=IMAGES):
    with torch.inference_mode():
        return net(images)


def timm_validates(net, folder) -> float:
    """top-1 in %, by the calls of timm's validate.py."""
    config = timm.data.resolve_data_config({}, model=net)
    loader = timm.data.create_loader(
        timm.data.create_dataset("", root=str(folder)),
        input_size=config["input_size"],
        batch_size=16,
        use_prefetcher=False,
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
        num_workers=0,
        crop_pct=config["crop_pct"],
        crop_mode=config["crop_mode"],
        device=torch.device("cpu"),
    )
    hits = sum(int((logits(net, images).argmax(1) == target).sum()) for images, target in loader)
    return 100 * hits / len(loader.dataset)


def test_timm_evaluates_the_folder_as_fastkd_does(fastkd, run, tmp_path):
    data = ["--data", run / "set", "--loader", "folder", "--workers", "0"]
    status, out, err = fastkd("export", run / "r", "--format", "hf", "--out", tmp_path / "x", *data)
    assert status == 0, err
    assert "add `license:`" in out
    scores = re.findall(r"│ +([\d.]+) │ +[\d.]+ │$", out, re.M)
    evaluated = fastkd("eval", "--weights", run / "r/student.safetensors", *data)[1]
    top1 = re.search(r"test_resnet\s+│\s+60\s+│\s+([\d.]+)", evaluated)[1]
    assert scores == [top1, top1] and 40 < float(top1) < 100
    net = timm.create_model(f"local-dir:{tmp_path / 'x/hf'}", pretrained=True).eval()
    assert f"{timm_validates(net, run / 'set/val'):.2f}" == top1
    assert net.pretrained_cfg["label_names"] == [*COLOURS]


def test_the_model_card_has_the_facts_of_the_run(fastkd, run, tmp_path):
    for weights in ("r", "r/best.pt"):
        assert fastkd("export", run / weights, "--format", "hf", "--out", tmp_path / weights)[0] == 0
    card, best = ((tmp_path / weights / "hf/README.md").read_text() for weights in ("r", "r/best.pt"))
    front = yaml.safe_load(card.split("---")[1])
    assert (
        front["pipeline_tag"] == "image-classification" and front["library_name"] == "timm" and "license" not in front
    )
    rows = [json.loads(line) for line in (run / "r/history.jsonl").read_text().splitlines()]
    assert (
        f"top-1 {rows[-1]['top1']:.2f} % on the val images of set, after epoch 2 of 2 (measured in training) |" in card
    )
    top1 = max(row["top1"] for row in rows)
    assert f"top-1 {top1:.2f} % on the val images of set" in best and "the epoch was chosen by this figure" in best
    count = sum(each.numel() for each in timm.create_model("test_resnet", num_classes=4).parameters())
    assert f"| parameters | {count:,} |" in card and "| teacher |" not in card
    assert "\nfastkd train --method ce --image-size 32" in card


def test_the_model_card_names_teacher_and_recipe(fastkd, tmp_path):
    run = tmp_path / "r"
    run.mkdir()
    weights_of(run / "student.safetensors", "timm/test_resnet")
    teacher = {"teacher": ["timm/resnet50"], "teacher_weights": ["/home/someone/t.pth"], "teacher_epochs": 0}
    options = {"method": "kd", "epochs": 90, "data": "/data/a|b", "val_fraction": 0.1} | teacher
    (run / "config.yaml").write_text(yaml.safe_dump(options))
    (run / "history.jsonl").write_text('{"epoch": 90, "top1": 71.5}\n')
    command = ["/x/fastkd", "train", "--recipe", "imagenet-kd-resnet34-resnet18", "--data", "/data/a|b"]
    (run / "environment.json").write_text(json.dumps({"command": command}))
    assert fastkd("export", "r", "--format", "hf", "--out", "x")[0] == 0
    card = (tmp_path / "x/hf/README.md").read_text()
    assert "| teacher | timm/resnet50; weights t.pth |" in card and "| recipe | imagenet-kd-resnet34-resnet18 |" in card
    assert r"top-1 71.50 % on 0.1 of each class, held out from a\|b, after epoch 90 of 90" in card
    assert "fastkd train --recipe imagenet-kd-resnet34-resnet18 --data '/data/a|b'" in card


def test_the_card_has_the_accuracy_of_the_weights_not_of_the_history(fastkd, tmp_path):
    """A run of 2 epochs was extended to 4 and stopped after the third: the weights are those of epoch 2."""
    (tmp_path / "r").mkdir()
    weights_of(tmp_path / "r/student.safetensors", "timm/test_resnet", top1=61.5, epoch=2, epochs=2)
    (tmp_path / "r/config.yaml").write_text(yaml.safe_dump({"method": "ce", "epochs": 4, "data": "/data/set"}))
    rows = [{"epoch": number, "top1": 60.0 + number} for number in (1, 2, 3)]
    (tmp_path / "r/history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert fastkd("export", "r", "--format", "hf", "--out", "x")[0] == 0
    card = (tmp_path / "x/hf/README.md").read_text()
    assert "top-1 61.50 % on the val images of set, after epoch 2 of 2 (measured in training) |" in card
    weights_of(tmp_path / "r/student.safetensors", "timm/test_resnet")  # of an older version
    assert fastkd("export", "r", "--format", "hf", "--out", "y")[0] == 0
    assert "top-1" not in (tmp_path / "y/hf/README.md").read_text()


def test_a_file_of_another_place_has_a_card_without_accuracy(fastkd, tmp_path):
    weights_of(tmp_path / "w.safetensors", "timm/test_resnet")
    assert fastkd("export", "w.safetensors", "--format", "hf", "--out", "x")[0] == 0
    card = (tmp_path / "x/hf/README.md").read_text()
    assert "top-1" not in card and "## Training" not in card and "| network | timm/test_resnet |" in card


@pytest.mark.parametrize("exif", [True, False])
def test_a_folder_for_the_hub_cannot_say_that_photos_are_turned(fastkd, tmp_path, exif):
    weights_of(tmp_path / "w.safetensors", "timm/test_resnet", exif=exif)
    status, out, err = fastkd("export", "w.safetensors", "--format", "hf", "--out", "x")
    assert status == 0 and ("call PIL.ImageOps.exif_transpose before" in out) is exif, err


@pytest.mark.parametrize(
    "model, make",
    [
        ("timm/test_vit", lambda: timm.create_model("test_vit", num_classes=4, img_size=32)),
        ("timm/test_resnet", lambda: timm.create_model("test_resnet", num_classes=4)),
        ("torchvision/shufflenet_v2_x0_5", lambda: models.get_model("shufflenet_v2_x0_5", num_classes=4)),
    ],
)
def test_the_library_loads_every_key(fastkd, tmp_path, model, make):
    net, library = weights_of(tmp_path / "w.safetensors", model), model.partition("/")[0]
    status, out, err = fastkd("export", "w.safetensors", "--format", library, "--out", "x")
    assert status == 0, err
    theirs = make().eval()
    theirs.load_state_dict(load_file(f"x/{library}.safetensors"), strict=True)
    torch.testing.assert_close(logits(theirs), logits(net), rtol=0, atol=1e-6)


def test_a_vision_transformer_of_timm_is_made_for_its_image_size(fastkd, tmp_path):
    net = weights_of(tmp_path / "w.safetensors", "timm/test_vit", 48)
    assert fastkd("export", "w.safetensors", "--format", "hf", "--out", "x")[0] == 0
    theirs = timm.create_model(f"local-dir:{tmp_path / 'x/hf'}", pretrained=True).eval()
    images = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(logits(theirs, images), logits(net, images), rtol=0, atol=1e-6)


def test_transformers_reads_network_classes_and_images(fastkd, tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    transformers.ResNetConfig(**sizes).save_pretrained(tmp_path / "tiny")
    weights_of(tmp_path / "w.safetensors", f"hf/{tmp_path / 'tiny'}", noted="")
    pictures(tmp_path / "p", 1)
    model = ["--model", f"hf/{tmp_path / 'tiny'}"]
    status, _, err = fastkd("export", "w.safetensors", "--format", "hf", "--out", "x", *model)
    assert status == 0, err
    net = transformers.AutoModelForImageClassification.from_pretrained("x/hf").eval()
    assert net.config.id2label == dict(enumerate(COLOURS))
    read = transformers.AutoImageProcessor.from_pretrained("x/hf")
    with torch.no_grad():
        found = net(**read(Image.open("p/cat/0.png"), return_tensors="pt")).logits.softmax(1)[0]
    ours = fastkd("predict", "p/cat/0.png", "--weights", "w.safetensors", *model, "--json")[1]
    for each in json.loads(ours)[0]["predictions"]:
        assert each["probability"] == pytest.approx(float(found[each["index"]]), abs=2e-3)
    card = (tmp_path / "x/hf/README.md").read_text()
    assert "library_name: transformers" in card and "pipeline(" in card


def test_a_program_runs_on_any_number_of_images_and_names_its_classes(fastkd, tmp_path):
    net = weights_of(tmp_path / "w.safetensors", "resnet8")
    assert fastkd("export", "w.safetensors", "--format", "torch-export", "--out", "x")[0] == 0
    notes = {"fastkd.json": ""}
    program = torch.export.load("x/model.pt2", extra_files=notes).module()
    torch.testing.assert_close(logits(program), logits(net), rtol=0, atol=1e-5)
    note = json.loads(notes["fastkd.json"])
    assert note["classes"] == [*COLOURS] and note["mean"] == MEAN and note["std"] == STD and note["resize"] == 37


@pytest.mark.parametrize("kind", ["timm", "torchvision", "hf"])
def test_a_network_that_a_library_lacks_is_refused(fastkd, tmp_path, kind):
    weights_of(tmp_path / "w.safetensors", "resnet8")
    refused = fastkd("export", "w.safetensors", "--format", "torch-export", kind, "--out", "x")
    check_refused(
        refused, f"--format {kind}: resnet8 is a network of fastkd", "onnx, torch-export and int8 are for every"
    )
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("factor, gap", [(1.001, "1.0e-03"), (float("nan"), "nan")])
def test_nothing_is_kept_if_one_file_differs(fastkd, tmp_path, monkeypatch, factor, gap):
    weights_of(tmp_path / "w.safetensors", "timm/test_resnet")

    def write_other(trained, path, images):
        path.write_text("x")
        return Reloaded(lambda images: trained.net(images) * factor)

    monkeypatch.setitem(FORMATS, "torch-export", replace(FORMATS["torch-export"], write=write_other))
    refused = fastkd("export", "w.safetensors", "--format", "timm", "torch-export", "--out", "x")
    check_refused(refused, "--format torch-export", f"differ by {gap} of the largest", "1e-05 is allowed")
    assert [*(tmp_path / "x").iterdir()] == []


def test_damaged_weights_are_refused(fastkd, tmp_path):
    from fastkd import weights_file

    net = weights_of(tmp_path / "w.safetensors", "resnet8")
    about = weights_file.read_about(tmp_path / "w.safetensors")
    net.fc.bias.data[1] = float("nan")
    weights_file.save_network(tmp_path / "w.safetensors", net, about)
    check_refused(fastkd("export", "w.safetensors", "--format", "torch-export", "--out", "x"), "not finite")
    assert not (tmp_path / "x/model.pt2").exists()


@pytest.mark.parametrize("kind, module", [("onnx", "onnxscript"), ("int8", "torchao")])
def test_a_missing_library_is_named(fastkd, tmp_path, monkeypatch, kind, module):
    weights_of(tmp_path / "w.safetensors", "resnet8")
    for name in ("onnx", "onnxruntime", "onnxscript"):
        monkeypatch.setitem(sys.modules, name, sys)
    monkeypatch.setitem(sys.modules, module, None)
    pictures(tmp_path / "set/val", 1)
    refused = fastkd("export", "w.safetensors", "--format", kind, "--out", "x", "--data", "set")
    check_refused(refused, f"--format {kind} needs {module}", "pip install 'fastkd[export]'")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        ([], ["--format is missing"]),
        (["--format", "timm"], ["--out is missing"]),
        (["--format", "onx", "--out", "x"], ["--format must be some of timm, ", "got 'onx' (did you mean 'onnx'?)"]),
        (["--format", "timm", "--format", "hf", "--out", "x"], ["--format is there more than once"]),
        (["--format", "int8", "--out", "x"], ["--format int8 needs images", "give --data"]),
        (["--format", "timm", "--out", "x", "--workers", "0"], ["--workers is for the images of --data"]),
        (["more", "--format", "timm", "--out", "x"], ["export needs one RUN, and got 2"]),
        (["--format", "timm", "--out", "there"], ["there/timm.safetensors is there already"]),
        (["--format", "timm", "--out", "w.safetensors"], ["w.safetensors is a file"]),
    ],
)
def test_wrong_options(fastkd, tmp_path, words, message):
    weights_of(tmp_path / "w.safetensors", "timm/test_resnet")
    (tmp_path / "there").mkdir()
    (tmp_path / "there/timm.safetensors").write_text("old")
    check_refused(fastkd("export", "w.safetensors", *words), *message)
    assert (tmp_path / "there/timm.safetensors").read_text() == "old" and not (tmp_path / "x").exists()


def test_a_folder_without_weights_is_refused(fastkd, tmp_path):
    (tmp_path / "r").mkdir()
    check_refused(fastkd("export", "r", "--format", "timm", "--out", "x"), "r holds no student.safetensors", "no run")
    (tmp_path / "r/best.pt").write_text("")
    check_refused(fastkd("export", "r", "--format", "timm", "--out", "x"), "r/best.pt is its best state so far")


@pytest.mark.libraries
@pytest.mark.parametrize("model", ["resnet8", "timm/test_vit", "torchvision/shufflenet_v2_x0_5"])
def test_onnxruntime_gives_the_logits(fastkd, tmp_path, model):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    net = weights_of(tmp_path / "w.safetensors", model)
    pictures(tmp_path / "set/val", 3)
    status, out, err = fastkd("export", "w.safetensors", "--format", "onnx", "--out", "x", *DATA)
    assert status == 0, err
    session = runtime.InferenceSession("x/model.onnx")
    found = torch.from_numpy(session.run(["logits"], {"images": IMAGES.numpy()})[0])
    torch.testing.assert_close(found, logits(net), rtol=1e-3, atol=1e-4)
    note = json.loads(session.get_modelmeta().custom_metadata_map["fastkd"])
    assert note["classes"] == [*COLOURS] and note["image_size"] == 32
    first, second = re.findall(r"│ +([\d.]+) │ +[\d.]+ │$", out, re.M)
    assert first == second


@pytest.mark.libraries
@pytest.mark.parametrize("model", ["timm/test_resnet", "timm/test_vit"])
def test_int8_is_small_and_near(fastkd, tmp_path, model):
    pytest.importorskip("torchao")
    net = weights_of(tmp_path / "w.safetensors", model)
    pictures(tmp_path / "set/val", 10)
    status, out, err = fastkd("export", "w.safetensors", "--format", "int8", "torch-export", "--out", "x", *DATA)
    assert status == 0, err
    assert "40 of the images to evaluate" in out
    program = torch.export.load("x/model-int8.pt2").module()
    gap, largest = (logits(program) - logits(net)).abs().max(), logits(net).abs().max()
    assert 0 < gap < 0.2 * largest
    sizes = [(tmp_path / "x" / name).stat().st_size for name in ("model-int8.pt2", "model.pt2")]
    assert sizes[0] < (0.5 if model == "timm/test_resnet" else 0.8) * sizes[1]
