"""SOKD: the five terms against their formula, what learns from what, and the improved teacher."""

import copy

import pytest
import torch
import torch.nn.functional as F

from fastkd import create_model
from fastkd.engine import Step, TrainOptions
from fastkd.errors import UserError
from fastkd.methods import SOKD
from fastkd.methods.sokd import SOKDOptions


def net(name, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    made = create_model(name, 4).to(dtype)
    for module in made.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return made


def batch(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(5, 3, 16, 16, generator=generator, dtype=dtype), torch.randint(4, (5,), generator=generator)


def method_of(dtype=torch.float64, student="resnet8", teacher="resnet14", **options):
    torch.manual_seed(5)
    made = SOKD(net(student, 0, dtype), net(teacher, 1, dtype), SOKDOptions(**options)).train()
    return made.to(dtype)


def divergence(learner, source, T):
    return T * T * F.kl_div(F.log_softmax(learner / T, 1), F.softmax(source.detach() / T, 1), reduction="batchmean")


def top(bridge, x):
    return bridge["head"](bridge["stage"](x))


def parts(method, images):
    """(z_S, z_A, z_T, the map the bridge is fed with), from copies: no statistics move in the method."""
    student, teacher, bridge = (copy.deepcopy(m) for m in (method.student, method.teacher.net, method.bridge))
    x = teacher.relu(teacher.bn1(teacher.conv1(images)))
    bottom = teacher.layer2(teacher.layer1(x))
    return student(images), top(bridge, bottom), teacher(images), bottom


def test_the_terms_are_the_formula():
    weights = {"ce_s": 0.5, "kd_sa": 2.0, "ce_a": 0.7, "kd_at": 1.5, "kd_as": 0.3}
    method = method_of(temperature=3.0, **weights)
    images, target = batch()
    s, a, t, _ = parts(method, images)
    want = {
        "ce": F.cross_entropy(s, target),
        "kd_sa": divergence(s, a, 3),
        "ce_a": F.cross_entropy(a, target),
        "kd_at": divergence(a, t, 3),
        "kd_as": divergence(a, s, 3),
    }
    terms = method(images, target)
    assert terms.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(terms[name], weights.get(name, 0.5) * value, rtol=1e-10, atol=1e-12)


def test_each_learns_from_its_own_loss_only():
    """dL_S/dA = 0, dL_A/dS = 0, and nothing reaches the teacher."""
    for names, learner, others in (
        (("ce", "kd_sa"), "student", "bridge"),
        (("ce_a", "kd_at", "kd_as"), "bridge", "student"),
    ):
        method = method_of()
        terms = method(*batch())
        sum(terms[name] for name in names).backward()
        assert all(p.grad.abs().sum() > 0 for p in getattr(method, learner).parameters() if p.dim() > 1)
        assert all(p.grad is None or not p.grad.any() for p in getattr(method, others).parameters())
        assert all(p.grad is None for p in method.teacher.net.parameters())


def test_the_gradients_are_those_of_the_formula():
    method = method_of()
    images, target = batch()
    sum(method(images, target).values()).backward()
    student, bridge = copy.deepcopy(method.student), copy.deepcopy(method.bridge)
    for module in (student, bridge):
        module.zero_grad(set_to_none=True)
    _, _, t, bottom = parts(method, images)
    s, a = student(images), top(bridge, bottom)
    loss = F.cross_entropy(s, target) + F.cross_entropy(a, target)
    (loss + divergence(s, a, 4) + divergence(a, t, 4) + divergence(a, s, 4)).backward()
    for mine, theirs in ((method.student, student), (method.bridge, bridge)):
        for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-11)


def test_without_the_bridge_term_the_student_trains_plainly():
    method = method_of(kd_sa=0.0)
    images, target = batch()
    plain = copy.deepcopy(method.student)
    sum(method(images, target).values()).backward()
    F.cross_entropy(plain(images), target).backward()
    for p, q in zip(method.student.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)


def test_a_copied_bridge_that_does_not_learn_is_the_teacher():
    method = method_of(torch.float32, bridge_init="teacher", bridge_lr=0.0)
    images, target = batch(torch.float32)
    step = Step(method, TrainOptions(lr=0.1, weight_decay=1e-3), torch.device("cpu"))
    method.bridge.eval()
    for _ in range(2):
        step(images, target)
    method.improved.eval()
    torch.testing.assert_close(method.improved(images), method.teacher(images), rtol=0, atol=0)


def test_the_merge_of_two_teachers():
    """With equal weights, KD(A<-T) + KD(A<-S) pulls as 2 T^2 KL((p_T + p_S) / 2 || p_A) does."""
    a, s, t = (torch.randn(6, 7, dtype=torch.float64, requires_grad=name == "a") for name in "ast")
    apart = torch.autograd.grad(divergence(a, t, 4) + divergence(a, s, 4), a)[0]
    middle = (F.softmax(t / 4, 1) + F.softmax(s / 4, 1)) / 2
    merged = torch.autograd.grad(2 * 16 * F.kl_div(F.log_softmax(a / 4, 1), middle, reduction="batchmean"), a)[0]
    torch.testing.assert_close(apart, merged)


@pytest.mark.parametrize("norm", ["eval", "batch"])
def test_the_teacher_stays_as_it_was(norm):
    method = method_of(torch.float32, teacher_bn=norm)
    before = copy.deepcopy(method.teacher.net.state_dict())
    step = Step(method, TrainOptions(lr=0.1), torch.device("cpu"))
    for _ in range(3):
        step(*batch(torch.float32))
    assert all(torch.equal(before[name], value) for name, value in method.teacher.net.state_dict().items())
    assert not any(name.startswith("teacher") for name in method.state_dict())


def test_batch_statistics_differ_and_end_with_training():
    images, target = batch()
    by_norm = {norm: method_of(teacher_bn=norm)(images, target)["kd_at"] for norm in ("eval", "batch")}
    assert not torch.isclose(*by_norm.values())
    method = method_of(teacher_bn="batch")
    live = copy.deepcopy(method.teacher.net).train()
    for module in live.modules():
        module.track_running_stats = True
    torch.testing.assert_close(method.teacher(images), live(images))
    method.eval()
    assert not any(module.training for module in method.teacher.net.modules())


def test_the_improved_teacher_has_the_keys_of_the_plain_one():
    method = method_of(torch.float32)
    nets = method.networks()
    assert list(nets) == ["student", "improved_teacher"]
    plain = create_model("resnet14", 4)
    plain.load_state_dict(nets["improved_teacher"].state_dict())
    images, _ = batch(torch.float32)
    torch.testing.assert_close(plain.eval()(images), nets["improved_teacher"].eval()(images), rtol=0, atol=0)
    bottom = nets["improved_teacher"].layer1[0].conv1.weight
    assert bottom is method.teacher.net.layer1[0].conv1.weight and not bottom.requires_grad
    assert nets["improved_teacher"].layer3[0].conv1.weight is method.bridge["stage"][0].conv1.weight
    assert list(method_of(torch.float32, export_teacher=False).networks()) == ["student"]


def test_a_random_bridge_starts_without_bias():
    """As in the authors' code; a bridge that copies the teacher has the teacher's."""
    for init in ("random", "teacher"):
        bridge = method_of(bridge_init=init).bridge
        biases = [layer.bias for layer in bridge.modules() if isinstance(layer, torch.nn.Linear)]
        assert len(biases) == 1 and (biases[0].count_nonzero() == 0) == (init == "random")


def test_the_bridge_has_a_rate_of_its_own():
    method = method_of(torch.float32, bridge_lr=0.3)
    rest, bridge = method.param_groups(0.05)
    assert (rest["lr"], bridge["lr"]) == (0.05, 0.3)
    assert set(bridge["params"]) == set(method.bridge.parameters())
    assert set(rest["params"]) == set(method.student.parameters())


def test_the_bottom_of_the_teacher_runs_once():
    method = method_of(torch.float32)
    calls = []
    method.teacher.net.conv1.register_forward_hook(lambda *_: calls.append(1))
    method(*batch(torch.float32))
    assert len(calls) == 1


@pytest.mark.parametrize("feature", ["at", "ft", "hint"])
def test_feature_forms(feature):
    method = method_of(feature=feature, feature_weight=0.5)
    images, target = batch()
    x = parts(method, images)[3]
    theirs = copy.deepcopy(method.teacher.net).layer3(x)
    bridged = copy.deepcopy(method.bridge["stage"])(x)
    terms = method(images, target)
    if feature == "hint":
        want = 100 * (bridged - theirs).square().mean()
    elif feature == "at":
        a, b = (F.normalize(m.square().mean(1).flatten(1)) for m in (bridged, theirs))
        want = 1000 * (a - b).square().mean()
    else:
        want = 500 * (F.normalize(bridged.flatten(1)) - F.normalize(theirs.flatten(1))).abs().mean()
    torch.testing.assert_close(terms["feature_a"], 0.5 * want, rtol=1e-8, atol=1e-10)
    student_part = torch.autograd.grad(terms["feature_s"], list(method.bridge.parameters()), allow_unused=True)
    assert all(g is None or not g.any() for g in student_part)


def test_networks_that_do_not_fit():
    with pytest.raises(UserError, match=r"last-stage maps, \[16, 16\] in the student and \[8, 8\]|last-stage maps"):
        SOKD(net("resnet8"), net("vgg8"), SOKDOptions(feature="at"))


@pytest.mark.parametrize("options, word", [({"temperature": 0}, "temperature"), ({"ce_a": -1}, "ce_a"),
                                           ({"bridge_lr": -0.1}, "--bridge-lr")])  # fmt: skip
def test_options_out_of_range(options, word):
    with pytest.raises(ValueError, match=word):
        SOKDOptions(**options)
