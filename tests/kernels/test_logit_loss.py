"""Both paths of the op, the closed form and the kernel, against a formulation of our own in float64."""

import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from capture import Capture
from logit_cases import DCM, DEVICE, DML, KD, SOKD, TABLES, independent, make
from torch import Tensor

from fastkd.kernels import kd_loss
from fastkd.kernels.cpu.logit_loss import scratch
from fastkd.kernels.gpu.logit_loss import _plan, launch
from fastkd.kernels.logit_loss import logit_loss, logit_loss_reference

pytestmark = [] if DEVICE == "cpu" else pytest.mark.gpu
op_module = importlib.import_module("fastkd.kernels.op")
module = importlib.import_module("fastkd.kernels.logit_loss")  # the package has a function of the same name


@pytest.fixture(params=["closed form", "kernel"])
def path(request, monkeypatch):
    """Which implementation the op takes."""
    use(request.param, monkeypatch)


def use(path, monkeypatch):
    if path == "kernel" or DEVICE == "cuda":
        monkeypatch.setattr("fastkd.kernels.op.runs_on_gpu", lambda device, dtype: path == "kernel")


def check(heads, y, c, W, upstream=1.0, tolerance=2e-5, **options):
    names = {"label_smoothing": "smoothing", "ignore_index": "ignore", "temperature": "T"}
    want, gradients = independent(heads, y, c, W, **{names.get(k, k): v for k, v in options.items()})
    got = logit_loss(heads, y, c, W, **options)
    torch.testing.assert_close(got.terms.double(), want, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got.loss.double(), want.sum(), rtol=tolerance, atol=tolerance)
    learning = [head for head in heads if head.requires_grad]
    found = torch.autograd.grad(got.loss * upstream, learning)
    for head, gradient, wanted in zip(learning, found, gradients, strict=False):
        assert gradient.dtype == head.dtype
        rounding = torch.finfo(head.dtype).eps if head.dtype.itemsize == 2 else tolerance
        torch.testing.assert_close(gradient.double() / upstream, wanted, rtol=rounding, atol=tolerance / 10)


SHAPES = [(1, 2), (3, 10), (7, 100), (2, 1000), (2, 1001), (1, 8192), (1, 21841), (1, 32768)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_kd(path, shape, dtype):
    check(*make(2, *shape, dtype, learners=1), *KD, temperature=4.0)


@pytest.mark.parametrize("C", [2, 10, 100, 1000, 1001, 8192, 21841, 32768])
def test_large_batch_in_closed_form(C):
    check(*make(2, 256 if C < 8192 else 32, C, learners=1), *KD, temperature=4.0)


def test_more_rows_than_programs(path):
    check(*make(2, 256, 10, learners=1), *KD, temperature=2.0)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("shape", [(5, 10), (3, 1000), (1, 9000)])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 20.0])
def test_every_table(path, name, shape, temperature):
    c, W = TABLES[name]
    learners = {"KD": 1, "SOKD": 2}.get(name, len(c))
    tolerance = 2e-5 if temperature < 20 else 1e-4  # of T^2 KL: the divergence itself is small
    check(*make(len(c), *shape, learners=learners), c, W, temperature=temperature, tolerance=tolerance)


@pytest.mark.parametrize("C", [12, 5000, 20000])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("standardize", [False, True])
def test_targets(path, C, smoothing, soft, standardize):
    heads, y = make(2, 3, C, learners=1)
    if soft:
        y = torch.randn(3, 2 * C, device=DEVICE).softmax(1)[:, ::2]  # strided, and its sum is not 1
    check(heads, y, *KD, temperature=2.0, label_smoothing=smoothing, standardize=standardize, upstream=-3.0)


