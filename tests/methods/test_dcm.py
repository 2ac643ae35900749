"""DCM against the naive sum of all its cross-entropies and divergences."""

import copy

import pytest
import torch
import torch.nn.functional as F
from refused import check_refused
from safetensors.torch import save_file

from fastkd import create_model
from fastkd.errors import UserError
from fastkd.methods import DCM, DML
from fastkd.methods.dcm import DCMOptions, draw_as_dcm


def net(name, seed=0):
    torch.manual_seed(seed)
    return create_model(name, 4).double()


def batch():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(5, 3, 16, 16, generator=generator, dtype=torch.float64)
    return images, torch.randint(4, (5,), generator=generator)


def method_of(names=("resnet8", "resnet8"), **options):
    nets = [net(name, seed) for seed, name in enumerate(names)]
    torch.manual_seed(9)
    return DCM(nets[0], peers=nets[1:], options=DCMOptions(**options)).train()


def all_logits(method, images):
    """Every head of every network, from copies and from the networks' own parts."""
    heads = []
    for network, auxiliary in zip((method.student, *method.peers), method.heads, strict=True):
        network, auxiliary = copy.deepcopy(network), copy.deepcopy(auxiliary)
        x, maps = network.relu(network.bn1(network.conv1(images))), []
        for layer in (network.layer1, network.layer2, network.layer3):
            x = layer(x)
            maps.append(x)
        heads.append([head(m) for head, m in zip(auxiliary, maps[:-1], strict=True)])
        heads[-1].append(network.fc(network.avgpool(x).flatten(1)))
    return heads


def kl(learner, source):
    return F.kl_div(F.log_softmax(learner, 1), F.softmax(source.detach(), 1), reduction="batchmean")


def test_six_cross_entropies_and_eighteen_divergences():
    method = method_of()
    images, target = batch()
    p, q = all_logits(method, images)
    assert len(p) == len(q) == 3
    terms = method(images, target)
    want = {
        "ce": F.cross_entropy(p[-1], target),
        "ce_heads": sum(F.cross_entropy(z, target) for z in p[:-1]),
        "kl": sum(kl(a, b) for a in p for b in q),
        "ce_peer1": F.cross_entropy(q[-1], target),
        "ce_heads_peer1": sum(F.cross_entropy(z, target) for z in q[:-1]),
        "kl_peer1": sum(kl(b, a) for a in p for b in q),
    }
    assert terms.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("same, cross", [(1.0, 0.0), (0.0, 1.0), (0.5, 2.0)])
def test_pairs_of_the_same_and_of_different_stages(same, cross):
    method = method_of(same_stage=same, cross_stage=cross, kl_weight=0.7)
    images, target = batch()
    p, q = all_logits(method, images)
    weight = [[same if i == j else cross for j in range(3)] for i in range(3)]
    want = sum(0.7 * weight[i][j] * kl(p[i], q[j]) for i in range(3) for j in range(3))
    torch.testing.assert_close(method(images, target)["kl"], want, rtol=1e-10, atol=1e-12)


def test_swapping_the_networks_leaves_the_loss_unchanged():
    method = method_of()
    images, target = batch()
    other = DCM(copy.deepcopy(method.peers[0]), peers=[copy.deepcopy(method.student)]).double().train()
    other.heads[0].load_state_dict(method.heads[1].state_dict())
    other.heads[1].load_state_dict(method.heads[0].state_dict())
    a, b = (sum(m(images, target).values()) for m in (method, other))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_equal_logits_have_nothing_to_teach(monkeypatch):
    method = method_of()
    same = torch.randn(5, 4, dtype=torch.float64)
    monkeypatch.setattr(method, "logits", lambda out, net, heads: [same.clone() for _ in range(3)])
    terms = method(*batch())
    assert terms["kl"].abs() < 1e-12 and terms["kl_peer1"].abs() < 1e-12


def test_every_logit_gradient_sums_to_zero_over_the_classes(monkeypatch):
    method = method_of()
    heads = [[torch.randn(5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)] for _ in range(2)]
    logits = iter(heads)
    monkeypatch.setattr(method, "logits", lambda out, net, auxiliary: next(logits))
    sum(method(*batch()).values()).backward()
    for z in (z for network in heads for z in network):
        assert z.grad.abs().sum() > 0.01
        assert z.grad.sum(1).abs().max() < 1e-12


