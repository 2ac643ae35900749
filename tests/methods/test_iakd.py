"""IAKD: paths against hand-composed networks, the draws, and what a step may touch."""

import copy
import itertools

import pytest
import timm
import torch
import torch.nn.functional as F
from capture import Capture

from fastkd import create_model
from fastkd.engine import Step, TrainOptions
from fastkd.errors import UserError
from fastkd.methods import CE, IAKD, RunContext
from fastkd.methods.iakd import IAKDOptions
from fastkd.models import name_stages
from fastkd.models.sizes import note_image_size

PATHS = list(itertools.product((True, False), repeat=3))


def net(name, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    made = create_model(name, 4).to(dtype)
    for module in made.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return made


def batch(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(5, 3, 16, 16, generator=generator, dtype=dtype), torch.randint(4, (5,), generator=generator)


def by_hand(student, teacher, path, images):
    """The logits along a path, from the networks' own parts."""
    x = student.relu(student.bn1(student.conv1(images)))
    for own, name in zip(path, ("layer1", "layer2", "layer3"), strict=True):
        x = getattr(student if own else teacher, name)(x)
    return student.fc(student.avgpool(x).flatten(1))


@pytest.mark.parametrize("path", PATHS)
def test_every_path_is_the_hand_composed_network(path):
    student, teacher = net("resnet8", 0, torch.float64), net("resnet14", 1, torch.float64)
    images, target = batch(torch.float64)
    twin, frozen = copy.deepcopy(student), copy.deepcopy(teacher).eval().requires_grad_(False)
    terms = IAKD(student, teacher).train()(images, target, path)
    want = F.cross_entropy(by_hand(twin, frozen, path, images), target)
    assert list(terms) == ["ce"]
    torch.testing.assert_close(terms["ce"], want, rtol=1e-12, atol=1e-12)
    terms["ce"].backward()
    want.backward()
    for mine, theirs in zip(student.parameters(), twin.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None)
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-10, atol=1e-12)
    assert student.conv1.weight.grad.abs().sum() > 0  # through whatever teacher blocks lie between
    assert all(p.grad is None for p in teacher.parameters())
    torch.testing.assert_close(dict(student.state_dict()), dict(twin.state_dict()))  # the statistics too


@pytest.mark.parametrize("path", PATHS)
def test_every_path_replays_as_a_graph(path):
    method = IAKD(net("resnet8"), net("resnet14", 1)).train()
    images, target = batch()
    again = copy.deepcopy(method)
    buffers = [images.clone(), target.clone()]
    with Capture() as graph:
        method(*buffers, path)["ce"].backward()
    new_images, new_target = batch(seed=7)
    buffers[0].copy_(new_images)
    buffers[1].copy_(new_target)
    for p in method.parameters():
        if p.grad is not None:
            p.grad.zero_()
    method.load_state_dict(again.state_dict())
    graph.replay()
    again(new_images, new_target, path)["ce"].backward()
    for mine, theirs in zip(method.parameters(), again.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None)
        assert mine.grad is None or torch.equal(mine.grad, theirs.grad)


def test_what_is_not_drawn_is_not_touched():
    """Against SGD written out: momentum and weight decay move a block only in the steps that use it."""
    lr, momentum, decay = 0.05, 0.9, 1e-2
    student, teacher = net("resnet8"), net("resnet14", 1)
    twin, frozen = copy.deepcopy(student), copy.deepcopy(teacher).eval().requires_grad_(False)
    options = TrainOptions(lr=lr, momentum=momentum, weight_decay=decay)
    step = Step(IAKD(student, teacher).train(), options, torch.device("cpu"))
    velocity = {name: torch.zeros_like(p) for name, p in twin.named_parameters()}
    for number, path in enumerate([PATHS[7], PATHS[2], PATHS[5], PATHS[0], PATHS[6], PATHS[1]]):
        images, target = batch(seed=number)
        step(images, target, path)
        twin.zero_grad(set_to_none=True)
        F.cross_entropy(by_hand(twin, frozen, path, images), target).backward()
        with torch.no_grad():
            for name, p in twin.named_parameters():
                if p.grad is not None:
                    velocity[name] = momentum * velocity[name] + p.grad + decay * p
                    p -= lr * velocity[name]
    torch.testing.assert_close(dict(student.state_dict()), dict(twin.state_dict()), rtol=1e-4, atol=1e-6)


def test_with_p_1_it_is_plain_training_bit_for_bit():
    finals = []
    for make in (lambda s: IAKD(s, net("resnet14", 1), IAKDOptions(p=(1.0,))), CE):
        student = net("resnet8")
        method = make(student).train()
        step = Step(method, TrainOptions(lr=0.1, weight_decay=1e-3), torch.device("cpu"))
        for number in range(4):
            step(*batch(seed=number), method.plan(number))
        finals.append(student.state_dict())
    assert all(torch.equal(finals[0][name], value) for name, value in finals[1].items())


@pytest.mark.parametrize("options", [IAKDOptions(), IAKDOptions(teacher_bn="batch", kd_weight=0.5)])
def test_the_teacher_stays_as_it_was(options):
    teacher = net("resnet14", 1)
    before = copy.deepcopy(teacher.state_dict())
    method = IAKD(net("resnet8"), teacher, options).train()
    for path in PATHS:
        sum(method(*batch(), path).values()).backward()
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())


