"""Forms of a frozen teacher: equal to the plain one, with fewer operations, refused where they are not."""

import copy
import re

import pytest
import torch
from capture import Capture
from every_method import batch, build, prepare
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastkd import create_model
from fastkd.engine import Step, TrainOptions, choose_form
from fastkd.engine import teacher_forms as forms
from fastkd.engine.fuse_conv_bn import FusedConvolution, fuse_conv_bn, fuse_relu
from fastkd.engine.precision import Precision, cast_frozen
from fastkd.errors import UserError
from fastkd.methods import IEKD, KD, OFD, SOKD, ForwardCache, find_method
from fastkd.methods.iekd import IEKDOptions
from fastkd.methods.sokd import SOKDOptions
from fastkd.models import staged

CPU = torch.device("cpu")
FP32 = Precision("float32", CPU)
NETS = [
    "resnet20",
    "wrn_16_2",
    "vgg8",
    "mobilenetv2",
    "torchvision/resnet18",
    "torchvision/mobilenet_v2",
    "torchvision/convnext_tiny",
    "torchvision/vgg11_bn",
    "torchvision/efficientnet_b0",
    "timm/resnet34",
    "timm/resnet50",
    "timm/efficientnet_b0",
    "timm/convnext_atto",
    "timm/regnetx_002",
]