@pytest.mark.parametrize("upstream", [1.0, 0.0, 2.0, 0.3, -1024.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_upstream(path, upstream, dtype):
    """In fp16 the product is rounded once: gradients that would vanish unscaled survive a large upstream gradient."""
    heads, y = make(2, 64, 50, dtype, learners=1)
    got = torch.autograd.grad(logit_loss(heads, y, *KD, temperature=4.0).loss * upstream, heads[0])[0]
    want = independent(heads, y, *KD, T=4.0)[1][0] * upstream
    tiny = 2e-7 if dtype == torch.float32 else 6e-8
    atol = tiny * max(1, abs(upstream) / 8)
    torch.testing.assert_close(got.double(), want, rtol=2 * torch.finfo(dtype).eps, atol=atol)


def test_each_term_has_a_gradient_of_its_own(path):
    (c, W), (heads, y) = SOKD, make(3, 4, 9, learners=2)
    factors = torch.rand(3, 4, device=DEVICE)
    got = torch.autograd.grad((logit_loss(heads, y, c, W, temperature=3.0).terms * factors).sum(), heads[:2])
    scaled_c = [w * f.item() for w, f in zip(c, factors[:, 0], strict=True)]
    scaled_W = [[w * f.item() for w, f in zip(*rows, strict=True)] for rows in zip(W, factors[:, 1:], strict=True)]
    want = independent(heads, y, scaled_c, scaled_W, T=3.0)[1][:2]
    torch.testing.assert_close([g.double() for g in got], want, rtol=1e-5, atol=1e-6)


def test_expanded_upstream(path):
    """terms.sum() sends a gradient of stride 0."""
    (c, W), (heads, y) = SOKD, make(3, 4, 9, learners=2)
    result = logit_loss(heads, y, c, W)
    got = torch.autograd.grad((result.terms * 2).sum() + result.terms.sum(), heads[0], retain_graph=True)[0]
    again = torch.autograd.grad(result.terms.sum(), heads[0])[0]
    want = independent(heads, y, c, W)[1][0]
    torch.testing.assert_close([got.double(), again.double()], [3 * want, want], rtol=1e-5, atol=1e-6)


def test_loss_and_terms_together(path):
    heads, y = make(2, 4, 9, learners=1)
    result = logit_loss(heads, y, *KD)
    got = torch.autograd.grad(2 * result.loss + 3 * result.terms[0, 2], heads[0])[0]
    want = independent(heads, y, [0.2, 0], [[0, 5 * 0.9], [0, 0]])[1][0]
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


def test_backward_twice(path):
    """The first one may have written into the gradients that the forward pass left."""
    heads, y = make(2, 4, 9, learners=1)
    loss = logit_loss(heads, y, *KD).loss
    results = [torch.autograd.grad(loss * factor, heads[0], retain_graph=True)[0] for factor in (2.0, 1.0, 3.0)]
    want = independent(heads, y, *KD)[1][0]
    for factor, got in zip((2.0, 1.0, 3.0), results, strict=True):
        torch.testing.assert_close(got.double(), factor * want, rtol=1e-5, atol=1e-6)


def test_strides(path):
    (c, W), (heads, y) = SOKD, make(3, 6, 16)
    want = logit_loss(heads, y, c, W)
    padded = torch.full((6, 24), math.nan, device=DEVICE)
    padded[:, :16] = heads[0]
    offset = torch.full((6, 17), math.nan, device=DEVICE)
    offset[:, 1:] = heads[1]
    transposed = heads[2].t().contiguous().t()
    got = logit_loss([padded[:, :16], offset[:, 1:], transposed], y, c, W)
    torch.testing.assert_close(got.terms, want.terms)
    row = heads[2][:1].expand(6, 16)
    torch.testing.assert_close(
        logit_loss([*heads[:2], row], y, c, W).terms, logit_loss([*heads[:2], row.contiguous()], y, c, W).terms
    )


def test_heads_of_different_dtypes(path):
    heads, y = make(3, 4, 10, learners=2)
    mixed = [heads[0].detach().bfloat16().requires_grad_(), heads[1], heads[2].half()]
    check(mixed, y, *SOKD, temperature=2.0)


@pytest.mark.parametrize("name", ["KD", "SOKD"])
def test_a_teacher_in_fp64_is_computed_in_fp64(name):
    c, W = TABLES[name]
    heads, y = make(len(c), 4, 10, torch.float64)
    heads[0] = heads[0].float().requires_grad_()
    got = logit_loss(heads, y, c, W, temperature=2.0)
    torch.testing.assert_close(got.terms, independent(heads, y, c, W, T=2.0)[0], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"standardize": True}])