def test_batch_statistics_are_those_of_the_batch():
    images, target = batch(torch.float64)
    student, teacher = net("resnet8", 0, torch.float64), net("resnet14", 1, torch.float64)
    twin, live = copy.deepcopy(student), copy.deepcopy(teacher).train()
    method = IAKD(student, teacher, IAKDOptions(teacher_bn="batch")).train()
    want = F.cross_entropy(by_hand(twin, live, (False,) * 3, images), target)
    torch.testing.assert_close(method(images, target, (False,) * 3)["ce"], want)
    method.eval()
    assert not teacher.layer1[0].bn1.training


def test_kd_may_be_added():
    images, target = batch(torch.float64)
    student, teacher = net("resnet8", 0, torch.float64), net("resnet14", 1, torch.float64)
    method = IAKD(student, teacher, IAKDOptions(kd_weight=0.3, temperature=2.0)).train()
    path = (False, True, False)
    z = by_hand(copy.deepcopy(student), teacher, path, images)
    kl = F.kl_div(F.log_softmax(z / 2, 1), F.softmax(teacher(images) / 2, 1), reduction="batchmean")
    terms = method(images, target, path)
    torch.testing.assert_close(terms["kd"], 0.3 * 4 * kl)
    torch.testing.assert_close(terms["ce"], F.cross_entropy(z, target))


def method_in(run, **options):
    method = IAKD(net("resnet8"), net("resnet14", 1), IAKDOptions(**options))
    method.prepare(None, run)
    return method


def test_the_draws_have_their_probability_and_repeat():
    method = method_in(RunContext(epochs=10, steps_per_epoch=1000, seed=3), schedule="uniform", p=(0.3, 0.5, 0.9))
    drawn = torch.tensor([method.plan(step) for step in range(4000)]).double().mean(0)
    for share, p in zip(drawn, (0.3, 0.5, 0.9), strict=True):
        assert abs(share - p) < 4 * (p * (1 - p) / 4000) ** 0.5
    twin = method_in(RunContext(epochs=10, steps_per_epoch=1000, seed=3), schedule="uniform", p=(0.3, 0.5, 0.9))
    other = method_in(RunContext(epochs=10, steps_per_epoch=1000, seed=4), schedule="uniform", p=(0.3, 0.5, 0.9))
    paths = [[m.plan(step) for step in range(50)] for m in (method, twin, other)]
    assert paths[0] == paths[1] != paths[2]
    shares = method.selection_rates(range(4000))
    assert list(shares) == ["gate1_share", "gate2_share", "gate3_share"]
    assert shares["gate1_share"] == pytest.approx(drawn[0].item())


