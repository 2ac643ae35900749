"""FT against its formula; its paraphraser is kept, frozen and no part of the student."""

import copy

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from fastkd import Trainer, TrainOptions, create_model
from fastkd.errors import UserError
from fastkd.methods import METHODS, RunContext
from fastkd.methods.ft import FT, FTOptions
from fastkd.methods.parts import autoencoder
from fastkd.models import staged


def net(name: str = "resnet8", seed: int = 0):
    torch.manual_seed(seed)
    return create_model(name, 4)


def batch(dtype=torch.float64):
    images = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(3), dtype=dtype)
    return images, torch.arange(6) % 4


def make(dtype=torch.float64, **options):
    method = FT(net(), net("resnet14", 1), FTOptions(ae_epochs=1, **options)).to(dtype)
    torch.manual_seed(0)
    method.prepare([batch(dtype)])
    return method


@pytest.mark.parametrize("p", [1, 2])
def test_terms_are_the_formula(p):
    method, (x, y) = make(p=p, ce_weight=0.5, factor_weight=300.0), batch()
    terms = method(x, y)
    mine = method.translator(staged(method.student).features(x)[1][-1]).flatten(1)
    theirs = method.paraphraser.net(staged(method.teacher.net).features(x)[1][-1]).flatten(1)
    assert mine.shape == theirs.shape == (6, 32 * 4 * 4)
    distance = (mine / mine.norm(dim=1, keepdim=True) - theirs / theirs.norm(dim=1, keepdim=True)).abs()
    want = {"ce": 0.5 * F.cross_entropy(method.student(x), y), "ft": 300 * distance.pow(p).mean() ** (1 / p)}
    torch.testing.assert_close(terms, want)


def test_factor_channels():
    method, (x, y) = make(factor_channels=6), batch()
    assert method.paraphraser.net[-3].out_channels == method.translator[-3].out_channels == 6
    assert method(x, y)["ft"] > 0


def test_a_larger_factor_is_pooled():
    student, teacher = create_model("shufflenet_v1", 4), net("resnet14", 1)  # maps of 2 x 2 and of 4 x 4
    method, (x, y) = FT(student, teacher, FTOptions(ae_epochs=1)).double(), batch()
    method.prepare([batch()])
    mine = method.translator(staged(method.student).features(x)[1][-1]).flatten(1)
    theirs = method.paraphraser.net(staged(method.teacher.net).features(x)[1][-1])
    theirs = theirs.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).mean((3, 5)).flatten(1)
    distance = (mine / mine.norm(dim=1, keepdim=True) - theirs / theirs.norm(dim=1, keepdim=True)).abs().mean()
    torch.testing.assert_close(method(x, y)["ft"], 500 * distance)


def test_training_moves_student_and_translator_alone():
    method = make()
    frozen = (method.teacher.net, method.paraphraser.net)
    before = copy.deepcopy([part.state_dict() for part in frozen])
    method.train()
    sum(method(*batch()).values()).backward()
    assert all(p.grad is not None for p in method.parameters())
    assert {name.split(".")[0] for name in method.state_dict()} == {"student", "translator"}
    for old, part in zip(before, frozen, strict=True):
        assert not any(module.training for module in part.modules())
        assert all(torch.equal(value, part.state_dict()[name]) for name, value in old.items())
        assert all(p.grad is None for p in part.parameters())


def test_the_paraphraser_is_kept_and_reused(tmp_path, monkeypatch):
    done, real = [], autoencoder.train_auto_encoder
    monkeypatch.setattr(autoencoder, "train_auto_encoder", lambda *a: done.append(1) or real(*a))
    kept = []
    for _ in range(2):
        method = FT(net(), net("resnet14", 1), FTOptions(ae_epochs=1))
        method.prepare([batch(torch.float32)], RunContext(folder=tmp_path))
        kept.append(method.paraphraser.net.state_dict())
    assert len(done) == 1 and [file.name for file in tmp_path.iterdir()] == ["paraphraser.safetensors"]
    assert all(torch.equal(value, kept[1][name]) for name, value in kept[0].items())


def test_a_whole_run(tiny_loaders, tmp_path):
    method = METHODS["ft"](net(), net("resnet14", 1), FTOptions(ae_epochs=1))
    result = Trainer(method, *tiny_loaders(), TrainOptions(epochs=1, lr=0.02, out=str(tmp_path / "run"))).fit()
    assert {"ce", "ft"} <= result.history[0].keys()
    assert load_file(result.student).keys() == net().state_dict().keys()


def test_bad_input_is_named():
    for options, message in (
        ({"factor_weight": 0.0}, "--factor-weight"),
        ({"ce_weight": -1.0}, "--ce-weight .*-1"),
        ({"p": 3}, "--p must be 1 or 2, got 3"),
        ({"ae_error": "l3"}, "--ae-error .*'l3'"),
    ):
        with pytest.raises(UserError, match=message):
            FTOptions(**options)
    with pytest.raises(UserError, match=r"prepare\(loader\)"):
        FT(net(), net("resnet14", 1))(*batch(torch.float32))
