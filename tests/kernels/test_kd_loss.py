"""The fused loss against a formulation of our own in float64: written from the formulas, with numpy-style softmaxes."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo import compiled_autograd

from fastkd.kernels import kd_loss, kd_loss_reference, logit_loss


def log_softmax(z):
    shifted = z - z.amax(1, keepdim=True)
    return shifted - shifted.exp().sum(1, keepdim=True).log()


def expectation(p, values):
    """sum p * values, where a class of probability 0 adds nothing."""
    return torch.where(p > 0, p * values, 0.0).sum()


def independent(z_s, z_t, y, T=4.0, a=0.1, b=0.9, smoothing=0.0):
    """Value and gradient from the closed forms of the docstring, in float64."""
    z_s, z_t = z_s.double(), z_t.double()
    n, c = z_s.shape
    y = y.double() if y.is_floating_point() else F.one_hot(y, c).double()
    y = (1 - smoothing) * y + smoothing / c
    p, q, t = (log_softmax(z) for z in (z_s, z_s / T, z_t / T))
    ce = -expectation(y, p) / n
    kl = expectation(t.exp(), t - q) / n
    return a * ce, b * T * T * kl, (a * (p.exp() - y) + b * T * (q.exp() - t.exp())) / n


def batch(n, c, dtype=torch.float32, scale=3.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    z_s, z_t = (torch.randn(n, c, generator=g, dtype=torch.float64) * scale for _ in range(2))
    return z_s.to(dtype), z_t.to(dtype), torch.randint(c, (n,), generator=g)


GPU = pytest.param("cuda", marks=pytest.mark.gpu)
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2e-5, torch.float16: 2e-5}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 2), (3, 10), (5, 1000), (2, 1001)])
@pytest.mark.parametrize("temperature", [0.5, 4.0, 20.0])
@pytest.mark.parametrize("device", ["cpu", GPU])
def test_value_and_gradient(device, dtype, shape, temperature):
    z_s, z_t, y = (x.to(device) for x in batch(*shape, dtype))
    z_s.requires_grad_()
    _, ce, kd = kd_loss(z_s, z_t, y, temperature=temperature)
    want_ce, want_kd, want_grad = independent(z_s.detach().cpu(), z_t.cpu(), y.cpu(), T=temperature)
    tolerance = TOLERANCE[dtype]
    assert ce.dtype == kd.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(ce.cpu().double(), want_ce, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(kd.cpu().double(), want_kd, rtol=tolerance, atol=tolerance)
    (ce + kd).backward()
    own_rounding = torch.finfo(dtype).eps if dtype in (torch.float16, torch.bfloat16) else tolerance
    torch.testing.assert_close(
        z_s.grad.cpu().double(), want_grad, rtol=2 * own_rounding, atol=max(tolerance / 10, 1e-7)
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("soft", [False, True])
def test_targets(smoothing, soft):
    z_s, z_t, y = batch(6, 7, torch.float64)
    target = torch.randn(6, 7, dtype=torch.float64).softmax(1) if soft else y
    z_s.requires_grad_()
    _, ce, kd = kd_loss(z_s, z_t, target, label_smoothing=smoothing, ce_weight=0.3, kd_weight=0.5, temperature=2.0)
    want = independent(z_s.detach(), z_t, target, T=2.0, a=0.3, b=0.5, smoothing=smoothing)
    (3 * (ce + kd)).backward()  # an upstream gradient that is not 1
    for got, wanted in zip((ce, kd, z_s.grad / 3), want, strict=True):
        torch.testing.assert_close(got.detach(), wanted, rtol=1e-11, atol=1e-12)


def test_strides_and_expanded_rows():
    z_s, z_t, y = batch(6, 10)
    want = kd_loss(z_s, z_t, y)
    padded = torch.randn(6, 16)
    padded[:, :10] = z_s
    for student, teacher in [(padded[:, :10], z_t.t().contiguous().t()), (z_s.t().contiguous().t(), z_t)]:
        torch.testing.assert_close(kd_loss(student, teacher, y), want)
    row = z_t[:1].expand(6, 10)
    torch.testing.assert_close(kd_loss(z_s, row, y), kd_loss(z_s, row.contiguous(), y))


@pytest.mark.parametrize("z_s, z_t", [(1e4, -1e4), (0.0, 0.0), (1e4, 1e4)])
def test_extreme_logits_stay_finite(z_s, z_t):
    student = (torch.eye(4, 10) * z_s).requires_grad_()
    _, ce, kd = kd_loss(student, torch.eye(4, 10).flip(1) * z_t, torch.arange(4))
    (ce + kd).backward()
    assert ce.isfinite() and kd.isfinite() and student.grad.isfinite().all()
    want = independent(student.detach(), torch.eye(4, 10).flip(1) * z_t, torch.arange(4))
    torch.testing.assert_close(kd.double(), want[1], rtol=1e-5, atol=1e-5)


def test_a_class_the_teacher_rules_out():
    z_s, z_t, y = batch(3, 5, torch.float64)
    z_t[:, 2] = float("-inf")
    y = y.clamp(max=1)
    z_s.requires_grad_()
    _, ce, kd = kd_loss(z_s, z_t, y)
    (ce + kd).backward()
    want = independent(z_s.detach(), z_t, y)
    torch.testing.assert_close((ce.detach(), kd.detach(), z_s.grad), want, rtol=1e-11, atol=1e-12)


def test_standardize_ignores_scale_and_shift():
    z_s, z_t, y = batch(4, 9, torch.float64)
    settings = {"standardize": True, "temperature": 2.0, "kd_weight": 9.0}
    kd = kd_loss(z_s, z_t, y, **settings).kd
    z_score = lambda z: (z - z.mean(1, keepdim=True)) / z.std(1, keepdim=True)  # noqa: E731
    torch.testing.assert_close(kd, independent(z_score(z_s), z_score(z_t), y, T=2.0, b=9.0)[1], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(kd, kd_loss(z_s, 5 * z_t + 3, y, **settings).kd, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(kd_loss(z_s, 5 * z_s + 3, y, **settings).kd, torch.zeros((), dtype=torch.float64))


def test_only_the_student_gets_a_gradient():
    z_s, z_t, y = batch(4, 6)
    z_s.requires_grad_()
    z_t.requires_grad_()
    kd_loss(z_s, z_t, y).loss.backward()
    assert z_t.grad is None
    torch.testing.assert_close(z_s.grad.sum(1), torch.zeros(4), atol=1e-6, rtol=0)


def test_gradcheck():
    z_s, z_t, y = batch(3, 5, torch.float64)
    z_s.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: kd_loss(z, z_t, y).loss, (z_s,))


def test_public_function_is_its_reference():
    z_s, z_t, y = batch(3, 5)
    settings = {"temperature": 3.0, "ce_weight": 0.2, "kd_weight": 0.7, "label_smoothing": 0.1, "standardize": True}
    got, want = kd_loss(z_s, z_t, y, **settings), kd_loss_reference(z_s, z_t, y, **settings)
    torch.testing.assert_close(got[:3], want[:3])


def general(student, teacher, target, temperature=4.0, ce_weight=0.1, kd_weight=0.9):
    """(loss, ce, kd) by the loss of which `kd_loss` is a case."""
    table = [[0.0, kd_weight], [0.0, 0.0]]
    fused = logit_loss([student, teacher], target, [ce_weight, 0.0], table, temperature=temperature)
    return fused.loss, fused.terms[0, 0], fused.terms[0, 2]


UPSTREAM = {
    "loss": lambda loss, ce, kd: loss,
    "half": lambda loss, ce, kd: loss / 2,
    "terms": lambda loss, ce, kd: ce + kd,
    "ce": lambda loss, ce, kd: 3 * ce,
    "kd": lambda loss, ce, kd: kd,
    "each": lambda loss, ce, kd: loss + 0.5 * ce - 2 * kd,
}


@pytest.fixture(params=["closed form", "interpreted kernel", GPU])
def way(request, monkeypatch):
    """The device, after a choice of what computes there: on a GPU the kernel, which Triton may interpret on a CPU."""
    if request.param == "interpreted kernel":
        if torch.cuda.is_available():
            pytest.skip("where there is a GPU nothing is interpreted")
        monkeypatch.setattr("fastkd.kernels.op.runs_on_gpu", lambda device, dtype: dtype == torch.float32)
    return "cuda" if request.param == "cuda" else "cpu"


@pytest.mark.parametrize("upstream", UPSTREAM)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("weights", [(0.1, 0.9), (0.0, 1.0), (1.0, 0.0)])
def test_kd_is_the_case_of_two_heads(way, dtype, upstream, weights):
    """Logits of 300 take the careful computation; the second backward finds the first one's gradient gone."""
    for scale in (3.0, 300.0):
        z_s, z_t, y = (x.to(way) for x in batch(5, 9, dtype, scale))
        found = []
        for loss_of in (kd_loss, general):
            student = z_s.clone().requires_grad_()
            terms = loss_of(student, z_t, y, temperature=3.0, ce_weight=weights[0], kd_weight=weights[1])[:3]
            value = UPSTREAM[upstream](*terms)
            first, second = (torch.autograd.grad(value, student, retain_graph=True)[0] for _ in range(2))
            found.append((*terms[1:], first, second))
            torch.testing.assert_close(terms[0], terms[1] + terms[2])
        for got, wanted in zip(*found, strict=True):
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("option", [{"label_smoothing": 0.1}, {"standardize": True}, {"ignore_index": 2}])
def test_options_count_where_a_student_learns(option):
    z_s, z_t, y = batch(6, 3)
    found = []
    for way in (kd_loss, lambda *given, **settings: logit_loss(
        [given[0], given[1]], given[2], [0.1, 0.0], [[0.0, 0.9], [0.0, 0.0]], temperature=4.0, **settings
    )):  # fmt: skip
        loss = way(z_s.requires_grad_(), z_t, y, **option).loss
        found.append((loss.detach(), *torch.autograd.grad(loss, z_s)))
    torch.testing.assert_close(*found)
    assert not torch.equal(found[0][0], kd_loss(z_s, z_t, y).loss)


