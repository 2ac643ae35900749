"""What would fail late fails before the run, in one line that names the network; and the trial leaves no trace."""

import copy
from types import SimpleNamespace

import pytest
import torch
from every_method import NAMES, batch, build
from torch import nn

from fastkd import Trainer, TrainOptions
from fastkd.curves import is_loss_term
from fastkd.engine import trial
from fastkd.engine.trial import try_step
from fastkd.errors import UserError
from fastkd.methods import CE, DML, KD
from fastkd.methods.frozen import FrozenTeacher

CPU, CLASSES = torch.device("cpu"), tuple("abcd")
IMAGES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
TARGET = torch.tensor([0, 1, 2, 3, 0, 1])
OPTIONS = TrainOptions(device="cpu")


def state_of(method) -> dict:
    teachers = [module.net for module in method.modules() if isinstance(module, FrozenTeacher)]
    nets = dict(enumerate([method, *teachers, *method.networks().values()]))
    tensors = {(key, name): value.clone() for key, net in nets.items() for name, value in net.state_dict().items()}
    modes = {(key, name): each.training for key, net in nets.items() for name, each in net.named_modules()}
    return {"tensors": tensors, "modes": modes, "random": torch.get_rng_state()}


@pytest.mark.parametrize("name", NAMES)
def test_every_method_passes_and_is_as_it_was(name):
    method = build(name)
    method.train()
    method.student.bn1.eval()
    before = state_of(method)
    try_step(method, batch(0), tuple("0123456789"), OPTIONS, CPU)
    after = state_of(method)
    assert before["modes"] == after["modes"] and torch.equal(before["random"], after["random"])
    assert all(torch.equal(before["tensors"][key], value) for key, value in after["tensors"].items())
    assert all(p.grad is None for p in method.parameters())


@pytest.mark.parametrize(
    "options", [{"mixup": 0.2, "smoothing": 0.1}, {"amp_dtype": "float16"}, {"grad_accum": 2}], ids=str
)
def test_a_run_with_a_trial_has_the_bits_of_one_without(tiny_net, tiny_loaders, tmp_path, monkeypatch, options):
    students = []
    for name, step in (("with", try_step), ("without", lambda *_: None)):
        monkeypatch.setattr("fastkd.train.try_step", step)
        settings = TrainOptions(epochs=2, lr=0.05, out=str(tmp_path / name), device="cpu", **options)
        method = KD(nn.Sequential(nn.Dropout(0.2), tiny_net(0)), tiny_net(1))
        Trainer(method, *tiny_loaders(), settings).fit()
        students.append(method.student.state_dict())
    assert all(torch.equal(students[0][name], value) for name, value in students[1].items())


class Odd(nn.Module):
    """A tiny network whose logits pass `change(logits, images, training)`."""

    def __init__(self, change, classes: int = 4):
        super().__init__()
        self.norm, self.fc, self.change = nn.BatchNorm2d(3), nn.Linear(3, classes), change

    def forward(self, images):
        return self.change(self.fc(self.norm(images).mean((2, 3))), images, self.training)


def too_small(logits, images, training):
    raise AssertionError  # without a word, as `assert H == W` does


def sized(logits, images, training):
    if images.shape[-1] != 224:
        raise AssertionError("Input height (8) doesn't match model (224).")