@pytest.mark.parametrize("what", ["cross-entropy", "divergence"])
def test_a_weight_of_0_switches_its_term_off(path, options, what):
    """Whatever its values: of the teacher's logits, and of the memory where the label's softmax would be."""
    scratch.buffers.clear(), scratch.views.clear()  # so that it is taken anew, full of NaN
    heads, y = make(3, 4, 10, learners=2)
    c, W = [0.0, 0.0, 0.0], [[0, 0, 0.5], [0.5, 0, 0], [0, 0, 0]]
    if what == "divergence":
        c, W[0] = [0.5, 0.0, 0.0], [0, 0, 0]
        heads[2].fill_(math.nan)
    got = logit_loss(heads, y, c, W, temperature=2.0, **options)
    found = torch.autograd.grad(got.loss, heads[:2])
    heads[2].nan_to_num_(0.0)
    names = {"label_smoothing": "smoothing"}
    want, gradients = independent(heads, y, c, W, T=2.0, **{names.get(k, k): v for k, v in options.items()})
    torch.testing.assert_close(got.terms.double(), want, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close([g.double() for g in found], gradients[:2], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", ["KD", "DCM"])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}])
def test_training_after_evaluation_in_inference_mode(name, options):
    scratch.buffers.clear(), scratch.views.clear()
    (c, W), learners = TABLES[name], 1 if name == "KD" else 4
    with torch.inference_mode():
        logit_loss(*make(len(c), 4, 10), c, W, temperature=3.0, **options)
    check(*make(len(c), 4, 10, learners=learners), c, W, temperature=3.0, **options)


@pytest.mark.parametrize("name", ["KD", "DCM"])
def test_a_default_device_of_the_caller_does_not_matter(name):
    c, W = TABLES[name]
    heads, y = make(len(c), 4, 11, learners=1)
    with torch.device("meta"):
        loss = logit_loss(heads, y, c, W, temperature=3.0).loss
    assert loss.item() == logit_loss(heads, y, c, W, temperature=3.0).loss.item()


@pytest.mark.parametrize("gap", [60.0, 99.0, 102.3, 150.0])
@pytest.mark.parametrize("name, learning", [("SOKD", 3), ("KD", 2), ("KD", 1)])
def test_a_label_of_vanishing_probability(path, name, learning, gap):
    """At temperature 1 it is no normal number of fp32, at 4 it is; `learning` heads are so sure of another class."""
    table = TABLES[name]
    heads = [torch.zeros(4, 10, device=DEVICE) for _ in table[0]]
    for head in heads[:learning]:
        head[:, 9] = gap
    heads[0].requires_grad_()
    check(heads, torch.zeros(4, dtype=torch.int64, device=DEVICE), *table, temperature=4.0)


@pytest.mark.parametrize("name", ["KD", "SOKD"])
def test_nearly_equal_heads_far_from_0(path, name):
    """Their divergence is a small difference of log-sums, which are large here."""
    table = TABLES[name]
    heads, y = make(len(table[0]), 4, 10, scale=0.1)
    heads = [(head + 1e5).requires_grad_(place == 0) for place, head in enumerate(heads)]
    wanted, _ = independent(heads, y, *table, T=3.0)
    found = logit_loss(heads, y, *table, temperature=3.0).terms
    torch.testing.assert_close(found.double(), wanted, rtol=2e-3, atol=1e-9)


EXTREME = {
    "large": lambda z: (z[0].copy_(torch.eye(4, 10) * 1e4), z[1].copy_(torch.eye(4, 10).flip(1) * 1e4)),
    "a common shift": lambda z: (z[0].add_(1e4), z[1].sub_(1e4)),
    "all equal": lambda z: (z[0].fill_(3.0), z[1].fill_(-2.0)),
    "-inf in both": lambda z: (z[0][:, 4].fill_(-math.inf), z[1][:, 4].fill_(-math.inf)),
    "-inf in the teacher": lambda z: (z[1][:, 4].fill_(-math.inf),),
}


@pytest.mark.parametrize("what", EXTREME)
@pytest.mark.parametrize("standardize", [False, True])
def test_extreme_logits(path, what, standardize):
    heads, y = make(2, 4, 10)
    heads = [head.cpu() for head in heads]
    EXTREME[what](heads)
    heads, y = [head.to(DEVICE) for head in heads], torch.arange(4, device=DEVICE) + 5
    heads[0].requires_grad_()
    if standardize:  # only that it stays finite: the formulation here knows no -inf in a z-score
        got = logit_loss(heads, y, *KD, standardize=True)
        assert got.terms.isfinite().all()
        assert torch.autograd.grad(got.loss, heads[0])[0].isfinite().all()
    else:
        check(heads, y, *KD, temperature=4.0)


def test_a_class_only_the_student_rules_out(path):
    """The divergence is truly infinite then; the gradient is not."""
    heads, y = make(2, 4, 10)
    heads[0][:, 4] = -math.inf
    heads[0].requires_grad_()
    got = logit_loss(heads, torch.zeros_like(y), *KD)
    assert got.terms[0, 2] == math.inf and got.terms[0, 0].isfinite()
    gradient = torch.autograd.grad(got.loss, heads[0])[0]
    want = independent(heads, torch.zeros_like(y), *KD)[1][0]
    torch.testing.assert_close(gradient.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("place", [0, 1])
def test_nan_logits_propagate(path, place):
    heads, y = make(2, 4, 10)
    heads[place][1, 3] = math.nan
    heads[0].requires_grad_()
    got = logit_loss(heads, y, *KD)
    assert got.loss.isnan()
    gradient = torch.autograd.grad(got.loss, heads[0])[0]
    assert gradient[1].isnan().any() and gradient[[0, 2, 3]].isfinite().all()


def test_ignored_rows(path):
    heads, y = make(2, 7, 10, learners=1)
    y[[1, 4]] = -100
    check(heads, y, *KD, ignore_index=-100, temperature=2.0)
    got = logit_loss(heads, torch.full_like(y, -100), *KD, ignore_index=-100)
    assert got.terms[0, 0] == 0 and got.terms[0, 2] > 0
    assert torch.autograd.grad(got.loss, heads[0])[0].isfinite().all()


def test_equal_heads_teach_nothing(path):
    heads, y = make(1, 5, 30, learners=1)
    got = logit_loss([*heads, heads[0].detach()], y, [0.0, 0.0], KD[1], temperature=4.0)
    assert got.loss.abs() < 1e-6 and torch.autograd.grad(got.loss, heads[0])[0].abs().max() < 1e-7


def test_gradients_sum_to_zero_over_classes(path):
    heads, y = make(4, 5, 30)
    for head in heads:
        head.requires_grad_()
    for gradient in torch.autograd.grad(logit_loss(heads, y, *DCM).loss, heads):
        assert gradient.sum(1).abs().max() < 1e-6


def test_only_learners_get_gradients(path):
    heads, y = make(3, 4, 6, learners=3)
    logit_loss(heads, y, *SOKD).loss.backward()
    assert heads[2].grad is None and heads[0].grad is not None
    with torch.no_grad():
        assert not logit_loss(heads, y, *SOKD).loss.requires_grad


def test_empty_batch(path):
    heads, y = make(2, 0, 6, learners=1)
    got = logit_loss(heads, y, *KD)
    assert got.loss == 0 and torch.autograd.grad(got.loss, heads[0])[0].shape == (0, 6)


def test_deterministic(path):
    heads, y = make(4, 40, 30, learners=4)
    results = [logit_loss(heads, y, *DCM) for _ in range(2)]
    assert torch.equal(results[0].terms, results[1].terms)


def check_anything(N, C, H, T, scale, seed, kernel, sparse):
    generator = torch.Generator().manual_seed(seed)
    W = (torch.rand(H, H, generator=generator) * (torch.rand(H, H, generator=generator) > sparse)).fill_diagonal_(0)
    c = torch.rand(H, generator=generator) * (torch.rand(H, generator=generator) > sparse / 2)
    c[0] = 1
    with pytest.MonkeyPatch.context() as patch:
        use("kernel" if kernel else "closed form", patch)
        check(*make(H, N, C, scale=scale, seed=seed, learners=1), c.tolist(), W.tolist(), temperature=T, tolerance=1e-4)


def test_anything():
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    given = hypothesis.given(
        N=st.integers(1, 5),
        C=st.integers(2, 70),
        H=st.integers(2, 4),
        T=st.floats(0.5, 20),
        scale=st.sampled_from([0.01, 1.0, 30.0]),
        seed=st.integers(0, 99),
        kernel=st.booleans(),
        sparse=st.floats(0, 1),
    )
    hypothesis.settings(max_examples=25, deadline=None, derandomize=True)(given(check_anything))()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("C", [10, 1000])
def test_error_is_not_larger_than_eager_pytorch(path, dtype, C):
    """Mean absolute errors over seeds, up to one rounding; eager computes in fp32, as under autocast."""
    errors = torch.zeros(2, 2, dtype=torch.float64)
    rounding = torch.zeros(2, dtype=torch.float64)
    for seed in range(6):
        heads, y = make(2, 16, C, dtype, seed=seed, learners=1)
        terms, (want, _) = independent(heads, y, *KD, T=4.0)
        for mine, function in zip(errors, (logit_loss, logit_loss_reference), strict=True):
            loss = function(heads, y, *KD, temperature=4.0).loss
            gradient = torch.autograd.grad(loss, heads[0])[0].double()
            mine += torch.stack([(loss.detach() - terms.sum()).abs(), (gradient - want).abs().mean()]).cpu()
        rounding += torch.stack([terms.sum(), want.abs().mean()]).cpu() * torch.finfo(torch.float32).eps
    if op_module.runs_on_gpu(heads[0].device, torch.float32) and DEVICE == "cpu" and dtype == torch.bfloat16:
        errors[0, 1] /= 2  # the interpreter cuts bits off where the GPU rounds
    assert (errors[0] <= 1.05 * errors[1] + rounding).all(), (errors, rounding)


@pytest.mark.parametrize("name", ["KD", "DCM"])
def test_the_divergence_of_nearly_equal_heads(name):
    """A small difference of large sums: not much less exact than eager's."""
    (c, W), errors = TABLES[name], torch.zeros(2, dtype=torch.float64)
    for seed in range(20):
        heads, y = make(len(c), 64, 100, seed=seed)
        heads = [heads[0] + 0.01 * (head - heads[0]) for head in heads]
        if name == "KD":
            heads[0].requires_grad_()  # else it is the path of many heads
        want = independent(heads, y, c, W, T=4.0)[0][:, 1:]
        for place, function in enumerate((logit_loss, logit_loss_reference)):
            terms = function(heads, y, c, W, temperature=4.0).terms[:, 1:].detach().double()
            errors[place] += ((terms - want).abs() / want).cpu()[want.cpu() > 0].mean()
    assert errors[0] < 2 * errors[1] and errors[0] / 20 < 0.01, errors


def double_batch():
    heads, y = make(2, 3, 5, torch.float64, learners=1)
    return heads, y


@pytest.mark.parametrize("options", [{}, {"standardize": True}, {"label_smoothing": 0.2}, {"ignore_index": 1}])
@pytest.mark.parametrize("name", ["KD", "DML"])
def test_gradcheck(name, options):
    heads, y = double_batch()
    heads[1].requires_grad_(name == "DML")
    fixed = [head.detach().clone() for head in heads]

    def function(a, b):
        if name == "KD":
            return logit_loss([a, b], y, *KD, temperature=2.0, **options).loss
        # A target is a constant: numerical differences would see it move.
        return logit_loss([a, fixed[1]], y, *KD, **options).loss + logit_loss([b, fixed[0]], y, *KD, **options).loss

    assert torch.autograd.gradcheck(function, heads)


@pytest.mark.parametrize("name, reduction", [("KD", "mean"), ("DCM", "mean"), ("KD", "none")])
def test_opcheck(path, name, reduction):
    torch.use_deterministic_algorithms(False)
    c, W = TABLES[name]
    heads, y = make(len(c), 3, 6, learners=1 if name == "KD" else len(c))
    weights = [w for ci, row in zip(c, W, strict=True) for w in (ci, *row)]
    learns = [head.requires_grad for head in heads]
    class_weights, rows = (
        torch.rand(6, device=DEVICE) if reduction == "none" else None,
        (3,) if reduction == "none" else (),
    )
    common = (class_weights, weights, 2.0, 0.1, None, False, False, reduction, learns)
    torch.library.opcheck(torch.ops.fastkd.logit_loss.default, (heads, y, *common, True))
    detached = [head.detach() for head in heads]
    upstream = (torch.rand(rows, device=DEVICE), torch.rand(*rows, len(c), len(c) + 1, device=DEVICE))
    torch.library.opcheck(torch.ops.fastkd.logit_loss_backward.default, (detached, y, *common, *upstream))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    torch.use_deterministic_algorithms(False)
    function = lambda heads, y: logit_loss(heads, y, *DML, temperature=2.0, label_smoothing=0.1).loss * 1.5  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic)
    for N in (4, 6):
        heads, y = make(2, N, 8, learners=2)
        got, want = compiled(heads, y), function(heads, y)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.autograd.grad(got, heads), torch.autograd.grad(want, heads))


def test_compiled_backward_twice():
    torch.use_deterministic_algorithms(False)
    heads, y = make(2, 4, 8, learners=1)
    loss = torch.compile(lambda a, b: logit_loss([a, b], y, *KD).loss, fullgraph=True)(*heads)
    got = [
        torch.autograd.grad(loss, heads[0], torch.tensor(f, device=DEVICE), retain_graph=True)[0] for f in (2.0, 1.0)
    ]
    want = independent(heads, y, *KD)[1][0]
    torch.testing.assert_close([g.double() for g in got], [2 * want, want], rtol=1e-5, atol=1e-6)


def test_autocast(path):
    heads, y = make(2, 4, 10, torch.bfloat16, learners=1)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        got = logit_loss(heads, y, *KD)
    assert got.loss.dtype == torch.float32
    assert torch.equal(got.loss, logit_loss(heads, y, *KD).loss)


def test_captured_graph(path):
    """Replayed on other logits and another upstream gradient: right numbers, and no question to the device."""
    heads, y = make(2, 6, 10, learners=1)
    factor = torch.tensor(1.0, device=DEVICE)
    with Capture() as graph:
        loss = logit_loss(heads, y, *KD, temperature=3.0).loss
        (gradient,) = torch.autograd.grad(loss * factor, heads[0])
    assert sum("fastkd" in name for name in graph.names) == 2
    for seed, upstream in ((1, 1.0), (2, 0.5)):
        others, labels = make(2, 6, 10, seed=seed)
        with torch.no_grad():
            for head, other in zip(heads, others, strict=True):
                head.copy_(other)
        y.copy_(labels)
        factor.fill_(upstream)
        graph.replay()
        terms, gradients = independent(heads, y, *KD, T=3.0)
        torch.testing.assert_close(loss.detach().double(), terms.sum(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradient.double(), gradients[0] * upstream, rtol=1e-5, atol=1e-6)


def test_reference_is_the_equation():
    heads, y = make(3, 5, 8, torch.float64, learners=2)
    got = logit_loss_reference(heads, y, *SOKD, temperature=3.0, label_smoothing=0.1)
    terms, gradients = independent(heads, y, *SOKD, T=3.0, smoothing=0.1)
    torch.testing.assert_close(got.terms, terms, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(got.loss, heads[:2]), tuple(gradients[:2]), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "upstream, computed",
    [(lambda fused: fused.loss, 1), (lambda fused: fused.loss / 4, 1), (lambda fused: 3 * fused.terms[:2].sum(), 1),
     (lambda fused: fused.terms[:2].sum() + fused.loss, 1), (lambda fused: fused.terms[0].sum(), 2)],
)  # fmt: skip
def test_one_factor_from_above_computes_nothing_anew(monkeypatch, upstream, computed):
    """The kernel, which is not counted here, looks by itself. Nothing of the third head counts."""
    calls = []

    def counted(*args, closed_form=module._logit_loss.closed_form):
        calls.append(args)
        return closed_form(*args)

    monkeypatch.setattr(module._logit_loss, "closed_form", counted)
    heads, y = make(3, 4, 6, learners=1)
    got = torch.autograd.grad(upstream(logit_loss(heads, y, *SOKD)), heads[0])
    assert len(calls) == (computed if DEVICE == "cpu" else 0)
    torch.testing.assert_close(got, torch.autograd.grad(upstream(logit_loss_reference(heads, y, *SOKD)), heads[0]))


BAD = [
    (lambda h, y: ([h[0], h[1][:, :3]], y), r"\[4, 6\], \[4, 3\]"),
    (lambda h, y: ([h[0].long(), h[1]], y), "int64"),
    (lambda h, y: (h, y.int()), "int32"),
    (lambda h, y: (h, y[:3]), r"int64 \[3\]"),
    (lambda h, y: ([z[:, :1] for z in h], y), r"1 class\(es\), \[4, 1\]"),
    (lambda h, y: (h, h[0].softmax(1)), "requires a gradient"),
    (lambda h, y: ([h[0], h[1].to("meta")], y), "meta"),
    (lambda h, y: (h, torch.tensor([0, 6, -1, 2])), r"2 label\(s\) are not from 0 to 5, first in row 1: 6"),
    (lambda h, y: (h, torch.tensor([0, 5, 6, 2])), r": 6; the logits have 6 classes: check their number"),
    (lambda h, y: (h, torch.tensor([0, 5, -1, 2])), r": -1; pass ignore_index for rows without a label$"),
    (lambda h, y: ([h[0], h[1][:, :3]], y), "over the same classes.* C differs"),
    (lambda h, y: ([h[0], h[1][:3]], y), r"of one batch, got \[\[4, 6\], \[3, 6\]\]: N differs"),
    (lambda h, y: ([z[0] for z in h], y), r"\[\[6\], \[6\]\]; one sample is a batch of one: logits\[None\]"),
    (lambda h, y: ([h[0], y], h[1]), r"\[\[4, 6\], \[4\]\]: torch.int64 are labels, which come last"),
    (lambda h, y: ([z[:, :, None] for z in h], y), r"\[\[4, 6, 1\], \[4, 6, 1\]\]; flatten .*logits.flatten\(0, -2\)"),
    (lambda h, y: (h, y.int()), r"int32 \[4\]; labels are int64: target.long\(\)"),
    (lambda h, y: (h, y.byte()), r"uint8 \[4\]; labels are int64: target.long\(\)"),
    (lambda h, y: (h, y.float()), r"float32 \[4\]; labels are int64: target.long\(\)"),
    (lambda h, y: (h, y[:, None]), r"int64 \[4, 1\]; drop its last dimension"),
    (lambda h, y: (h, F.one_hot(y, 6)), r"int64 \[4, 6\]; .*target.argmax\(1\)"),
    (lambda h, y: (h, y[:3]), "not of the same batch: 3 rows for 4"),
    (lambda h, y: (h, torch.rand(4, 5)), r"float32 \[4, 5\]; a distribution is over the 6 classes"),
]


@pytest.mark.parametrize("change, words", BAD)
def test_bad_input(change, words):
    heads, y = make(2, 4, 6, learners=1)
    with pytest.raises(ValueError, match=words):
        logit_loss(*change([head.cpu() if DEVICE == "cuda" else head for head in heads], y.cpu()), *KD)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"temperature": 0}, "temperature must be above 0, got 0"),
        ({"temperature": math.nan}, "temperature.*nan"),
        ({"label_smoothing": 1.5}, "label_smoothing must be from 0 to 1, got 1.5"),
    ],
)
def test_bad_numbers(options, words):
    with pytest.raises(ValueError, match=words):
        logit_loss(*make(2, 4, 6), *KD, **options)