def test_a_loss_may_be_changed_in_place(way):
    z_s, z_t, y = (x.to(way) for x in batch(3, 5))
    loss = kd_loss(z_s.requires_grad_(), z_t, y).loss
    loss *= 2
    loss += z_s.sum()
    want = 2 * independent(z_s.detach().cpu(), z_t.cpu(), y.cpu())[2] + 1
    torch.testing.assert_close(torch.autograd.grad(loss, z_s)[0].cpu().double(), want, rtol=1e-5, atol=1e-6)


def test_no_second_derivative():
    z_s, z_t, y = batch(3, 5)
    with pytest.raises(RuntimeError, match="kd_loss_reference"):
        torch.autograd.grad(kd_loss(z_s.requires_grad_(), z_t, y).loss, z_s, create_graph=True)


@pytest.mark.parametrize("upstream", UPSTREAM)
def test_compiled_autograd(way, upstream):
    z_s, z_t, y = (x.to(way) for x in batch(4, 6))
    value = 3 * UPSTREAM[upstream](*kd_loss(z_s.requires_grad_(), z_t, y)[:3])
    want = torch.autograd.grad(3 * UPSTREAM[upstream](*kd_loss(z_s, z_t, y)[:3]), z_s)[0]
    with compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
        for backward in (1, 2):
            value.backward(retain_graph=True)
            torch.testing.assert_close(z_s.grad, backward * want)