def frozen(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A network with statistics that are not trivial, and images."""
    torch.manual_seed(0)
    net = create_model(name, 10).to(memory_format=torch.channels_last)
    for norm in (module for module in net.modules() if isinstance(module, _BatchNorm)):
        norm.running_mean.normal_(0, 0.1)
        norm.running_var.uniform_(0.5, 1.5)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, 0, 0.1)
    images = torch.randn(2, 3, *(2 * [64 if "/" in name else 32])).contiguous(memory_format=torch.channels_last)
    return net.eval().requires_grad_(False), images


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_folded_and_fused_give_the_same_logits_and_maps(name):
    net, images = frozen(name)
    before = copy.deepcopy(net.state_dict())
    logits, maps = staged(net).features(images)
    twin = fuse_conv_bn(net, images)
    view = staged(twin)
    parts, x = [fuse_relu(part) for part in (view.stem, *view.stages, view.head)], images
    outputs = [x := part(x) for part in parts]
    for found, mine in ((twin(images), view.features(images)[1]), (outputs[-1], outputs[1:-1])):
        assert relative(found, logits) < 1e-4
        for a, b in zip(mine, maps, strict=True):
            assert relative(a, b) < 1e-4
            assert a.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def called(function) -> list[str]:
    with torch.no_grad(), Capture() as graph:
        function()
    return graph.names


def count(names: list[str], pattern: str) -> int:
    return sum(bool(re.search(pattern, name)) for name in names)


def test_what_a_folded_and_a_fused_resnet_50_run():
    net, images = frozen("timm/resnet50")
    plain = called(lambda: net(images))
    assert count(plain, "batch_norm") == 53 and count(plain, "convolution") == 53
    twin = fuse_conv_bn(net, images)
    fewer = called(lambda: twin(images))
    assert count(fewer, "batch_norm") == 0 and count(fewer, "convolution") == 53
    view = staged(twin)
    parts = [fuse_relu(part) for part in (view.stem, *view.stages, view.head)]

    def run():
        x = images
        for part in parts:
            x = part(x)

    least = called(run)
    assert count(least, "convolution") == 53
    assert count(least, "pool|mean") == 2 and count(least, "addmm|linear") == 1
    assert count(least, r"relu|aten\.add[_.]|to_copy|batch_norm") == 0
    assert len(least) < len(fewer) < len(plain)


def test_no_frozen_weight_is_cast_in_a_step():
    """Under autocast the plain teacher casts its weights at every forward pass, a form only the images."""
    net, images = frozen("resnet20")
    bf16 = Precision("bfloat16", CPU)
    method = KD(create_model("resnet8", 10), net)

    def casts() -> int:
        def run():
            with torch.autocast("cpu", torch.bfloat16):
                ForwardCache(images, method.staged_views)(method.teacher)

        return count(called(run), "_to_copy")

    assert casts() > 20
    for form in ("folded", "fused"):
        choose_form(method, images, form, bf16, lambda line: None)
        assert casts() == 1


def test_a_norm_that_does_not_follow_a_convolution_stays():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)
            self.first = nn.BatchNorm2d(3)

        def forward(self, x):
            return self.fc(self.bn(self.conv(self.first(x)).relu()).mean((2, 3)))

    net = Branching().eval()
    twin = fuse_conv_bn(net, torch.randn(2, 3, 8, 8))
    assert isinstance(twin.bn, nn.BatchNorm2d) and isinstance(twin.first, nn.BatchNorm2d)


@pytest.mark.parametrize("wanted", ["folded", "fused", "compiled", "auto"])
def test_every_form_under_a_method(wanted):
    net, images = frozen("resnet20")
    lines = []
    method = SOKD(create_model("resnet8", 10), net, SOKDOptions(feature="at")).train()
    target = torch.tensor([1, 2])
    before = method(images, target)
    name = choose_form(method, images, wanted, FP32, lines.append)
    assert name == wanted or wanted == "auto"
    assert (name == "plain") == (type(method.staged_views[method.teacher]).__name__ == "Staged")
    again = method(images, target)
    torch.testing.assert_close(before["kd_at"], again["kd_at"], rtol=1e-3, atol=1e-4)
    assert "same top class" in lines[0] and lines[-1] == f"teacher form: {name}"


def test_a_form_that_is_wrong_is_refused(monkeypatch):
    net, images = frozen("resnet20")
    right = forms.fuse_conv_bn

    def broken(net, images):
        twin = right(net, images)
        twin.fc.weight.mul_(-5)
        return twin

    monkeypatch.setattr(forms, "fuse_conv_bn", broken)
    method, lines = KD(create_model("resnet8", 10), net), []
    assert choose_form(method, images, "auto", FP32, lines.append) == "plain" and not method.staged_views
    assert any("refused: it differs by" in line for line in lines)
    with pytest.raises(UserError, match="--teacher-form folded: refused"):
        choose_form(method, images, "folded", FP32, lines.append)


def test_a_net_that_cannot_be_traced_says_so():
    class Asking(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x) if x.shape[0] > 0 else x

    net, images = frozen("resnet20")
    method, lines = KD(create_model("resnet8", 10), Asking(net)), []
    name = choose_form(method, images, "auto", FP32, lines.append)
    assert name in ("plain", "folded") and any("not possible" in line for line in lines)
    with pytest.raises(UserError, match="--teacher-form fused"):
        choose_form(method, images, "fused", FP32, lines.append)


@pytest.mark.parametrize("method, word", [
    (lambda s, t: SOKD(s, t, SOKDOptions(teacher_bn="batch")), "statistics of the batch"),
    (lambda s, t: OFD(s, t), "before the activation"),
])  # fmt: skip
def test_teachers_that_must_stay_plain(method, word):
    net, images = frozen("resnet20")
    method, lines = method(create_model("resnet8", 10), net), []
    assert choose_form(method, images, "auto", FP32, lines.append) == "plain" and word in lines[0]
    with pytest.raises(UserError, match=word):
        choose_form(method, images, "folded", FP32, lines.append)


def test_a_fused_convolution_is_the_sequence():
    torch.manual_seed(0)
    for groups, stride in ((1, 1), (4, 2)):
        convolution = nn.Conv2d(8, 8, 3, stride, 1, groups=groups).requires_grad_(False)
        layer, x = FusedConvolution(convolution), torch.randn(2, 8, 9, 9).contiguous(memory_format=torch.channels_last)
        z = torch.randn_like(convolution(x))
        torch.testing.assert_close(layer(x), convolution(x).relu())
        torch.testing.assert_close(layer(x, z), (convolution(x) + z).relu())
        layer.variant = "separate"
        torch.testing.assert_close(layer(x, z.clone()), (convolution(x) + z).relu())


def test_the_last_step_keeps_its_form(tiny_net):
    """IE-KD takes the maps of the form: its terms stay those of the plain teacher."""
    net, images = frozen("resnet20")
    method = IEKD(create_model("resnet8", 10), net, IEKDOptions(variant="attention")).train()
    target = torch.tensor([1, 2])
    plain = method(images, target)
    choose_form(method, images, "folded", FP32, lambda line: None)
    for name, value in method(images, target).items():
        torch.testing.assert_close(value, plain[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["at+kd", "kd+at"])
def test_in_a_sum_one_part_needs_maps_and_another_does_not(name):
    net, images = frozen("resnet20")
    method = find_method(name)(create_model("resnet8", 10), net).train()
    target = torch.tensor([1, 2])
    plain = method(images, target)
    assert choose_form(method, images, "folded", FP32, lambda line: None) == "folded"
    for term, value in method(images, target).items():
        torch.testing.assert_close(value, plain[term], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["iakd", "iakd --teacher-bn batch", "kd", "ofd", "iekd"])
def test_frozen_weights_are_cast_once_without_changing_a_bit(name):
    """After it a step casts none of them: IAKD's swapped-in blocks run as they were trained, under autocast."""
    states, casts = [], []
    for ready in (lambda *given: None, cast_frozen):
        method = build(name)
        prepare(method)
        step = Step(method, TrainOptions(lr=0.05, amp_dtype="bfloat16"), torch.device("cpu"))
        saved = {key: value.dtype for net in method.networks().values() for key, value in net.state_dict().items()}
        ready(method, batch(0, 8)[0], step.precision)
        weights = {p.data_ptr() for p in method.teacher.net.parameters() if p.dim() > 1}
        with Capture() as calls:
            for number in range(3):
                step(*batch(number, 8), method.plan(number))
        casts.append(sum("_to_copy" in str(func) and args[0].data_ptr() in weights for func, args, *_ in calls.calls))
        assert saved == {key: v.dtype for net in method.networks().values() for key, v in net.state_dict().items()}
        states.append(step.state_dict()["method"])
    assert casts[0] > 0 and casts[1] == 0
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def compiler(monkeypatch, backend) -> None:
    """torch.compile with another backend."""
    right = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: right(function, backend=backend, **options))