def test_linear_rises_to_one():
    method = method_in(RunContext(epochs=3, steps_per_epoch=7), p=(0.4,))
    p = [method.probabilities(step)[0] for step in range(21)]
    assert p[0] == 0.4 and p[20] == 1 and p[10] == pytest.approx(0.7)
    assert all(b > a for a, b in itertools.pairwise(p))


def test_review_starts_anew_exactly_at_the_drops():
    method = method_in(RunContext(epochs=9, steps_per_epoch=10, drops=(4.0, 7.0)), schedule="review", p=(0.2,))
    p = [method.probabilities(step)[0] for step in range(90)]
    assert [step for step in range(90) if p[step] == 0.2] == [0, 40, 70]
    assert [step for step in range(90) if p[step] == 1] == [39, 69, 89]


def test_uniform_ends_with_the_student_whole():
    method = method_in(RunContext(epochs=5, steps_per_epoch=4), schedule="uniform", p=(0.5,), finish_epochs=2)
    assert [method.probabilities(step)[0] for step in (0, 11, 12, 19)] == [0.5, 0.5, 1.0, 1.0]


def test_block_gates_and_their_groups():
    student, teacher = net("resnet14", 0, torch.float64), net("resnet26", 1, torch.float64)
    method = IAKD(student, teacher, IAKDOptions(gates="block")).train()
    assert len(method.gates) == 6  # two blocks a stage; four of the teacher's in groups of two
    images, target = batch(torch.float64)
    path = (True, False, False, True, True, False)
    twin, frozen = copy.deepcopy(student), copy.deepcopy(teacher).eval()
    x = twin.relu(twin.bn1(twin.conv1(images)))
    for i, own in enumerate(path):
        layer = f"layer{i // 2 + 1}"
        x = getattr(twin, layer)[i % 2](x) if own else getattr(frozen, layer)[2 * (i % 2) : 2 * (i % 2) + 2](x)
    want = F.cross_entropy(twin.fc(twin.avgpool(x).flatten(1)), target)
    torch.testing.assert_close(method(images, target, path)["ce"], want)


def test_adapters_change_the_channels_and_stay_behind():
    student = net("resnet8")
    method = IAKD(student, net("resnet8x4", 1), IAKDOptions(adapters=True)).train()
    for path in PATHS:
        method(*batch(), path)["ce"].backward()
    assert all(p.grad is not None for p in method.adapters.parameters()) and len(list(method.adapters.parameters()))
    assert method.networks() == {"student": student} and set(student.state_dict()) == set(net("resnet8").state_dict())


class ThreeStages(torch.nn.Module):
    """Stages of one block each, with these channels and strides."""

    def __init__(self, channels, strides=(1, 2, 2)):
        super().__init__()
        widths = list(zip([8, *channels[:-1]], channels, strides, strict=True))
        blocks = [torch.nn.Sequential(torch.nn.Conv2d(a, b, 3, s, 1), torch.nn.ReLU()) for a, b, s in widths]
        self.stem, (self.one, self.two, self.three) = torch.nn.Conv2d(3, 8, 3, padding=1), blocks
        self.fc = torch.nn.Linear(channels[-1], 4)
        name_stages(self, ["one", "two", "three"])

    def forward(self, x):
        return self.fc(self.three(self.two(self.one(self.stem(x)))).mean((2, 3)))


def test_the_error_says_which_gates_fit_and_what_to_do():
    student, wider = ThreeStages((8, 8, 16)), ThreeStages((8, 12, 16))
    with pytest.raises(UserError) as error:
        IAKD(note(student, 16), note(wider, 16))
    assert str(error.value) == (
        "2 of 3 gates cannot be swapped, for images of 16 x 16 (C x H x W): stage 2: the student's block takes "
        "8 x 16 x 16 to 8 x 8 x 8 and the teacher's 8 x 16 x 16 to 12 x 8 x 8; stage 3: the student's block takes "
        "8 x 8 x 8 to 16 x 4 x 4 and the teacher's 12 x 8 x 8 to 16 x 4 x 4; those that fit: stage 1; the channels "
        "alone differ: use --adapters, or another pair"
    )
    later = ThreeStages((8, 12, 16), strides=(1, 1, 2))
    with pytest.raises(UserError) as error:
        IAKD(note(student, 16), note(later, 16), IAKDOptions(adapters=True))
    assert (
        "at stage 2, stage 3 more than the channels differs, and --adapters changes channels alone: choose a pair"
        in (str(error.value))
    )
    assert "those that fit" in str(error.value) and "use --adapters" not in str(error.value)


