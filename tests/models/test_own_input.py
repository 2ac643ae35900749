"""A teacher's copy of the images: against float64, in every form in which it runs, and in what is saved."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastkd import Trainer, TrainOptions, create_model
from fastkd.commands.teacher_input import teacher_input
from fastkd.engine.precision import Precision
from fastkd.engine.teacher_forms import FORMS, choose_form
from fastkd.methods import IAKD, KD, OFD, SOKD
from fastkd.models import load_weights, stage_shapes, staged
from fastkd.models.own_input import AdaptInput, InputSpec, OwnInput, library_input, own_input, plain_network
from fastkd.network_options import NetworkOptions
from fastkd.weights_file import read_about, save_network

CPU = torch.device("cpu")
GIVEN = InputSpec(32, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
WANTED = InputSpec(48, (0.5, 0.4, 0.3), (0.5, 0.25, 0.1))
CHANNELS_LAST = torch.channels_last
LARGEST = {torch.float64: 1e-5, torch.float32: 5e-5, torch.bfloat16: 0.04, torch.float16: 0.005}  # values up to 7


def normalised(pixels: torch.Tensor, spec: InputSpec) -> torch.Tensor:
    mean, std = (torch.tensor(each, dtype=torch.float64).view(1, 3, 1, 1) for each in (spec.mean, spec.std))
    return (pixels - mean) / std


@pytest.fixture
def pixels():
    return torch.rand(4, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", [32, 48, 20])
@pytest.mark.parametrize("dtype", LARGEST, ids=str)
@pytest.mark.parametrize("layout", [CHANNELS_LAST, torch.contiguous_format], ids=str)
def test_the_images_are_those_of_the_teachers_own_normalisation(pixels, size, dtype, layout):
    wanted = InputSpec(size, WANTED.mean, WANTED.std)
    given = normalised(pixels, GIVEN).to(dtype).contiguous(memory_format=layout)
    resized = F.interpolate(pixels, (size, size), mode="bilinear", antialias=True)
    got = AdaptInput(GIVEN, wanted).to(torch.bfloat16)(given)  # the numbers are not cast with a network
    assert got.dtype == dtype and got.is_contiguous(memory_format=layout)
    torch.testing.assert_close(got.double(), normalised(resized, wanted), atol=LARGEST[dtype], rtol=0)


def test_where_nothing_differs_there_is_no_wrapper():
    net = create_model("resnet8", 4)
    assert own_input(net, GIVEN, InputSpec(*vars(GIVEN).values())) is net is plain_network(net)
    assert plain_network(own_input(net, GIVEN, WANTED)) is net


@pytest.fixture
def teacher():
    torch.manual_seed(0)
    return OwnInput(create_model("resnet8", 4), GIVEN, WANTED).eval()


@torch.no_grad()
def test_stages_and_their_shapes_are_those_of_the_own_images(teacher, pixels):
    images = normalised(pixels, GIVEN).float()
    own = teacher.adapt(images)
    logits, maps = staged(teacher).features(images)
    wanted, wanted_maps = staged(teacher.net).features(own)
    assert torch.equal(logits, wanted) and torch.equal(teacher(images), wanted)
    assert all(map(torch.equal, maps, wanted_maps)) and maps[0].shape[-1] == 48
    assert stage_shapes(teacher, 32) == stage_shapes(teacher.net, 48)


def test_a_teacher_scores_what_it_scores_by_itself(teacher, pixels):
    same_size = InputSpec(32, WANTED.mean, WANTED.std)
    wrapped = OwnInput(teacher.net, GIVEN, same_size)
    with torch.no_grad():
        got, wanted = (wrapped(normalised(pixels, GIVEN).float()), teacher.net(normalised(pixels, same_size).float()))
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("form", FORMS[:3])
@pytest.mark.parametrize("kind", [KD, SOKD], ids=["kd", "sokd"])
def test_every_form_adapts_the_images(teacher, pixels, form, kind):
    images = normalised(pixels, GIVEN).float().contiguous(memory_format=CHANNELS_LAST)
    method = kind(create_model("resnet8", 4), teacher)
    logged: list[str] = []
    chosen = choose_form(method, images, form, Precision("float32", CPU), logged.append)
    assert chosen == form, logged
    view = method.staged_views.get(method.teacher, teacher)
    with torch.no_grad():
        got = view(images)
        torch.testing.assert_close(got, teacher.net(teacher.adapt(images)), atol=1e-3, rtol=1e-3)
        assert (got - teacher.net(images)).abs().max() > 0.05  # what it would be without


def test_maps_before_the_activation_adapt_the_images(pixels):
    nets = create_model("resnet8", 4), create_model("resnet8", 4)
    teacher = OwnInput(nets[1], GIVEN, InputSpec(32, WANTED.mean, WANTED.std))
    method = OFD(nets[0], teacher)
    images = normalised(pixels, GIVEN).float()
    with torch.no_grad():
        logits, _ = method.staged_views[method.teacher].features(images)
    assert torch.equal(logits, teacher.net(teacher.adapt(images)))


def test_swapped_blocks_do_not_depend_on_the_teachers_size():
    """Stages of 48-pixel images would not fit those of 32-pixel images."""
    nets = create_model("resnet8", 4), create_model("resnet14", 4)
    method = IAKD(nets[0], OwnInput(nets[1], GIVEN, InputSpec(40, WANTED.mean, WANTED.std)))
    method(torch.zeros(2, 3, 32, 32), torch.tensor([0, 1]), (False, False, False))["ce"].backward()


@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.5}], ids=str)
def test_the_improved_teacher_is_a_plain_network_with_a_note(tiny_loaders, tmp_path, options):
    train, val = tiny_loaders(samples=8)
    given, wanted = InputSpec(8, GIVEN.mean, GIVEN.std), InputSpec(8, WANTED.mean, WANTED.std)
    method = SOKD(create_model("resnet8", 4), OwnInput(create_model("resnet8", 4), given, wanted))
    settings = TrainOptions(epochs=1, lr=0.01, out=str(tmp_path / "r"), device="cpu", **options)
    trainer = Trainer(method, train, val, settings, given.as_dict() | {"teacher": "resnet8"})
    history = trainer.fit().history
    path, net = tmp_path / "r/improved_teacher.safetensors", create_model("resnet8", 4)
    load_weights(net, path)
    assert InputSpec.of(read_about(path)["input"]) == wanted
    assert InputSpec.of(read_about(tmp_path / "r/student.safetensors")["input"]) == given
    logits = OwnInput(net, given, wanted).eval()(val.images)
    assert history[-1]["improved_teacher_top1"] == pytest.approx(
        100 * (logits.argmax(1) == val.target).double().mean().item()
    )


@pytest.mark.parametrize(
    ("name", "weights", "wanted"),
    [
        ("timm/resnet18", "", None),
        ("timm/resnet18", "a1_in1k", InputSpec(224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))),
        ("timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k", "", InputSpec(224, (0.5,) * 3, (0.5,) * 3)),
        ("timm/inception_v3", "pretrained", InputSpec(299, (0.5,) * 3, (0.5,) * 3)),
        ("torchvision/resnet18", "", None),
        ("torchvision/inception_v3", "pretrained", InputSpec(299, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))),
        ("torchvision/vit_b_16", "IMAGENET1K_SWAG_E2E_V1", InputSpec(384, GIVEN.mean, GIVEN.std)),
        ("resnet8", "", None),
        ("timm/resnet188", "pretrained", None),
        ("timm/resnet18", "no_tag", None),
        ("torchvision/resnet188", "pretrained", None),
        ("torchvision/resnet18", "NO_TAG", None),
    ],
)
def test_what_the_libraries_know(name, weights, wanted):
    pytest.importorskip("timm")
    assert library_input(name, weights) == wanted


def digits(*more: str) -> tuple[str, ...]:
    nets = ("--student", "resnet8", "--no-baseline", "--warmup-epochs", "0", "-b", "64", "--epochs", "1")
    return ("train", *nets, *more)


def test_the_command_gives_a_teacher_its_own_images(fastkd, few_digits, tmp_path):
    assert fastkd(*digits("--method", "ce", "--out", "t"))[0] == 0
    note = read_about(tmp_path / "t/student.safetensors")["input"]
    assert note["image_size"] == 32 and len(note["mean"]) == len(note["std"]) == 3
    teacher = ("--teacher", "resnet8", "--teacher-weights", "t/student.safetensors")
    status, out, err = fastkd(*digits(*teacher, "--out", "a"))
    assert status == 0 and "takes images of" not in out and "does not say" not in out, err
    own = top1_of_teacher(out)
    status, out, err = fastkd(
        *digits(*teacher, "--teacher-mean", "0.1", "0.2", "0.3", "--teacher-size", "40", "--out", "b")
    )
    assert status == 0 and "takes images of 40 x 40 pixels, mean 0.1 0.2 0.3" in out, err
    assert top1_of_teacher(out) != own


def test_a_file_without_a_note_is_said_to_have_none(fastkd, few_digits, tmp_path):
    torch.save(create_model("resnet8", 10).state_dict(), tmp_path / "w.pth")
    status, out, err = fastkd(*digits("--teacher", "resnet8", "--teacher-weights", "w.pth", "--out", "a"))
    assert status == 0 and out.count("w.pth does not say which images it takes; it gets the student's, 32 x 32") == 1, (
        err
    )
    status, out, err = fastkd(*digits("--teacher", "resnet8", "--teacher-weights", "x.pth", "--out", "b"))
    assert status == 2 and err.strip() == "fastkd: there is no weights file x.pth" and "does not say" not in out
    (tmp_path / "p.jpg").write_bytes(b"no weights")
    for wrong in (("resnet8", "p.jpg"), ("resnet88", "w.pth")):
        status, out, err = fastkd(*digits("--teacher", wrong[0], "--teacher-weights", wrong[1], "--out", "b"))
        assert status == 2 and err.count("\n") == 1 and "does not say" not in out, (out, err)


@pytest.mark.parametrize(
    ("noted", "options", "words"),
    [
        (None, {}, ["does not say which images it takes; it gets the student's"]),
        (None, {"teacher_mean": (0.5,) * 3}, ["(size, std from the student's images; mean from --teacher-mean)"]),
        (WANTED.as_dict(), {}, ["(size, mean, std from the note in w.safetensors)"]),
        (WANTED.as_dict(), {"teacher_size": 40}, ["(size from --teacher-size; mean, std from the note in w.safetens"]),
        ({"image_size": 48}, {}, ["does not say the mean, std of its images", "48 x 48 pixels", "(size from the note"]),
        (GIVEN.as_dict(), {}, []),
    ],
)
def test_it_is_said_where_the_images_of_a_teacher_come_from(tmp_path, monkeypatch, noted, options, words):
    monkeypatch.chdir(tmp_path)
    save_network(tmp_path / "w.safetensors", nn.Linear(2, 2), {"input": noted} if noted else {})
    lines, names = [], NetworkOptions(teacher=("resnet8",), **options)
    wanted = teacher_input(names, "resnet8", "w.safetensors", GIVEN, lines.append, is_trained=False)
    assert all(word in "\n".join(lines) for word in words) and bool(lines) == bool(words), lines
    values = GIVEN.as_dict() | (noted or {})
    values |= {name.replace("teacher_", "").replace("size", "image_size"): value for name, value in options.items()}
    assert wanted == InputSpec.of(values)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--teacher-mean", "0.5", "0.5"), "--teacher-mean takes three finite numbers"),
        (("--teacher-std", "0.5", "0.5", "0"), "--teacher-std must be above 0"),
        (("--teacher-size", "3"), "--teacher-size must be 8 or more"),
        (("--teacher-size", "64"), "--teacher-size: a teacher that is trained first"),
        (("--method", "ce", "--teacher-size", "64"), "--teacher-size has no effect: the method has no teacher"),
    ],
)
def test_options_that_cannot_be(fastkd, tmp_path, options, words):
    status, _, err = fastkd(*digits(*options, "--out", "a"))
    assert status == 2 and words in err and not (tmp_path / "a").exists()


def top1_of_teacher(out: str) -> float:
    return float(out.split("teacher resnet8: top-1 ")[1].split(" %")[0])
