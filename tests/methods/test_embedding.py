"""The classifier's input: for any network, from the one forward pass of a step, in every way in which a step runs."""

import copy
import weakref

import pytest
import timm
import torch
import torchvision
from torch import nn

from fastkd import create_model
from fastkd.engine.ema import Ema
from fastkd.engine.partial_graphs import PartialGraphStep
from fastkd.engine.precision import Precision
from fastkd.engine.teacher_forms import choose_form
from fastkd.errors import UserError
from fastkd.methods import METHODS, ForwardCache, find_method
from fastkd.methods.embedding import ClassifierInput, classifier_input
from fastkd.models import Ensemble

CPU = torch.device("cpu")
LABELS = torch.tensor([1, 0, 2])  # RKD's distances of two images are always 1


class NoStages(nn.Module):
    """A network of a user, without modules that could be stages."""

    def __init__(self, width: int = 6):
        super().__init__()
        self.mix = nn.Conv2d(3, width, 3)
        self.out = nn.Linear(width, 4)

    def forward(self, x):
        return self.out(self.mix(x).relu().mean((2, 3)))


def vit(**options):
    options = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 2} | options
    return timm.create_model("vit_tiny_patch16_224", num_classes=4, **options)


def deit(**options):
    options = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 2} | options
    return timm.create_model("deit_tiny_distilled_patch16_224", num_classes=4, **options)


NETS = {
    "ours": (lambda: create_model("resnet8", 4), 64),
    "wide": (lambda: create_model("wrn_10_1", 4), 64),
    "torchvision": (lambda: torchvision.models.mobilenet_v3_small(num_classes=4), 1024),
    "conv classifier": (lambda: torchvision.models.squeezenet1_1(num_classes=4), 512),
    "vit": (vit, 24),
    "two classifiers": (deit, 24),
    "own": (NoStages, 6),
}


def images() -> torch.Tensor:
    torch.manual_seed(5)
    return torch.randn(3, 3, 32, 32)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("training", [True, False])
def test_logits_keep_their_bits_and_the_network_runs_once(name, training):
    make, width = NETS[name]
    net, x, calls = make().train(training), images(), []
    torch.manual_seed(1)  # of dropout
    want = copy.deepcopy(net)(x)
    net.register_forward_hook(lambda *_: calls.append(1))
    out = ForwardCache(x, {}, {net: classifier_input(net)})
    torch.manual_seed(1)
    embedding = out.embedding(net)
    assert torch.equal(out(net), want) and len(calls) == 1
    assert embedding.shape == (3, width) and embedding is out.embedding(net)
    if name != "conv classifier" and name != "two classifiers":
        assert torch.equal(next(reversed([m for m in net.modules() if type(m) is nn.Linear]))(embedding), want)


def test_of_two_classifiers_that_of_the_class_token_counts():
    net = deit().eval()
    tokens = net.forward_features(images())
    out = ForwardCache(images(), {}, {net: classifier_input(net)})
    assert torch.equal(out.embedding(net), net.fc_norm(tokens)[:, 0] if hasattr(net, "fc_norm") else tokens[:, 0])


@pytest.mark.parametrize("name", ["rkd", "sp"])
@pytest.mark.parametrize("student, teacher", [("own", "vit"), ("vit", "own"), ("torchvision", "two classifiers")])
def test_any_two_networks(name, student, teacher):
    method = find_method(name)(NETS[student][0](), NETS[teacher][0]()).train()
    terms = method(images(), LABELS)
    sum(terms.values()).backward()
    assert terms[name] > 0 and all(p.grad is None for p in method.teacher.net.parameters())
    assert any(p.grad.abs().sum() > 0 for p in method.student.parameters() if p.grad is not None)


def test_it_must_be_requested():
    with pytest.raises(ValueError, match=r"did not call request_embeddings\(\) for NoStages"):
        ForwardCache(images(), {}).embedding(NoStages())


def test_a_classifier_that_is_not_called_is_named():
    net = NoStages()
    hook = classifier_input(net)
    net.forward = lambda x: net.mix(x).mean((2, 3))
    with pytest.raises(UserError, match="NoStages did not call its classifier 'out'"):
        ForwardCache(images(), {}, {net: hook})(net)


def test_a_classifier_that_is_not_known_is_refused():
    net = nn.Sequential(nn.Flatten(), nn.Linear(3072, 4), nn.BatchNorm1d(4))
    with pytest.raises(
        UserError, match=r"classifier is compared, but .* ends with '2', a BatchNorm1d.*; use kd or dkd"
    ):
        METHODS["rkd"](net, NoStages())