Heads = type("Heads", (tuple,), {"_fields": ("logits", "aux_logits")})
ODD = {
    "tuple": (lambda z, x, t: (z, z), r"in evaluation returns tuple \(Tensor, Tensor\) and not one tensor"),
    "named tuple": (lambda z, x, t: Heads((z, z)) if t else z, r"in training returns Heads \(logits, aux_logits\)"),
    "dict": (lambda z, x, t: {"logits": z}, r"in evaluation returns dict \(logits\)"),
    "object": (lambda z, x, t: SimpleNamespace(logits=z), "in evaluation returns SimpleNamespace and not"),
    "map": (lambda z, x, t: z[..., None, None], r"in evaluation returns \[4, 4, 1, 1\] for 4 images of 8 x 8 pixels"),
    "one image": (lambda z, x, t: z[:1], r"in evaluation returns \[1, 4\] for 4 images"),
    "nan": (lambda z, x, t: z / 0, "in evaluation gives logits that are NaN or infinite"),
    "size": (sized, r"fails in evaluation on images of 8 x 8 pixels \(AssertionError: Input height .8. doesn't match"),
    "no word": (
        too_small,
        r"fails in evaluation .*\(AssertionError at .*test_trial.py:\d+\); use another --image-size",
    ),
}


@pytest.mark.parametrize("role", ["student", "teacher", "peer1"])
@pytest.mark.parametrize("kind", ODD)
def test_what_a_network_returns(tiny_net, kind, role):
    change, words = ODD[kind]
    if role == "teacher" and kind == "named tuple":
        pytest.skip("a teacher is never in train mode")
    method = {
        "student": lambda: CE(Odd(change)),
        "teacher": lambda: KD(tiny_net(), Odd(change)),
        "peer1": lambda: DML(tiny_net(), None, None, [Odd(change)]),
    }[role]()
    with pytest.raises(UserError, match=f"^the {role} odd-net {words}") as caught:
        try_step(method, (IMAGES, TARGET), CLASSES, OPTIONS, CPU, {role: f"the {role} odd-net"})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("student", "teacher", "words"), [(4, 5, "teacher Odd"), (5, 4, "student Odd"), (4, 1, "teacher")]
)
def test_outputs_that_are_not_the_classes(student, teacher, words):
    method = KD(*(Odd(lambda z, x, t: z, classes) for classes in (student, teacher)))
    with pytest.raises(UserError, match=f"the {words}.* returns .*each of the 4 classes.*num_classes=4"):
        try_step(method, (IMAGES, TARGET), CLASSES, OPTIONS, CPU)


def test_the_size_that_a_network_is_made_for_is_named():
    for name, value in (("pretrained_cfg", {"input_size": (3, 224, 224)}), ("image_size", 224)):
        net = Odd(sized)
        setattr(net, name, value)
        with pytest.raises(UserError, match="made for images of 224 pixels: use --image-size 224"):
            try_step(CE(net), (IMAGES, TARGET), CLASSES, OPTIONS, CPU)


class InPlace(nn.Sequential):
    """The exponential needs its result for the gradient, and the next line overwrites it."""

    def forward(self, images):
        x = super().forward(images).exp()
        x += 1
        return x


def test_what_cannot_be_learnt(tiny_net):
    cases = {
        "the backward pass of CE fails .*inplace.*overwrite its input": InPlace(nn.Flatten(), nn.Linear(192, 4)),
        "the loss of CE has no gradient": Odd(lambda z, x, t: z.detach()),
        "the gradient of CE is NaN or infinite in student": Odd(lambda z, x, t: z + (z * 0).square().sqrt()),
        "has lazy layers": nn.Sequential(nn.Flatten(), nn.LazyLinear(4)),
        "a training step of CE fails .*value per channel": nn.Sequential(Odd(lambda z, x, t: z), OneImage()),
    }
    for words, net in cases.items():
        with pytest.raises(UserError, match=words):
            try_step(CE(net), (IMAGES, TARGET), CLASSES, OPTIONS, CPU)


class Returns(CE):
    """A method of one's own: `give(logits, teacher's logits)` is what its losses() returns."""

    needs_teacher = True

    def losses(self, out, target, plan):
        return self.give(out(self.student), out(self.teacher))