def test_no_heads():
    with pytest.raises(ValueError, match="no logits given"):
        logit_loss([], torch.zeros(2, dtype=torch.int64), [], [])


def test_bad_table():
    heads, y = make(2, 4, 6)
    with pytest.raises(ValueError, match="2 heads need 2 ce_weights"):
        logit_loss(heads, y, [1.0], KD[1])


@pytest.mark.parametrize(
    "c, W, words",
    [
        ([-0.1, 0.0], KD[1], r"ce_weights\[0\] must be zero or a positive number, got -0.1"),
        ([0.1, math.nan], KD[1], r"ce_weights\[1\] .* got nan"),
        ([0.1, 0.0], [[0.0, math.inf], [0.0, 0.0]], r"table\[0\]\[1\] .* got inf"),
        ([0.1, 0.0], [[0.0, 0.9], [-1.0, 0.0]], r"table\[1\]\[0\] must be zero or a positive number, got -1"),
        ([0.1, 0.0], [[0.0, 0.9], [0.0, 0.5]], r"table\[1\]\[1\] must be 0, .* got 0.5"),
    ],
)
def test_bad_weights_are_named(c, W, words):
    with pytest.raises(ValueError, match=words):
        logit_loss(*make(2, 4, 6), c, W)


def test_heads_that_are_one_tensor():
    heads, y = make(2, 4, 6)
    with pytest.raises(TypeError, match="heads must be a list of logits .*, got Tensor"):
        logit_loss(torch.stack(heads), y, *KD)