def test_a_compiler_that_fails_at_its_first_call_is_no_form(monkeypatch):
    """torch.compile is lazy: the call that compiles must be one that may fail."""

    def fails(graph, inputs):
        raise OSError("no compiler here")

    compiler(monkeypatch, fails)
    monkeypatch.setattr(forms, "FORMS", ("plain", "compiled"))  # what "auto" tries on a GPU
    net, images = frozen("resnet20")
    method, lines = KD(create_model("resnet8", 10), net), []
    assert choose_form(method, images, "auto", FP32, lines.append) == "plain" and not method.staged_views
    assert any(line.startswith("teacher form compiled") and "no compiler here" in line for line in lines)
    method(images, torch.tensor([1, 2]))
    with pytest.raises(UserError, match="--teacher-form compiled: not possible.*no compiler here"):
        choose_form(method, images, "compiled", FP32, lines.append)


def test_a_step_compiles_nothing_that_was_not_tried(monkeypatch):
    """Neither autocast around the step, nor the memory format, nor the odd last batch calls the compiler again."""
    calls = []

    def count_calls(graph, inputs):
        calls.append(inputs)
        return graph

    torch._dynamo.reset()
    compiler(monkeypatch, count_calls)
    net, images = frozen("resnet20")
    method, fp16 = KD(create_model("resnet8", 10), net), Precision("float16", CPU)
    choose_form(method, images, "compiled", fp16, lambda line: None)
    before = len(calls)
    assert before
    for batch_, cache in ((images, True), (images.contiguous(), True), (images, False), (images[:1], True)):
        with torch.autocast("cpu", torch.float16, cache_enabled=cache):
            logits = ForwardCache(batch_, method.staged_views)(method.teacher)
        torch.testing.assert_close(logits.float(), net(batch_), rtol=0.05, atol=0.05)
    assert len(calls) == before