@pytest.mark.parametrize(
    ("give", "words"),
    [
        (lambda z, t: None, r"losses\(\) of Returns returns a NoneType: it must return its loss terms by name, a dict"),
        (lambda z, t: z.mean(), r"losses\(\) of Returns returns a Tensor: "),
        (lambda z, t: {}, r"losses\(\) of Returns returns no terms: "),
        (lambda z, t: {"ce": z.mean(), "extra": 0.5}, "the term 'extra' of Returns is a float: .*0-dimensional"),
        (lambda z, t: {"ce": z.mean(1)}, r"the term 'ce' of Returns is a tensor \[4\] of torch.float32 on cpu: "),
        (lambda z, t: {"ce": z.mean().to("meta")}, r"of Returns is a tensor .* on meta: .* tensors on cpu"),
        (lambda z, t: {1: z.mean()}, "a term named 1: give it a name"),
        (lambda z, t: {"mse": t.mean()}, r"no gradient: each of its terms \(mse\) comes from the teacher alone, or "),
    ],
)
def test_what_a_method_of_ones_own_may_return(tiny_net, give, words):
    method = Returns(tiny_net(), tiny_net())
    method.give = give
    with pytest.raises(UserError, match=words) as caught:
        try_step(method, (IMAGES, TARGET), CLASSES, OPTIONS, CPU)
    assert "\n" not in str(caught.value)


def test_a_term_has_no_name_of_another_column(tiny_net, tiny_loaders, tmp_path):
    """The columns of a run that are no terms are refused as names, and no others."""
    options = TrainOptions(epochs=1, out=str(tmp_path / "r"), device="cpu", report=False)
    method = Returns(tiny_net(), tiny_net())
    method.give = lambda z, t: {"lr_term": z.mean(), "top": z.square().mean()}
    (row,) = Trainer(method, *tiny_loaders(), options).fit().history
    assert [name for name in row if is_loss_term(name)] == ["lr_term", "top"]
    for name in [*row, "peer1_top5", "gate1_share"]:
        method.give = lambda z, t, name=name: {name: z.mean()}
        if name in ("lr_term", "top"):
            try_step(method, (IMAGES, TARGET), CLASSES, OPTIONS, CPU)
        else:
            with pytest.raises(UserError, match=f"losses.. of Returns has a term named '{name}': .* not .*lr, .*top1"):
                try_step(method, (IMAGES, TARGET), CLASSES, OPTIONS, CPU)


class OneImage(nn.Module):
    def forward(self, logits):
        if self.training and torch.is_grad_enabled():
            raise ValueError("Expected more than 1 value per channel when training")
        return logits


@pytest.mark.parametrize(
    ("images", "target", "classes", "options", "words"),
    [
        (IMAGES, TARGET * 0, ("images",), {}, r"has 1 class \(images\).*one level too deep"),
        (IMAGES.byte(), TARGET, CLASSES, {}, r"gives images \[6, 3, 8, 8\] of torch.uint8"),
        (IMAGES.permute(0, 2, 3, 1), TARGET, CLASSES, {}, r"gives images \[6, 8, 8, 3\]"),
        (IMAGES * float("nan"), TARGET, CLASSES, {}, "hold NaN or infinite"),
        (IMAGES, TARGET + 1, CLASSES, {}, "go from 1 to 4 and there are 4 classes; labels go from 0 to 3"),
        (IMAGES, TARGET - 1, CLASSES, {}, "go from -1 to 2"),
        (IMAGES, TARGET.int(), CLASSES, {}, r"labels \[6\] of torch.int32"),
        (IMAGES, TARGET[:, None], CLASSES, {}, r"labels \[6, 1\] of torch.int64"),
        (IMAGES, TARGET[:5], CLASSES, {}, r"labels \[5\] of torch.int64 for 6 images"),
        (IMAGES, torch.rand(6, 5), CLASSES, {}, r"labels \[6, 5\] of torch.float32.*probabilities \[N, 4\]"),
        (IMAGES, torch.rand(6, 4), CLASSES, {"mixup": 0.2}, "--mixup.* need class indices"),
        (IMAGES.to("meta"), TARGET, CLASSES, {}, "gives images on meta .* the run is on cpu"),
    ],
)
def test_batches_that_cannot_be_used(tiny_net, images, target, classes, options, words):
    with pytest.raises(UserError, match=words):
        try_step(CE(tiny_net()), (images, target), classes, TrainOptions(**options), CPU)