def test_a_label_that_is_not_the_ignored_one():
    heads, y = make(2, 4, 6)
    y[1] = -100
    with pytest.raises(ValueError, match="row 1: -100; ignore_index, for rows without a label, is -1$"):
        logit_loss([head.cpu() for head in heads], y.cpu(), *KD, ignore_index=-1)


def test_second_derivative_is_refused():
    heads, y = make(2, 4, 6, learners=1)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(logit_loss(heads, y, *KD).loss, heads[0], create_graph=True)


def test_a_label_that_is_no_class_shows_as_nan_in_the_kernel():
    """On a GPU nobody asks; the loss must not look right."""
    heads, y = make(2, 4, 6, learners=1)
    y[2] = 6
    grads = torch.empty(1, 4, 6, device=DEVICE)
    weights = [0.1, 0.0, 0.9, 0.0, 0.0, 0.0]
    heads = [head.detach() for head in heads]
    loss, terms = torch.zeros((), device=DEVICE), torch.zeros(2, 3, device=DEVICE)
    launch(
        module.Inputs(heads, y, None, weights, 1.0, 0.0, None, False, False, "mean", [True, False]),
        (loss, terms),
        grads,
    )
    assert loss.isnan() and grads[0, 2].isnan().all() and grads[0, [0, 1, 3]].isfinite().all()