def test_several_teachers_have_no_one_classifier():
    with pytest.raises(UserError, match="2 teachers together have no one input of a classifier: give one teacher"):
        METHODS["sp"](NoStages(), Ensemble([NoStages(), NoStages()]))


def test_one_vector_per_image_is_needed():
    class Tokens(NoStages):
        def forward(self, x):
            return self.out(self.mix(x).flatten(2).mT).mean(1)

    net = Tokens()
    with pytest.raises(UserError, match=r"classifier 'out' of Tokens gets a tensor of shape \[3, 900, 6\]"):
        ForwardCache(images(), {}, {net: classifier_input(net)})(net)


def test_no_activation_outlives_its_step_nor_is_kept_outside_of_steps():
    method = METHODS["rkd"](NoStages(), NoStages())
    out = ForwardCache(images(), {}, method.classifiers)
    kept = weakref.ref(out.embedding(method.student))
    assert kept() is not None
    del out
    assert kept() is None
    average = Ema(nn.ModuleDict(method.networks()), 0.9)
    for net in (method.student, average.net["student"]):
        net(images())
    assert all(hook.kept is None and not hook.is_on for hook in method.classifiers.values())


def test_an_error_in_the_network_switches_it_off():
    net = NoStages()
    hook = classifier_input(net)
    with pytest.raises(RuntimeError):
        ForwardCache(torch.zeros(2, 5, 8, 8), {}, {net: hook})(net)
    assert not hook.is_on


def test_methods_of_a_sum_share_it():
    student, teacher = create_model("resnet8", 4), create_model("resnet14", 4)
    method = find_method("rkd+sp+at")(student, teacher).train()
    hooks = [hook for module in student.modules() for hook in module._forward_pre_hooks.values()]
    assert [type(hook) for hook in hooks] == [ClassifierInput]
    alone = {name: find_method(name)(student, teacher)(images(), LABELS)[name] for name in ("rkd", "sp", "at")}
    terms = method(images(), LABELS)
    assert all(torch.equal(terms[name], alone[name]) for name in alone)


def test_compiled_without_a_break():
    method = METHODS["rkd"](NoStages(), vit()).train()
    want = method(images(), LABELS)
    sum(want.values()).backward()
    gradients = [p.grad.clone() for p in method.parameters()]
    method.zero_grad()
    compiled = torch.compile(method, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        terms = compiled(images(), LABELS)
    sum(terms.values()).backward()
    torch.testing.assert_close(terms, want)
    torch.testing.assert_close([p.grad for p in method.parameters()], gradients)
    assert all(hook.kept is None for hook in method.classifiers.values())


@pytest.mark.parametrize("form", ["folded", "fused"])
def test_a_faster_form_of_the_teacher_gives_it_too(form):
    teacher = create_model("resnet14", 4).eval()
    for norm in (module for module in teacher.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
    method = METHODS["rkd"](create_model("resnet8", 4), teacher)
    want = ForwardCache(images(), {}, method.classifiers).embedding(method.teacher)
    precision = Precision("float32", CPU)
    assert choose_form(method, images(), form, precision, lambda line: None) == form
    out = ForwardCache(images(), method.staged_views, method.classifiers)
    torch.testing.assert_close(out.embedding(method.teacher), want, atol=1e-4, rtol=1e-4)
    assert method.staged_views[method.teacher] is not None and not torch.equal(out.embedding(method.teacher), want)


def test_a_path_of_swapped_blocks_gives_it_too():
    method = find_method("iakd+rkd")(create_model("resnet8", 4), create_model("resnet14", 4)).train()
    terms = method(images(), LABELS, ((True, False, True), None))
    sum(terms.values()).backward()
    assert terms["rkd"] > 0 and method.student.fc.weight.grad is not None


def test_its_classifier_is_not_replayed_alone():
    method = find_method("iakd+rkd")(create_model("resnet8", 4), create_model("resnet14", 4)).train()
    modules = {module for group in method.graph_groups() for part in group for module in part.modules()}
    assert method.student.fc not in modules and method.student.conv1 in modules

    class Stub:
        pass

    step = Stub()
    step.method = method
    graphed = PartialGraphStep(step, lambda: lambda: None)
    replayed = {module for each in graphed.modules for module in each.module.modules()}
    assert not replayed & {method.student.fc, method.teacher.net.fc}