def note(net, size):
    note_image_size(net, size)
    return net


def test_blocks_of_other_sizes_name_the_gates_that_fit():
    def two_blocks(strides):
        torch.manual_seed(0)
        made = ThreeStages((8, 8, 16))
        blocks = [torch.nn.Conv2d(8, 8, 3, stride, 1) for stride in strides]
        made.two = torch.nn.Sequential(*blocks)
        return made

    with pytest.raises(UserError, match="at stage 2, block 1, .* alone: use --gates stage, or choose a pair"):
        IAKD(two_blocks((1, 2)), two_blocks((2, 1)), IAKDOptions(gates="block"))
    IAKD(two_blocks((1, 2)), two_blocks((2, 1)))


def transformer(width, depth, seed=0):
    torch.manual_seed(seed)
    options = {"img_size": 16, "patch_size": 4, "embed_dim": width, "depth": depth, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=4, **options)


def test_blocks_of_tokens_are_swapped():
    student, teacher = transformer(16, 4), transformer(16, 8, 1).eval()
    method = IAKD(student, teacher, IAKDOptions()).eval()
    x = student.norm_pre(student._pos_embed(student.patch_embed(batch()[0])))
    for block in [*teacher.blocks[:2], student.blocks[1], *teacher.blocks[4:6], student.blocks[3]]:
        x = block(x)
    want = F.cross_entropy(student.forward_head(student.norm(x)), batch()[1])
    path = (False, True, False, True)
    torch.testing.assert_close(method(*batch(), path)["ce"], want, rtol=0, atol=0)


def test_adapters_of_tokens_are_linear():
    with pytest.raises(
        UserError, match=r"\(tokens x C\): stage 1: the student's block takes 17 x 16 .* use --adapters"
    ):
        IAKD(transformer(16, 4), transformer(24, 4, 1))
    method = IAKD(transformer(16, 4), transformer(24, 4, 1), IAKDOptions(adapters=True)).train()
    method(*batch(), (False,) * 4)["ce"].backward()
    assert {type(layer) for pair in method.adapters for each in pair for layer in each} == {
        torch.nn.Linear,
        torch.nn.LayerNorm,
    }
    assert all(p.grad is not None for p in method.adapters.parameters())


@pytest.mark.parametrize(
    "names, options, words",
    [
        (("resnet8", "resnet8x4"), {}, ["stage 1", "16 x 64 x 64", "64 x 64 x 64", "--adapters"]),
        (("resnet14", "resnet20"), {"gates": "block"}, ["stage 1", "2 blocks", "3", "--gates stage"]),
        (("resnet8", "resnet14"), {"p": (0.5, 0.5)}, ["--p has 2", "3 gates"]),
    ],
)
def test_networks_that_cannot_be_matched(names, options, words):
    with pytest.raises(UserError) as error:
        IAKD(net(names[0]), net(names[1]), IAKDOptions(**options))
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    "options, word",
    [({"p": (1.2,)}, "1.2"), ({"p": ()}, "--p"), ({"finish_epochs": -1}, "--finish-epochs"),
     ({"finish_epochs": 2.0}, "uniform"), ({"kd_weight": -1}, "kd_weight"), ({"temperature": 0.0}, "temperature")],
)  # fmt: skip
def test_options_out_of_range(options, word):
    with pytest.raises(ValueError, match=word):
        IAKDOptions(**options)


def test_schedules_that_do_not_fit_the_run():
    with pytest.raises(UserError, match="review.*drop"):
        method_in(RunContext(epochs=9), schedule="review")
    with pytest.raises(UserError, match="--finish-epochs 9"):
        method_in(RunContext(epochs=9), schedule="uniform", finish_epochs=9)
