"""`fastkd predict`: what evaluation would say of each picture."""

import json
import math

import numpy as np
import pytest
import torch
from export_runs import COLOURS, MEAN, STD, pictures, weights_of
from PIL import Image
from refused import check_refused
from torchvision.transforms import v2

from fastkd.data.base import resize_side
from fastkd.data.preprocess import Preprocess


def test_the_probabilities_are_those_of_the_evaluated_image(fastkd, tmp_path):
    net = weights_of(tmp_path / "w.safetensors", "resnet8")
    pictures(tmp_path / "p", 1)
    status, out, err = fastkd("predict", "p/cat/0.png", "--weights", "w.safetensors", "--json", "--top", "3")
    assert status == 0 and err == ""
    pixels = torch.from_numpy(np.array(Image.open("p/cat/0.png"))).permute(2, 0, 1)
    crop = v2.CenterCrop(32)(v2.Resize(37)(pixels)) / 255  # 32 * 256 / 224 is 36.57
    image = (crop - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    with torch.no_grad():
        wanted = net(image[None]).softmax(1)[0]
    ((found),) = json.loads(out)
    assert found["image"] == "p/cat/0.png" and len(found["predictions"]) == 3
    assert [each["index"] for each in found["predictions"]] == wanted.argsort(descending=True)[:3].tolist()
    for each in found["predictions"]:
        assert each["class"] == [*COLOURS][each["index"]]
        assert each["probability"] == pytest.approx(float(wanted[each["index"]]), abs=1e-5)


@pytest.mark.parametrize("place", ["before", "after"])
def test_a_folder_is_all_of_its_pictures(fastkd, tmp_path, place):
    weights_of(tmp_path / "w.safetensors", "resnet8")
    pictures(tmp_path / "p", 10)
    (tmp_path / "p/note.txt").write_text("x")
    options = ["--weights", "w.safetensors", "--top", "1", "--json"]
    status, out, err = fastkd("predict", *(["p", *options] if place == "before" else [*options, "p"]))
    rows = json.loads(out)
    assert status == 0 and len(rows) == 40 and "1 ending in .txt" in err
    evaluated = fastkd("eval", "--weights", "w.safetensors", "--data", "p", "--loader", "folder", "--workers", "0")[1]
    right = sum(row["image"].split("/")[1] == row["predictions"][0]["class"] for row in rows)
    assert f" {100 * right / 40:.2f} " in evaluated


def test_a_run_folder_stands_for_its_student(fastkd, tmp_path):
    (tmp_path / "run").mkdir()
    weights_of(tmp_path / "run/student.safetensors", "resnet8")
    pictures(tmp_path / "p", 1)
    by_folder, by_file = (
        fastkd("predict", "p", "--weights", place, "--json") for place in ("run", "run/student.safetensors")
    )
    assert by_folder == by_file and by_file[0] == 0
    (tmp_path / "run/student.safetensors").rename(tmp_path / "run/best.pt")
    check_refused(
        fastkd("predict", "p", "--weights", "run"), "--weights run holds no student", "run/best.pt is its best"
    )


def test_bad_pictures_are_named_and_the_others_predicted(fastkd, tmp_path):
    weights_of(tmp_path / "w.safetensors", "resnet8")
    pictures(tmp_path / "p", 1)
    (tmp_path / "bad.png").write_text("x")
    (tmp_path / "empty").mkdir()
    places = ["bad.png", "p/cat/0.png", "missing.jpg", "empty"]
    status, out, err = fastkd("predict", *places, "--weights", "w.safetensors")
    assert status == 2 and "p/cat/0.png" in out and "probability %" in out
    assert [line.split("'")[1] for line in err.splitlines()] == ["bad.png", "missing.jpg", "empty"]
    assert "'missing.jpg' does not exist: give a picture or a folder of pictures" in err
    assert all(line.startswith("fastkd: ") for line in err.splitlines()) and "--skip-bad" not in err
    assert "'bad.png' cannot be decoded (it is no picture of a known format, or its header is damaged)\n" in err
    status, out, _ = fastkd("predict", *places, "--weights", "w.safetensors", "--json")
    assert status == 2 and ["error" in row for row in json.loads(out)] == [True, False, True, True]


def test_weights_that_give_no_numbers(fastkd, tmp_path):
    from fastkd import weights_file

    net = weights_of(tmp_path / "w.safetensors", "resnet8")
    about = weights_file.read_about(tmp_path / "w.safetensors")
    net.fc.bias.data[1] = float("nan")
    weights_file.save_network(tmp_path / "w.safetensors", net, about)
    pictures(tmp_path / "p", 1)
    status, out, err = fastkd("predict", "p/cat/0.png", "--weights", "w.safetensors", "--json")
    assert status == 2 and "not finite" in err and "error" in json.loads(out)[0]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--weights", "w.safetensors"], ["predict needs pictures"]),
        (["p.png"], ["--weights is missing"]),
        (["p.png", "--weights", "w.safetensors", "--top", "0"], ["--top 0: give at least 1"]),
        (["p.png", "--weights", "missing.safetensors"], ["there is no such file"]),
        (["p.png", "--weights", "plain.py"], ["plain.py is not a torch file"]),
        (["p.png", "--weights", "plain.safetensors", "--model", "resnet8"], ["does not say its classes"]),
        (["p.png", "--weights", "w.safetensors", "--classes", "5"], ["--weights w.safetensors is", "give --classes 4"]),
        (
            ["p.png", "--weights", "w.safetensors", "--model", "vgg8"],
            ["--weights w.safetensors does not fit vgg8: mis"],
        ),
        (["p.png", "--weight", "w.safetensors"], ["unknown option '--weight'"]),
    ],
)
def test_wrong_options(fastkd, tmp_path, words, message):
    from safetensors.torch import save_file

    save_file(weights_of(tmp_path / "w.safetensors", "resnet8").state_dict(), tmp_path / "plain.safetensors")
    (tmp_path / "plain.py").write_text("print(1)")
    result = fastkd("predict", *words)
    check_refused(result, *message)
    assert "fine-tune" not in result[2] and "new_classifier" not in result[2]


def test_timm_resizes_to_the_same_side():
    for size in range(8, 4097):
        image = Preprocess.of({"image_size": size, "mean": MEAN, "std": STD})
        assert math.floor(size / image.crop_pct) == image.resize == resize_side(size)


@pytest.mark.parametrize("size", [28, 32])
def test_a_named_set_keeps_its_size_and_has_a_black_border(tmp_path, size):
    from timm.data import create_transform

    pixels = np.random.default_rng(0).integers(1, 255, (28, 28, 3), dtype="uint8")
    Image.fromarray(pixels).save(tmp_path / "x.png")
    image = Preprocess.of({"image_size": size, "mean": MEAN, "std": STD, "data": "fashion-mnist", "resident": True})
    found, edge = image.read(str(tmp_path / "x.png")), (size - 28) // 2
    assert found.shape == (size, size, 3)
    wanted = np.pad(pixels, ((edge, edge), (edge, edge), (0, 0)))
    assert np.array_equal(found.numpy(), wanted)
    transform = create_transform((3, size, size), crop_pct=image.crop_pct, mean=MEAN, std=STD, interpolation="bilinear")
    theirs = transform(Image.open(tmp_path / "x.png"))
    torch.testing.assert_close(image.normalise(found[None])[0], theirs, rtol=0, atol=1e-5)