@pytest.mark.parametrize(
    ("images", "weights", "options", "how"),
    [
        (torch.float64, torch.float32, {}, r"by \.float\(\)"),
        (torch.float16, torch.float32, {}, r"by \.float\(\)"),
        (torch.float64, torch.float32, {"amp_dtype": "bfloat16"}, r"by \.float\(\)"),
        (torch.float32, torch.float64, {}, r"by \.to\(torch\.float64\)"),
        (torch.float16, torch.float32, {"amp_dtype": "bfloat16"}, ""),
        (torch.float64, torch.float64, {}, ""),
    ],
)
def test_images_of_another_number_format(tiny_net, images, weights, options, how):
    method, settings = CE(tiny_net().to(weights)), TrainOptions(device="cpu", **options)
    if not how:
        return try_step(method, (IMAGES.to(images), TARGET), CLASSES, settings, CPU)
    words = f"the loader's images are {images} and the weights {weights}: convert the images, {how}$"
    with pytest.raises(UserError, match=words):
        try_step(method, (IMAGES.to(images), TARGET), CLASSES, settings, CPU)


def test_soft_labels_and_images_without_a_label_are_no_errors(tiny_net):
    method, unlabelled = CE(tiny_net()), TARGET.masked_fill(TARGET == 3, -100)
    with pytest.raises(UserError, match="from -100 to 2 .* -100 stands for an image without one, after method.allow"):
        try_step(method, (IMAGES, unlabelled), CLASSES, OPTIONS, CPU)
    method.allow_unlabelled()
    for target in (torch.full((6, 4), 0.25), unlabelled):
        try_step(method, (IMAGES, target), CLASSES, OPTIONS, CPU)


def test_every_process_raises_the_error_of_one(tiny_net, monkeypatch):
    monkeypatch.setattr(trial.distributed, "gather", lambda problem: [problem, "the teacher fails there"])
    with pytest.raises(UserError, match="^the teacher fails there$"):
        try_step(CE(tiny_net()), (IMAGES, TARGET), CLASSES, OPTIONS, CPU)


def test_a_trainer_writes_nothing_and_reads_one_batch(tiny_net, tiny_loaders, tmp_path):
    train, val = tiny_loaders()
    position, options = copy.deepcopy(train.state_dict()), TrainOptions(out=str(tmp_path / "r"), device="cpu")
    with pytest.raises(UserError, match="the teacher wide has|the teacher wide in evaluation returns"):
        Trainer(KD(tiny_net(), tiny_net(num_classes=9)), train, val, options, {"teacher": "wide"})
    assert not (tmp_path / "r").exists() and train.state_dict() == position


@pytest.mark.parametrize(
    "networks, words",
    [
        (("--student", "torchvision/squeezenet1_1"), "torchvision/squeezenet1_1 cannot take images of 8 x 8"),
        (("--teacher", "torchvision/squeezenet1_1"), "torchvision/squeezenet1_1 cannot take images of 8 x 8"),
    ],
)
def test_the_command_trains_no_teacher_for_a_run_that_cannot_be(fastkd, tmp_path, networks, words):
    data = (
        "--data",
        "synthetic",
        "--synthetic-classes",
        "3",
        "--synthetic-samples",
        "8",
        "--image-size",
        "8",
        "-b",
        "4",
    )
    nets = {"--student": "resnet8", "--teacher": "resnet8"} | dict([networks])
    options = [word for pair in nets.items() for word in pair]
    status, out, err = fastkd("train", *data, *options, "--teacher-epochs", "1", "--epochs", "1", "--out", "r")
    assert status == 2 and words in err and len(err.splitlines()) == 1 and "training it first" not in out
    assert not (tmp_path / "r").exists()