def test_with_the_last_heads_alone_it_is_mutual_learning():
    method = method_of()
    mutual = DML(copy.deepcopy(method.student), peers=[copy.deepcopy(method.peers[0])]).train()
    method.heads = torch.nn.ModuleList(torch.nn.ModuleList() for _ in range(2))
    method.logits = lambda out, net, heads: [out(net)]
    images, target = batch()
    mine, theirs = method(images, target), mutual(images, target)
    assert len(mine) == len(theirs) == 4
    for a, b in zip(mine.values(), theirs.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("names", [("resnet8", "wrn_16_1"), ("resnet8", "resnet8", "resnet14")])
def test_other_networks_and_more_of_them(names):
    method = method_of(names)
    terms = method(*batch())
    sum(terms.values()).backward()
    assert list(terms)[:3] == ["ce", "ce_heads", "kl"] and len(terms) == 3 * len(names)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters())


def test_heads_are_not_saved_with_the_networks():
    method = method_of()
    assert list(method.networks()) == ["student", "peer1"]
    for network in method.networks().values():
        assert set(network.state_dict()) == set(create_model("resnet8", 4).state_dict())
    assert any(name.startswith("heads.") for name in method.state_dict())


@pytest.mark.parametrize(
    "options, word", [({"kl_weight": -1}, "--kl-weight"), ({"same_stage": -1}, "--same-stage"),
                      ({"ce_weight": 0, "kl_weight": 0}, "nothing is learnt")])  # fmt: skip
def test_options_out_of_range(options, word):
    with pytest.raises(ValueError, match=word):
        DCMOptions(**options)


def test_one_network_is_not_enough():
    with pytest.raises(UserError, match="DCM needs one or more peers"):
        DCM(net("resnet8"))


@pytest.mark.parametrize("init", ["default", "dcm"])
def test_initial_weights_of_the_authors_code(init):
    """Of Wide ResNets and their heads: He by fan-in, BatchNorm weights from U(0, 1). Their MobileNet is torch's."""
    torch.manual_seed(0)
    wide, mobile = create_model("wrn_16_2", 4), create_model("mobilenet", 4)
    before = mobile.state_dict()["layer3.1.bn2.weight"].clone()
    torch.manual_seed(1)
    method = DCM(wide, peers=[mobile], options=DCMOptions(init=init))
    norms = torch.cat(
        [m.weight for part in (wide, method.heads[0]) for m in part.modules() if hasattr(m, "running_var")]
    )
    if init == "default":
        assert (norms == 1).all()
        return
    assert 0 <= norms.min() and norms.max() < 1 and abs(norms.mean() - 0.5) < 0.05
    for conv in (wide.block3.layer[0].conv1, method.heads[0][0][0].layer[0].conv1):
        fan_in = conv.weight[0].numel()
        assert conv.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.05)
    assert wide.fc.weight.std().item() == pytest.approx((2 / 128) ** 0.5, rel=0.15) and not wide.fc.bias.any()
    assert torch.equal(mobile.state_dict()["layer3.1.bn2.weight"], before)
    assert not torch.equal(method.heads[0][-1][-1].weight, wide.fc.weight)


def test_an_initialisation_that_would_overwrite_weights_is_refused(fastkd, tmp_path):
    save_file(create_model("resnet8", 10).state_dict(), tmp_path / "w.safetensors")
    words = [
        "--method",
        "dcm",
        "--init",
        "dcm",
        "--student",
        "resnet8",
        "--student-weights",
        str(tmp_path / "w.safetensors"),
    ]
    check_refused(fastkd("train", *words), "--init dcm draws all weights anew", "w.safetensors")
    check_refused(fastkd("train", "--method", "dcm", "--init", "dmc"), "--init", "'dmc'")


def test_weights_are_not_overwritten_in_a_sum_either(fastkd, tmp_path):
    save_file(create_model("resnet8", 10).state_dict(), tmp_path / "w.safetensors")
    words = ["--method", "kd+dcm", "--dcm-init", "dcm", "--student", "resnet8", "--student-weights"]
    words += [str(tmp_path / "w.safetensors"), "--teacher", "resnet8", "--teacher-epochs", "1"]
    check_refused(fastkd("train", *words), "--dcm-init dcm draws all weights anew", "w.safetensors")


def test_norms_without_weights_stay_without():
    norm = torch.nn.BatchNorm2d(3, affine=False)
    draw_as_dcm(torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1), norm))
    assert norm.weight is None and norm.bias is None