def test_without_weights_there_is_no_gradient():
    z_s, z_t, y = batch(4, 6)
    kd_loss(z_s.requires_grad_(), z_t, y, ce_weight=0.0, kd_weight=0.0).loss.backward()
    assert z_s.grad is None


def test_large_logits_are_computed_once(monkeypatch):
    module, calls = importlib.import_module("fastkd.kernels.cpu.logit_loss"), []
    quick = module._student_and_teacher
    monkeypatch.setattr(module, "_student_and_teacher", lambda *given: calls.append(given) or quick(*given))
    z_s, z_t, y = batch(4, 6, scale=300.0)
    assert kd_loss(z_s.requires_grad_(), z_t, y).loss.isfinite() and len(calls) == 1


def test_exported_for_any_batch():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(4, 5)

        def forward(self, x, z_t, y):
            return kd_loss(self.linear(x), z_t, y).loss

    net, n = Net(), torch.export.Dim("n")
    _, z_t, y = batch(6, 5)
    program = torch.export.export(net, (torch.randn(6, 4), z_t, y), dynamic_shapes=({0: n}, {0: n}, {0: n}))
    x, (_, z_t, y) = torch.randn(3, 4), batch(3, 5, seed=1)
    torch.testing.assert_close(program.module()(x, z_t, y), net(x, z_t, y))