@pytest.mark.gpu
def test_more_than_2_31_elements():
    N, C = 70_000, 32_768
    heads = [torch.randn(1, C, device="cuda", dtype=torch.bfloat16).repeat(N, 1) for _ in range(2)]
    heads[0][-1].fill_(1.0)
    y = torch.zeros(N, dtype=torch.int64, device="cuda")
    heads[0].requires_grad_()
    gradient = torch.autograd.grad(logit_loss(heads, y, *KD, temperature=2.0).loss, heads[0])[0]
    rows = torch.tensor([0, N - 1], device="cuda")
    want = independent([head[rows] for head in heads], y[rows], *KD, T=2.0)[1][0] * 2 / N
    torch.testing.assert_close(gradient[rows].double(), want, rtol=1e-2, atol=1e-9)


@pytest.mark.gpu
def test_real_cuda_graph():
    heads, y = make(2, 256, 1000, torch.bfloat16, learners=1)
    factor = torch.ones((), device="cuda")

    def step() -> tuple[Tensor, Tensor]:
        loss = logit_loss(heads, y, *KD, temperature=4.0).loss
        return loss, torch.autograd.grad(loss * factor, heads[0])[0]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, gradient = step()
    for seed, upstream in ((1, 1.0), (2, 0.5)):
        with torch.no_grad():
            for head, other in zip(heads, make(2, 256, 1000, torch.bfloat16, seed=seed)[0], strict=True):
                head.copy_(other)
        factor.fill_(upstream)
        for _ in range(2):
            graph.replay()
        terms, gradients = independent(heads, y, *KD, T=4.0)
        torch.testing.assert_close(loss.detach().double(), terms.sum(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradient.double(), gradients[0] * upstream, rtol=1e-2, atol=1e-6)


def test_a_launch_is_worked_out_once_for_calls_that_are_alike():
    """On the host that takes as long as the launch itself."""

    logits, teacher, target = torch.randn(6, 10), torch.randn(6, 10), torch.randint(10, (6,))
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            patch.setattr("fastkd.kernels.op.runs_on_gpu", lambda device, dtype: True)  # the interpreter
        device = "cuda" if torch.cuda.is_available() else "cpu"
        given = [x.to(device) for x in (logits, teacher, target)]
        _plan.cache_clear()
        kd_loss(*given)
        before = _plan.cache_info()
        kd_loss(*given)
        kd_loss(*(x[:4] for x in given))
    after = _plan.cache_info()
    assert (after.hits - before.hits, after.misses - before.misses) == (1, 1)
