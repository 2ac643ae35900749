"""Several teachers as one network: equal to the mean written by hand, and frozen as one teacher is."""

import copy
import math

import pytest
import torch
from every_method import batch
from torch import nn

from fastkd import create_model
from fastkd.engine.fuse_conv_bn import fuse_conv_bn, fuse_relu
from fastkd.engine.precision import Precision
from fastkd.engine.teacher_forms import FORMS, choose_form
from fastkd.errors import UserError
from fastkd.methods import AT, KD, FrozenTeacher
from fastkd.methods.kd import KDOptions
from fastkd.models import Ensemble, staged


class Says(nn.Module):
    """Gives these logits for any images."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, images):
        return self.logits


def logits(count=3, dtype=torch.float64):
    return list(torch.randn(count, 5, 7, generator=torch.Generator().manual_seed(0)).to(dtype) * 4)


def said(z, **options):
    return Ensemble([Says(each) for each in z], **options)(torch.zeros(5, 3, 8, 8))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("weights", [None, (1, 2, 5)])
def test_the_softened_output_is_the_mean_of_the_softened_probabilities(temperature, weights):
    z, w = logits(), torch.tensor(weights or (1, 1, 1)).double()
    wanted = sum(share * each.div(temperature).softmax(1) for share, each in zip(w / w.sum(), z, strict=True))
    found = said(z, weights=weights, temperature=temperature)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.div(temperature).softmax(1), wanted, rtol=1e-12, atol=1e-14)


def test_the_mean_of_logits():
    z = logits()
    torch.testing.assert_close(said(z, mean="logits"), sum(z) / 3, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(said(z, mean="logits", weights=[1, 0.5, 0.5]), z[0] / 2 + z[1] / 4 + z[2] / 4)


@pytest.mark.parametrize("mean", ["probabilities", "logits"])
def test_one_network_says_what_it_says_alone(mean):
    (z,) = logits(1)
    torch.testing.assert_close(said([z], mean=mean, temperature=3.0).softmax(1), z.softmax(1), rtol=1e-12, atol=0)


def test_extreme_logits():
    """A class that one network excludes has the others' share; one that all exclude stays at -inf. No NaN."""
    one, other = torch.tensor([[0.0, -math.inf, -math.inf]]), torch.tensor([[1e30, 1e30, -math.inf]])
    torch.testing.assert_close(said([one, other]).softmax(1), torch.tensor([[0.75, 0.25, 0.0]]))
    assert said([torch.tensor([[3e4, -3e4]]).half()] * 2).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mean", ["probabilities", "logits"])
def test_half_precision_is_averaged_in_fp32(mean, dtype):
    z = logits(dtype=dtype)
    found = said(z, mean=mean)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, said([each.double() for each in z], mean=mean).float())


@pytest.mark.parametrize(
    "options, words",
    [
        ({"weights": [1.0]}, "2 teachers have 1 weights"),
        ({"weights": [1, 0]}, "numbers above 0, got 1 0"),
        ({"weights": [1, -2]}, "numbers above 0, got 1 -2"),
        ({"weights": [1, math.nan]}, "numbers above 0, got 1 nan"),
        ({"weights": [1, math.inf]}, "numbers above 0, got 1 inf"),
        ({"weights": [1e-320, 1e10]}, "numbers above 0"),
        ({"mean": "median"}, "probabilities, logits, got 'median'"),
        ({"temperature": 0.0}, "temperature must be a number above 0"),
    ],
)
def test_wrong_options(tiny_net, options, words):
    with pytest.raises(UserError, match=words):
        Ensemble([tiny_net(), tiny_net(1)], **options)


def test_networks_that_do_not_fit(tiny_net):
    with pytest.raises(UserError, match="at least one network"):
        Ensemble([])
    with pytest.raises(UserError, match="the teachers have 4, 5 classes"):
        Ensemble([tiny_net(), tiny_net(num_classes=5)])(torch.zeros(2, 3, 8, 8))


def test_no_feature_maps():
    ensemble = Ensemble([create_model("resnet8", 10), create_model("resnet8", 10)])
    with pytest.raises(UserError, match="2 teachers together have no feature maps: give one teacher"):
        staged(ensemble)
    with pytest.raises(UserError, match="logits alone"):
        AT(create_model("resnet8", 10), ensemble)


def taught(seed, name="resnet8"):
    torch.manual_seed(seed)
    net = create_model(name, 10)
    for number in range(3):
        net(batch(number)[0])  # BatchNorm statistics that are not trivial
    return net


@pytest.mark.parametrize("mean", ["probabilities", "logits"])
def test_kd_learns_from_the_mean_and_the_teachers_stay(mean):
    """The loss has the value of the mean written by hand; no step changes a teacher's weights or statistics."""
    nets, student, (images, target) = [taught(1), taught(2, "resnet14")], taught(3), batch(0)
    ensemble = Ensemble(nets, weights=[3, 1], mean=mean, temperature=4.0)
    method = KD(student, ensemble, KDOptions(temperature=4.0, ce_weight=0.0, kd_weight=1.0)).train()
    before = copy.deepcopy(ensemble.state_dict())
    (loss,) = [term for name, term in method(images, target).items() if name == "kd"]
    z = [net(images) for net in nets]
    p = (0.75 * z[0] + 0.25 * z[1]).div(4).softmax(1)
    if mean == "probabilities":
        p = 0.75 * z[0].div(4).softmax(1) + 0.25 * z[1].div(4).softmax(1)
    q = student(images).div(4).log_softmax(1)
    torch.testing.assert_close(loss, 16 * nn.functional.kl_div(q, p, reduction="batchmean"), rtol=1e-4, atol=1e-6)
    loss.backward()
    assert all(not module.training for module in ensemble.modules())
    assert all(p.grad is None and not p.requires_grad for p in ensemble.parameters())
    assert all(torch.equal(value, before[key]) for key, value in ensemble.state_dict().items())
    assert all(key.startswith("student.") for key in method.state_dict())


def test_batch_statistics_reach_every_network():
    teacher = FrozenTeacher(Ensemble([taught(1), taught(2)]), batch_statistics=True).train()
    norms = [module for module in teacher.net.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms and all(norm.training and not norm.track_running_stats for norm in norms)


@pytest.mark.parametrize("mean", ["probabilities", "logits"])
@torch.no_grad()
def test_folded_and_fused_give_the_same_logits(mean):
    ensemble = Ensemble([taught(1), taught(2, "resnet14")], mean=mean).eval()
    images = batch(0)[0]
    wanted, twin = ensemble(images), fuse_conv_bn(ensemble, images)
    assert not [module for module in twin.modules() if isinstance(module, nn.BatchNorm2d)]
    for form in (twin, fuse_relu(twin)):
        torch.testing.assert_close(form(images), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", [name for name in FORMS if name != "compiled"])
def test_teacher_forms(form):
    lines, images = [], batch(0)[0]
    method = KD(taught(3), Ensemble([taught(1), taught(2)])).train()
    wanted = method(images, batch(0)[1])["kd"]
    assert choose_form(method, images, form, Precision("float32", torch.device("cpu")), lines.append) == form
    torch.testing.assert_close(method(images, batch(0)[1])["kd"], wanted, rtol=1e-3, atol=1e-5)
    assert not any("not possible" in line for line in lines)


def test_one_graph_of_the_compiler():
    ensemble = Ensemble([taught(1), taught(2)], weights=[1, 2]).eval()
    images = batch(0)[0]
    compiled = torch.compile(ensemble, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), ensemble(images))