@torch.no_grad()
def test_a_bias_that_is_added_to_another_one_costs_nothing():
    """A downsampling convolution gives its bias to the one it is added to; a convolution that runs twice keeps it."""

    class Block(nn.Module):
        def __init__(self, shared: bool):
            super().__init__()
            self.one, self.two, self.shared = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), shared

        def forward(self, x):
            x = self.two(x).sigmoid() if self.shared else x
            return torch.relu(self.one(x) + self.two(x))

    x = torch.randn(2, 4, 3, 3)
    for shared in (False, True):
        block = Block(shared).requires_grad_(False)
        want = block(x)
        fused = fuse_relu(block)
        torch.testing.assert_close(fused(x), want)
        assert (fused.two.bias is None) != shared and len(called(lambda fused=fused: fused(x))) <= (4 if shared else 2)


@torch.no_grad()
@pytest.mark.parametrize("shape, stride, possible", [
    ((2, 8, 9, 9), 1, True), ((2, 16, 9, 9), 1, True), ((2, 16, 8, 8), 2, True), ((2, 3, 9, 9), 1, False),
])  # fmt: skip
def test_cudnn_gets_a_z_that_holds_numbers(monkeypatch, shape, stride, possible):
    """Without a residual cuDNN multiplies z by 0, and it may really do so: 0 * NaN would come through."""
    asked = []

    def imitation(x, weight, z, alpha, bias, stride, padding, dilation, groups):
        asked.append(z)
        return (torch.conv2d(x, weight, bias, stride, padding, dilation, groups) + alpha * z).relu()

    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", imitation)
    convolution = nn.Conv2d(shape[1], 8, 3, stride, 1)
    layer, x = FusedConvolution(convolution), torch.randn(shape).contiguous(memory_format=torch.channels_last)
    z = layer._any_z(x)
    assert (z is not None) == possible and layer._any_z(x.contiguous()) is None
    if possible:
        torch.testing.assert_close(layer._cudnn(x, None), convolution(x).relu())
        assert asked[0].shape == convolution(x).shape and asked[0].data_ptr() == x.data_ptr()
        assert asked[0].is_contiguous(memory_format=torch.channels_last)
    real = torch.randn_like(convolution(x))
    torch.testing.assert_close(layer._cudnn(x, real), (convolution(x) + real).relu())
    assert asked[-1] is real


@torch.no_grad()
@pytest.mark.parametrize("residual", [False, True])
def test_the_epilogue_variant_is_the_sequence(residual):
    convolution = nn.Conv2d(8, 16, 3, padding=1)
    layer, x = FusedConvolution(convolution), torch.randn(2, 8, 9, 9).contiguous(memory_format=torch.channels_last)
    z = torch.randn(2, 16, 9, 9).contiguous(memory_format=torch.channels_last) if residual else None
    layer.variant = "epilogue"
    torch.testing.assert_close(layer(x, z), (convolution(x) + (0 if z is None else z)).relu())
    names = called(lambda: layer(x, z))
    assert count(names, "convolution") == 1 and count(names, "conv_epilogue") == 1 and len(names) <= 3


def test_a_variant_that_does_not_run_is_left_out(monkeypatch):
    def refuses(self, x, z):
        raise RuntimeError("CUDNN_STATUS_NOT_SUPPORTED")

    monkeypatch.setattr(FusedConvolution, "_onednn", refuses)
    net, images = frozen("resnet20")
    method, lines = KD(create_model("resnet8", 10), net), []
    assert choose_form(method, images, "fused", FP32, lines.append) == "fused"
    assert "convolutions: 19 separate" in lines[1]
