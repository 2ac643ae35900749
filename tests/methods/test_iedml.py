"""IE-DML: DML, and in each network two halves against the other's last map."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from fastkd import Trainer, TrainOptions, create_model
from fastkd.errors import UserError
from fastkd.methods import METHODS
from fastkd.methods.iedml import IEDML, IEDMLOptions
from fastkd.models import staged


def net(name: str = "resnet8", seed: int = 0):
    torch.manual_seed(seed)
    return create_model(name, 4)


def batch(dtype=torch.float64):
    images = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(3), dtype=dtype)
    return images, torch.arange(6) % 4


def make(dtype=torch.float64, peer="resnet14", **options):
    return IEDML(net(), None, IEDMLOptions(**options), [net(peer, 1)]).to(dtype)


def distance(x, t, p):
    unit = lambda f: f.flatten(1) / f.flatten(1).norm(dim=1, keepdim=True)  # noqa: E731
    return (unit(x) - unit(t)).abs().pow(p).mean() ** (1 / p)


@pytest.mark.parametrize("p", [1, 2])
def test_terms_are_the_formula(p):
    method = make(peer="resnet8x4", p=p, inheritance_weight=30.0, exploration_weight=20.0, kl_weight=0.7)
    x, y = batch()
    nets, terms, want = (method.student, method.peers[0]), method(x, y), {}
    (z, f), (other_z, other_f) = ((logits, maps[-1]) for logits, maps in (staged(n).features(x) for n in nets))
    for i, end in enumerate(("", "_peer1")):
        a, b, half = (z, other_z, 32) if i == 0 else (other_z, z, 128)
        mine, wanted = (f, other_f) if i == 0 else (other_f, f)
        log, soft = F.log_softmax(a, 1), F.softmax(b, 1)
        inherit, explore = method.encoders[i]
        want |= {
            f"ce{end}": F.cross_entropy(a, y),
            f"kl{end}": 0.7 * (soft * (soft.log() - log)).sum(1).mean(),
            f"inheritance{end}": 30 * distance(inherit(mine[:, :half]), wanted, p),
            f"exploration{end}": -20 * distance(explore(mine[:, half:]), wanted, p),
        }
    torch.testing.assert_close(dict(sorted(terms.items())), dict(sorted(want.items())))


def test_each_term_teaches_its_own_network_alone():
    method = make()
    terms = method(*batch())
    one, other = list(method.student.parameters()), list(method.peers[0].parameters())
    for name, term in terms.items():
        mine, theirs = (other, one) if name.endswith("_peer1") else (one, other)
        moved = torch.autograd.grad(term, mine, retain_graph=True, allow_unused=True)
        assert any(g is not None and g.abs().max() > 0 for g in moved), name
        still = torch.autograd.grad(term, theirs, retain_graph=True, allow_unused=True)
        assert all(g is None or not g.any() for g in still), name


@pytest.mark.parametrize("name,own", [("inheritance", slice(0, 32)), ("exploration", slice(32, 64))])
def test_gradients_stay_in_their_own_half(name, own):
    method, maps = make(), []
    method.student.layer3.register_forward_hook(lambda m, a, y: y.retain_grad() or maps.append(y))
    method(*batch())[name].backward()
    gradient = maps[0].grad
    assert gradient[:, own].abs().max() > 0
    gradient[:, own] = 0
    assert not gradient.any()


def test_with_weights_0_it_is_dml():
    x, y = batch(torch.float32)
    method = make(torch.float32, inheritance_weight=0.0, exploration_weight=0.0)
    dml = METHODS["dml"](net(), None, None, [net("resnet14", 1)])
    assert method.state_dict().keys() == dml.state_dict().keys()
    for one in (method, dml):
        one.train()
        sum(one(x, y).values()).backward()
    for mine, theirs in zip(method.parameters(), dml.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)


@pytest.mark.parametrize("weights", [(50.0, 0.0), (0.0, 50.0), (50.0, 50.0)])
def test_every_weight_has_a_gradient(weights):
    method = make(inheritance_weight=weights[0], exploration_weight=weights[1])
    sum(method(*batch()).values()).backward()
    assert all(p.grad is not None for p in method.parameters())


def test_a_whole_run(tiny_loaders, tmp_path):
    method = METHODS["iedml"](net(), None, None, [net("resnet14", 1)])
    result = Trainer(method, *tiny_loaders(), TrainOptions(epochs=1, lr=0.02, out=str(tmp_path / "run"))).fit()
    assert {"ce", "kl", "inheritance", "exploration_peer1", "top1", "peer1_top1"} <= result.history[0].keys()
    assert load_file(result.student).keys() == net().state_dict().keys()
    assert load_file(result.out / "peer1.safetensors").keys() == net("resnet14").state_dict().keys()


def test_bad_input_is_named():
    for options, message in (
        ({"kl_weight": -1.0}, "--kl-weight .*-1"),
        ({"p": 3}, "--p must be 1 or 2, got 3"),
        ({"kl_weight": 0.0, "inheritance_weight": 0.0, "exploration_weight": 0.0}, "all 0"),
    ):
        with pytest.raises(UserError, match=message):
            IEDMLOptions(**options)
    with pytest.raises(UserError, match="got 2 peers"):
        IEDML(net(), None, None, [net(), net()])
    with pytest.raises(UserError, match=r"\(64, 16, 16\).*CifarResNet.*\(512, 2, 2\).*ResNet"):
        IEDML(net(), None, None, [create_model("torchvision/resnet18", 4)])
