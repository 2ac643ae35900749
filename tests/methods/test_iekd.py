"""IE-KD against its formulas: signs, bounds, halves, the auto-encoder and its file, whole runs."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file

from fastkd import Trainer, TrainOptions, create_model
from fastkd.errors import UserError
from fastkd.methods import CE, METHODS, RunContext
from fastkd.methods.iekd import IEKD, IEKDOptions
from fastkd.methods.parts import autoencoder
from fastkd.methods.parts.autoencoder import Coder
from fastkd.models import PreActivation, staged
from fastkd.run import checkpoint

VARIANTS = ("factor", "attention", "overhaul")
SIZE = 16


def net(name: str = "resnet8", seed: int = 0):
    torch.manual_seed(seed)
    return create_model(name, 4)


def images(samples: int = 6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(samples, 3, SIZE, SIZE, generator=generator, dtype=dtype), torch.arange(samples) % 4


def loader(samples: int = 6, dtype=torch.float64):
    x, y = images(samples, dtype)
    return list(zip(x.split(3), y.split(3), strict=True))


def make(dtype=torch.float64, **options):
    options = {"ae_epochs": 1} | options
    method = IEKD(net(), net("resnet14", 1), IEKDOptions(**options)).to(dtype)
    torch.manual_seed(0)
    method.prepare(loader(dtype=dtype))
    return method


def state(module):
    return copy.deepcopy(module.state_dict())


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def distance(x, t, p):
    unit = lambda f: f.flatten(1) / f.flatten(1).norm(dim=1, keepdim=True)  # noqa: E731
    return (unit(x) - unit(t)).abs().pow(p).mean() ** (1 / p)


@pytest.mark.parametrize("p", [1, 2])
def test_terms_are_the_formula(p):
    method = make(p=p, inheritance_weight=30.0, exploration_weight=20.0, kd_weight=0.5, temperature=3.0, ce_weight=0.7)
    x, y = images()
    terms = method(x, y)
    maps, teacher = staged(method.student).features(x)[1][-1], method.teacher.net
    factor = method.halves.teacher.net(staged(teacher).features(x)[1][-1])
    assert factor.shape[1] == 32 and maps.shape[1] == 64
    inh, exp = method.halves.inheritance(maps[:, :32]), method.halves.exploration(maps[:, 32:])
    soft, log = F.softmax(teacher(x) / 3, 1), F.log_softmax(method.student(x) / 3, 1)
    want = {
        "ce": 0.7 * F.cross_entropy(method.student(x), y),
        "kd": 0.5 * 9 * (soft * (soft.log() - log)).sum(1).mean(),
        "inheritance": 30 * distance(inh, factor, p),
        "exploration": -20 * distance(exp, factor, p),
    }
    torch.testing.assert_close(terms, want)


def test_factor_channels_are_half_of_the_teachers_or_as_given():
    """The authors' configurations have 32 for every network."""
    x, y = images()
    for given, wanted in ((0, 32), (32, 32), (5, 5)):
        method = make(factor_channels=given)
        maps = staged(method.teacher.net).features(x)[1][-1]
        assert method.halves.teacher.net(maps).shape[1] == wanted
        assert method.halves.inheritance[-3].out_channels == method.halves.exploration[-3].out_channels == wanted
        assert method(x, y)["inheritance"] > 0
    with pytest.raises(UserError, match="--factor-channels must be 1 or more, or 0 for half of the teacher's, got -1"):
        IEKDOptions(factor_channels=-1)


@pytest.mark.parametrize("p", [1, 2])
def test_the_two_terms_are_opposite(p):
    """Equal inputs: opposite values and gradients, within the bounds, indifferent to the scale of a sample."""
    make_factor = lambda seed: torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(seed)).double()  # noqa: E731
    loss = make(p=p).halves.loss
    x, t = make_factor(0).requires_grad_(), make_factor(1)
    terms = loss.terms(x, x, t)
    assert terms["inheritance"] == -terms["exploration"]
    (up,) = torch.autograd.grad(terms["inheritance"], x, retain_graph=True)
    (down,) = torch.autograd.grad(terms["exploration"], x)
    assert torch.equal(up, -down)
    assert 0 <= terms["inheritance"] / 50 <= 2 / 36**0.5
    assert loss.terms(-t, t, t)["inheritance"] / 50 <= 2 / 36**0.5 + 1e-12 and loss.terms(t, t, t)["inheritance"] < 1e-9
    scale = torch.tensor([0.1, 1, 2, 30, 5.0])[:, None, None, None].double()
    torch.testing.assert_close(loss.terms(x * scale, x, t)["inheritance"], terms["inheritance"])
    assert (x * up).flatten(1).sum(1).abs().max() < 1e-12