def test_autocast_changes_nothing():
    z_s, z_t, y = batch(4, 6)
    want = kd_loss(z_s.requires_grad_(), z_t, y)
    with torch.autocast("cpu", torch.bfloat16):
        got = kd_loss(z_s, z_t, y)
    assert all(map(torch.equal, got[:3], want[:3]))
    assert torch.equal(torch.autograd.grad(got.loss, z_s)[0], torch.autograd.grad(want.loss, z_s)[0])


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize(
    "student, teacher, target, words",
    [
        (torch.ones(2, 3), torch.ones(2, 4), torch.zeros(2).long(), r"\[2, 3\], \[2, 4\]"),
        (torch.ones(3), torch.ones(3), torch.zeros(3).long(), r"\[3\]"),
        (torch.ones(()), torch.ones(()), torch.zeros(3).long(), r"\[\[\], \[\]\]"),
        (torch.ones(2, 3).long(), torch.ones(2, 3), torch.zeros(2).long(), "int64"),
        (torch.ones(2, 1), torch.ones(2, 1), torch.zeros(2).long(), r"1 class\(es\), \[2, 1\]"),
        (torch.ones(2, 3), torch.ones(2, 3), torch.zeros(3).long(), r"int64 \[3\]"),
        (torch.ones(2, 3), torch.ones(2, 3), torch.zeros(2), r"float32 \[2\]"),
        (torch.ones(2, 3), torch.ones(2, 3), torch.zeros(2).int(), "int32"),
    ],
)
def test_bad_input_names_shapes(student, teacher, target, words, learns):
    with pytest.raises(ValueError, match=words):
        kd_loss(student.clone().requires_grad_(learns and student.is_floating_point()), teacher, target)


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize(
    "change, words",
    [
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"ce_weight": -1.0}, r"ce_weights\[0\] must be zero or a positive number, got -1.0"),
        ({"kd_weight": float("nan")}, r"table\[0\]\[1\] must be zero or a positive number, got nan"),
        ({"target": torch.tensor([0, 5, 1])}, r"1 label\(s\) are not from 0 to 4, first in row 1: 5"),
        ({"target": torch.tensor([0, 4])}, r"int64 \[2\]"),
    ],
)
def test_bad_settings(change, words, learns):
    student, teacher, target = batch(3, 5)
    given = {"student": student.requires_grad_(learns), "teacher": teacher, "target": target} | change
    with pytest.raises(ValueError, match=words):
        kd_loss(**given)


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_on_the_cpu_the_logits_may_be_changed_after_the_call(changed):
    given = list(batch(4, 6))
    want = independent(*given)[2]
    leaf = given[0].requires_grad_()
    given[0] = leaf * 1
    loss = kd_loss(*given).loss
    with torch.no_grad():
        given[changed].zero_()
    torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0].double(), want, rtol=2e-5, atol=1e-6)


def test_nothing_from_above_is_no_gradient(way):
    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *terms):
            return sum(terms)

        @staticmethod
        def backward(ctx, gradient):
            return None, None, None

    z_s, z_t, y = (x.to(way) for x in batch(4, 6))
    Stop.apply(*kd_loss(z_s.requires_grad_(), z_t, y)[:3]).backward()
    assert z_s.grad is None or not z_s.grad.any()