@pytest.mark.parametrize("split", ["natural", "random"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_stay_in_their_own_half(variant, split):
    method = make(variant=variant, split=split)
    maps = torch.randn(4, 64, 4, 4).double().requires_grad_()
    parts = [part.clone() for part in method.split(torch.arange(64.0)[None, :, None, None])]
    inherits, explores = (part.flatten().long().tolist() for part in parts)
    assert sorted(inherits + explores) == list(range(64)) and len(inherits) == 32  # disjoint, and nothing is left out
    assert (inherits == list(range(32))) == (split == "natural")
    teacher = staged(method.teacher.net).features(images(4)[0])[1][-1]
    terms = method.halves(*method.split(maps), teacher)
    for name, own, other in (("inheritance", inherits, explores), ("exploration", explores, inherits)):
        (gradient,) = torch.autograd.grad(terms[name], maps, retain_graph=True)
        assert gradient[:, other].abs().max() == 0 and (gradient[:, own].flatten(2).abs().sum((0, 2)) > 0).all()


def test_of_an_odd_number_of_channels_the_smaller_half_inherits():
    method = make()
    method.inheriting = 63 // 2
    assert [part.shape[1] for part in method.split(torch.zeros(1, 63, 2, 2))] == [31, 32]


def gradients(method, x, y):
    method.train()
    sum(method(x, y).values()).backward()
    return {name: p.grad for name, p in method.student.named_parameters()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_with_weights_0_it_is_plain_training_bit_for_bit(variant):
    x, y = images(dtype=torch.float32)
    method = make(torch.float32, variant=variant, inheritance_weight=0.0, exploration_weight=0.0)
    assert equal(gradients(method, x, y), gradients(CE(net()), x, y))
    assert list(method(x, y)) == ["ce"] and all(name.startswith("student.") for name in method.state_dict())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("weights", [(50.0, 0.0), (0.0, 50.0)])
def test_one_part_alone_leaves_no_weight_without_gradient(variant, weights):
    method = make(variant=variant, inheritance_weight=weights[0], exploration_weight=weights[1])
    terms = method(*images())
    assert list(terms) == ["ce", "inheritance" if weights[0] else "exploration"]
    sum(terms.values()).backward()
    assert all(p.grad is not None for p in method.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_leaves_teacher_and_its_encoder_as_they_are(variant):
    method = make(variant=variant)
    frozen = [method.teacher.net] + ([method.halves.teacher.net] if variant == "factor" else [])
    before, student = [state(part) for part in frozen], state(method.student)
    method.train()
    optimizer = torch.optim.SGD(method.parameters(), 0.01)
    for _ in range(2):
        optimizer.zero_grad()
        sum(method(*images()).values()).backward()
        optimizer.step()
    assert all(equal(old, part.state_dict()) for old, part in zip(before, frozen, strict=True))
    assert not any(module.training for part in frozen for module in part.modules())
    assert not equal(student, method.student.state_dict())
    assert method.networks()["student"].state_dict().keys() == net().state_dict().keys()
    assert not any("teacher" in name for name in method.state_dict())


def test_attention_is_at_of_each_half():
    method, (x, y) = make(variant="attention", exploration_weight=10.0), images()
    maps, theirs = (staged(part).features(x)[1][-1] for part in (method.student, method.teacher.net))
    attention = lambda f: F.normalize(f.square().mean(1).flatten(1))  # noqa: E731
    far = lambda f: (attention(f) - attention(theirs)).square().mean()  # noqa: E731
    terms = method(x, y)
    torch.testing.assert_close(terms["inheritance"], 1000 * far(maps[:, :32]))
    torch.testing.assert_close(terms["exploration"], -200 * far(maps[:, 32:]))


def test_overhaul_is_ofd_of_each_half():
    method, (x, y) = make(variant="overhaul"), images()
    maps, view = staged(method.student).features(x)[1][-1], PreActivation(method.teacher.net)
    theirs = view.features(x)[1][-1]
    norm = view.norms[-1]
    normal = torch.distributions.Normal(norm.bias.double(), norm.weight.double().abs())
    draws = normal.sample((40000,))
    margin = torch.stack([column[column < 0].mean() for column in draws.T])
    torch.testing.assert_close(method.halves.margin, margin, rtol=0.05, atol=0.02)
    wanted = torch.maximum(theirs, method.halves.margin[:, None, None])
    partial = lambda s: ((s - wanted).square() * ((s > wanted) | (wanted > 0))).sum() / len(s)  # noqa: E731
    terms = method(x, y)
    torch.testing.assert_close(terms["inheritance"], 1e-3 * partial(method.halves.inheritance(maps[:, :32])))
    torch.testing.assert_close(terms["exploration"], -1e-3 * partial(method.halves.exploration(maps[:, 32:])))
    assert [p.shape for p in method.halves.exploration.parameters()] == [(64, 32, 1, 1)]  # no scale: bounded


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_teacher_runs_once_a_step(variant):
    method, calls = make(variant=variant, kd_weight=1.0), []
    method.teacher.net.conv1.register_forward_hook(lambda *_: calls.append(1))
    method(*images())
    assert len(calls) == 1


@pytest.fixture
def trainings(monkeypatch):
    """One entry for each auto-encoder that is trained."""
    done, real = [], autoencoder.train_auto_encoder
    monkeypatch.setattr(autoencoder, "train_auto_encoder", lambda *a: done.append(1) or real(*a))
    return done


def fitted(folder, said=None, teacher_seed=1, seed=0, kind=IEKD, **options):
    options = {"ae_epochs": 1} | options
    method = kind(net(), net("resnet14", teacher_seed), kind.Options(**options))
    torch.manual_seed(seed)
    log = said.append if said is not None else lambda line: None
    method.prepare(loader(dtype=torch.float32), RunContext(folder=folder, seed=seed, log=log))
    return method.halves.teacher.net.state_dict()


def test_the_auto_encoder_is_kept_and_reused(tmp_path, trainings):
    said = []
    first = fitted(tmp_path)
    assert equal(first, fitted(tmp_path, said)) and len(trainings) == 1
    assert "is loaded from" in said[0] and "autoencoder.safetensors" in said[0]
    assert [file.name for file in tmp_path.iterdir()] == ["autoencoder.safetensors"]
    with safe_open(tmp_path / "autoencoder.safetensors", "pt") as file:
        about = json.loads(file.metadata()["fastkd"])
    assert about["ae_epochs"] == 1 and len(about["teacher"]) == 64
    assert load_file(tmp_path / "autoencoder.safetensors").keys() == Coder(64, 32).state_dict().keys()


CHANGES = {"factor_channels": 8, "ae_epochs": 2, "ae_lr": 0.05, "ae_error": "l2", "teacher_seed": 2, "seed": 5}


@pytest.mark.parametrize("name", CHANGES)
def test_another_teacher_or_setting_trains_it_anew(tmp_path, trainings, name):
    first, said = fitted(tmp_path), []
    again = fitted(tmp_path, said, **{name: CHANGES[name]})
    assert len(trainings) == 2 and not equal(first, again)
    assert f"another {name.removesuffix('_seed')}: the auto-encoder is trained again" in said[0]


def test_a_damaged_file_is_named_and_replaced(tmp_path, trainings):
    said, path = [], tmp_path / "autoencoder.safetensors"
    fitted(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:500])
    fitted(tmp_path, said)
    assert len(trainings) == 2 and str(path) in said[0] and "cannot be read" in said[0]
    assert path.read_bytes() == whole  # equal runs leave equal bytes


def test_a_diverged_auto_encoder_is_an_error(tmp_path):
    with pytest.raises(UserError, match="--ae-lr 1e\\+30"):
        fitted(tmp_path, ae_lr=1e30)
    assert not list(tmp_path.iterdir())


def test_the_auto_encoder_learns_in_fp32_where_the_run_is_in_fp16():
    method, kinds = IEKD(net(), net("resnet14", 1), IEKDOptions(ae_epochs=1)), []
    autocast = lambda: torch.autocast("cpu", torch.float16)  # noqa: E731
    parallel = lambda part: part.register_forward_hook(lambda m, a, y: kinds.append(y.dtype)) and part  # noqa: E731
    method.prepare(loader(dtype=torch.float32), RunContext(autocast=autocast, parallel=parallel))
    assert set(kinds) == {torch.float32}


def test_reconstruction_improves(tmp_path):
    said = []
    fitted(None, said, ae_epochs=12)
    first, last = (float(word) for word in said[-1].replace("at first,", "").split() if word[0].isdigit())
    assert last < 0.9 * first


def fit(tiny_loaders, out, epochs=2, student=0, name="iekd", resume=False, **options):
    kind = METHODS[name]
    method = kind(net(seed=student), net("resnet14", 1), kind.Options(ae_epochs=1, **options))
    settings = TrainOptions(epochs=epochs, lr=0.02, out=str(out), resume=resume)
    return Trainer(method, *tiny_loaders(), settings, {"student": "resnet8"}).fit(), method


@pytest.mark.parametrize("options", [{}, {"split": "random", "kd_weight": 0.5, "p": 2}, {"variant": "overhaul"}])
def test_resumed_equals_uninterrupted(tiny_loaders, tmp_path, monkeypatch, trainings, options):
    whole, _ = fit(tiny_loaders, tmp_path / "whole", **options)
    save = checkpoint.save_run

    def killed_after_the_first(paths, saved, keep):
        save(paths, saved, keep)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_run", killed_after_the_first)
    with pytest.raises(KeyboardInterrupt):
        fit(tiny_loaders, tmp_path / "cut", **options)
    monkeypatch.setattr(checkpoint, "save_run", save)
    resumed, method = fit(tiny_loaders, tmp_path / "cut", student=7, resume=True, **options)
    assert equal(load_file(whole.student), load_file(resumed.student))
    assert load_file(whole.student).keys() == net().state_dict().keys()
    assert len(trainings) == (0 if "variant" in options else 2)  # one for each folder
    saved = checkpoint.load(resumed.out / "last.pt")["method"]
    assert ("order" in saved) == ("split" in options) and not any("teacher" in key for key in saved)


def test_the_random_split_follows_the_seed():
    orders = []
    for seed in (0, 1, 1):
        method = IEKD(net(), net("resnet14", 1), IEKDOptions(variant="attention", split="random"))
        method.prepare(loader(), RunContext(seed=seed))
        orders.append(method.order.tolist())
    assert orders[0] != orders[1] == orders[2]


def test_from_the_command_line(fastkd):
    options = ["--epochs", "1", "--teacher-epochs", "1", "--ae-epochs", "1", "-b", "256", "--warmup-epochs", "0"]
    nets = ["--student", "resnet8", "--teacher", "resnet8", "--no-baseline"]
    status, out, err = fastkd("train", "--method", "iekd", *options, *nets, "--out", "run")
    assert status == 0, err
    assert "Training the auto-encoder" in out and "inheritance" in out and "exploration" in out


def test_wrong_options_are_named():
    for options, message in (
        ({"variant": "x"}, "--variant .*factor, attention, overhaul.*'x'"),
        ({"split": "x"}, "--split .*natural, random.*'x'"),
        ({"p": 3}, "--p must be 1 or 2, got 3"),
        ({"inheritance_weight": -1.0}, "--inheritance-weight .*-1"),
        ({"temperature": 0.0}, "--temperature .*0"),
        ({"ae_epochs": 0}, "--ae-epochs .*0"),
        ({"ae_lr": 0.0}, "--ae-lr .*0"),
        ({"ae_error": "l3"}, "--ae-error .*'l3'"),
        ({"ce_weight": 0.0, "inheritance_weight": 0.0, "exploration_weight": 0.0}, "all 0"),
    ):
        with pytest.raises(UserError, match=message):
            IEKDOptions(**options)


def test_maps_that_do_not_fit_are_named():
    with pytest.raises(UserError, match="IE-KD .*64x16x16.*"):
        IEKD(net(), create_model("torchvision/resnet18", 4))


def test_without_prepare_it_says_so():
    with pytest.raises(UserError, match=r"prepare\(loader\)"):
        IEKD(net(), net("resnet14", 1))(*images(dtype=torch.float32))
