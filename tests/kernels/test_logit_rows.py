"""Losses of each row, class weights, masked rows and a missing target, against torch's cross_entropy in float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from capture import Capture

from fastkd.kernels import kd_loss, logit_loss, logit_loss_reference, op
from fastkd.losses import UNLABELLED, BridgeLoss, DKDLoss, KDLoss, MutualLoss

N, C = 5, 11
SETTINGS = {"temperature": 3.0, "ce_weight": 0.3, "kd_weight": 0.7}
WEIGHTS = torch.linspace(0, 2, C)
REDUCTIONS = ["mean", "sum", "none"]


@pytest.fixture(params=["closed form", "interpreted kernel", pytest.param("cuda", marks=pytest.mark.gpu)])
def way(request, monkeypatch):
    """The device, after a choice of what computes there."""
    if request.param == "interpreted kernel":
        if torch.cuda.is_available():
            pytest.skip("where there is a GPU nothing is interpreted")
        monkeypatch.setattr("fastkd.kernels.op.runs_on_gpu", lambda device, dtype: dtype == torch.float32)
        monkeypatch.setattr("fastkd.kernels.op.scale_in_place", lambda *_, **__: False)
    return "cuda" if request.param == "cuda" else "cpu"


def batch(device="cpu", dtype=torch.float32, scale=3.0, rows=N, classes=C):
    generator = torch.Generator().manual_seed(0)
    z_s, z_t = (torch.randn(rows, classes, generator=generator) * scale for _ in range(2))
    y = torch.randint(classes, (rows,), generator=generator)
    return z_s.to(device, dtype).requires_grad_(), z_t.to(device, dtype), y.to(device)


def independent(z_s, z_t, y, *, ignore_index=-100, mask_kd=False, class_weights=None, smoothing=0.0, reduction="mean",
                standardize=False):  # fmt: skip
    """(ce, kd) in float64: torch's cross_entropy, and a divergence of each row."""
    (s, t), T = (z.double() for z in (z_s, z_t)), SETTINGS["temperature"]
    weight = None if class_weights is None else class_weights.double()
    y = y.double() if y.is_floating_point() else y
    ce = F.cross_entropy(s, y, weight, ignore_index=ignore_index, label_smoothing=smoothing, reduction=reduction)
    if standardize:
        s, t = ((z - z.mean(1, keepdim=True)) / (z.std(1, keepdim=True) + 1e-7) for z in (s, t))
    log_s, log_t = (s / T).log_softmax(1), (t / T).log_softmax(1)
    kd = (log_t.exp() * (log_t - log_s)).sum(1)
    kept = (y != ignore_index) if mask_kd else torch.ones(len(kd), dtype=torch.bool, device=kd.device)
    kd = torch.where(kept, kd, 0)
    kd = {"none": kd, "sum": kd.sum(), "mean": kd.sum() / kept.sum()}[reduction]
    return SETTINGS["ce_weight"] * ce, SETTINGS["kd_weight"] * T**2 * kd


def check(z_s, z_t, y, **options):
    """Values, and gradients for upstream gradients that differ from row to row and from term to term."""
    given = {"label_smoothing" if name == "smoothing" else name: value for name, value in options.items()}
    loss, ce, kd = kd_loss(z_s, z_t, y, **SETTINGS, **given)
    wanted = independent(z_s, z_t, y, **options)
    tolerance = {"rtol": 1e-11, "atol": 1e-12} if loss.dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-6}
    for got, want in zip((ce, kd, loss), (*wanted, sum(wanted)), strict=True):
        torch.testing.assert_close(got.double(), want, **tolerance)
    rows = torch.linspace(-1, 2, len(z_s)).to(z_s.device) if options.get("reduction") == "none" else torch.tensor(0.7)
    if rows.dim():
        rows[2] = 0
    rows = rows.to(z_s.device, loss.dtype)
    if z_s.dtype.itemsize < 4:
        tolerance = {"rtol": 2 * torch.finfo(z_s.dtype).eps, "atol": 1e-6}
    for of in (lambda loss, ce, kd: loss, lambda loss, ce, kd: rows * ce - 2 * kd):
        got = torch.autograd.grad((rows * of(loss, ce, kd)).sum(), z_s, retain_graph=True)[0]
        want = torch.autograd.grad((rows.double() * of(sum(wanted), *wanted)).sum(), z_s, retain_graph=True)[0]
        torch.testing.assert_close(got, want, **tolerance)
        assert not rows.dim() or not got[2].any()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighted, smoothing", [(False, 0.0), (True, 0.0), (True, 0.1)])
@pytest.mark.parametrize("ignored", [False, True])
def test_values_and_gradients(way, reduction, weighted, smoothing, ignored):
    options = {"reduction": reduction, "smoothing": smoothing}
    if weighted:
        options["class_weights"] = WEIGHTS.to(way)
    if ignored:
        options |= {"ignore_index": -100, "mask_kd": not smoothing}
    is_kernel = op.runs_on_gpu(torch.device(way), torch.float32)
    for dtype in (torch.float32,) if is_kernel else (torch.float32, torch.float64):
        z_s, z_t, y = batch(way, dtype)
        if ignored:
            y[[1, 4]] = -100
        check(z_s, z_t, y, **options)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_16_bits(way, reduction):
    z_s, z_t, y = batch(way, torch.bfloat16)
    y[1] = -100
    check(z_s, z_t, y, reduction=reduction, class_weights=WEIGHTS.to(way), ignore_index=-100, mask_kd=True)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_soft_targets(way, reduction, smoothing):
    """As in torch, the mean over rows of a distribution is not divided by class weights."""
    z_s, z_t, _ = batch(way)
    y = (z_t * 2).softmax(1) * torch.linspace(0.5, 1.5, N, device=way)[:, None]
    check(z_s, z_t, y, reduction=reduction, smoothing=smoothing, class_weights=WEIGHTS.to(way))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("options", [{}, {"class_weights": WEIGHTS}, {"mask_kd": True}])
def test_ignored_labels_leave_a_soft_target_alone(way, reduction, options):
    z_s, z_t, _ = batch(way)
    y = z_t.softmax(1)
    options = {name: value.to(way) if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    got = kd_loss(z_s, z_t, y, ignore_index=-100, reduction=reduction, **options)
    options.pop("mask_kd", None)
    torch.testing.assert_close(got, kd_loss(z_s, z_t, y, reduction=reduction, **options))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_standardised(way, reduction):
    z_s, z_t, y = batch(way)
    y[3] = -100
    check(z_s, z_t, y, reduction=reduction, standardize=True, ignore_index=-100, mask_kd=True)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_rows_in_pieces(way, reduction):
    """A row that does not fit into registers."""
    z_s, z_t, y = batch(way, rows=4, classes=4_100)
    y[3] = -100
    weights = torch.linspace(0.1, 2, 4_100, device=way)
    check(z_s, z_t, y, reduction=reduction, ignore_index=-100, mask_kd=True, class_weights=weights)


@pytest.mark.parametrize("options", [{"class_weights": WEIGHTS}, {"mask_kd": True}, {"reduction": "none"}, {}])
def test_no_row_is_left(way, options):
    """The mean of nothing is 0, where torch has NaN."""
    z_s, z_t, y = batch(way)
    options = {name: value.to(way) if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    loss, ce, kd = kd_loss(z_s, z_t, torch.full_like(y, -100), ignore_index=-100, **options)
    assert not ce.any() and kd.any() != ("mask_kd" in options)
    gradient = torch.autograd.grad(loss.sum(), z_s)[0]
    assert gradient.isfinite().all() and gradient.any() != ("mask_kd" in options)


def test_labels_of_weight_0_alone(way):
    z_s, z_t, y = batch(way)
    loss, ce, _ = kd_loss(z_s, z_t, torch.zeros_like(y), class_weights=WEIGHTS.to(way))
    assert ce == 0 and torch.autograd.grad(loss, z_s)[0].isfinite().all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_masked_row_may_hold_anything(way, reduction):
    z_s, z_t, y = batch(way)
    y[1] = -100
    options = {"ignore_index": -100, "mask_kd": True, "reduction": reduction}
    want = kd_loss(z_s, z_t, y, **options)
    wanted = torch.autograd.grad(want.loss.sum(), z_s)[0]
    with torch.no_grad():
        z_s[1], z_t[1] = torch.nan, torch.inf
    got = kd_loss(z_s, z_t, y, **options)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got.loss.sum(), z_s)[0], wanted)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_several_heads(way, reduction):
    """A head in float64 is independent of the kernel; the terms of each row add up to the loss."""
    z, _, y = batch(way)
    heads = [z, *(z.detach().flip(0) * k for k in (0.5, 2))]
    heads[1].requires_grad_()
    table = [[0.0, 0.5, 0.2], [0.3, 0.0, 1.0], [0.0] * 3]
    y[2] = 4
    options = {"temperature": 2.0, "ignore_index": 4, "mask_kd": True, "reduction": reduction}
    got = logit_loss(heads, y, [1.0, 0.7, 0.0], table, class_weights=WEIGHTS.to(way), **options)
    doubles = [head.double() for head in heads]
    want = logit_loss_reference(doubles, y, [1.0, 0.7, 0.0], table, class_weights=WEIGHTS.to(way), **options)
    torch.testing.assert_close([x.double() for x in got], list(want), rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(got.loss, got.terms.sum((-2, -1)))
    above = torch.linspace(-1, 1, got.terms.numel()).view_as(got.terms).to(way)
    for got_sum, want_sum in (
        (got.loss.sum(), want.loss.sum()),
        ((above * got.terms).sum(), (above * want.terms).sum()),
    ):
        torch.testing.assert_close(
            torch.autograd.grad(got_sum, heads[:2], retain_graph=True),
            torch.autograd.grad(want_sum, heads[:2], retain_graph=True),
            rtol=2e-5, atol=2e-6,
        )  # fmt: skip


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_without_a_target(way, reduction):
    z_s, z_t, y = batch(way)
    loss, ce, kd = kd_loss(z_s, z_t, None, ce_weight=0.0, reduction=reduction)
    want = kd_loss(z_s, z_t, y, ce_weight=0.0, reduction=reduction)
    assert not ce.any()
    torch.testing.assert_close((loss, kd), (want.loss, want.kd))
    torch.testing.assert_close(*(torch.autograd.grad(x.loss.sum(), z_s) for x in (
        kd_loss(z_s, z_t, None, ce_weight=0.0, reduction=reduction), want)))  # fmt: skip


def test_modules_without_a_target():
    z_s, z_t, y = batch()
    heads = [[z_s], [z_t]]
    torch.testing.assert_close(MutualLoss(ce_weight=0.0)(heads, None), MutualLoss(ce_weight=0.0)(heads, y))
    bridge = BridgeLoss(ce_s=0.0, ce_a=0.0)
    torch.testing.assert_close(bridge(z_s, z_t, z_t, None), bridge(z_s, z_t, z_t, y))
    for call in (
        lambda: KDLoss()(z_s, z_t, None),
        lambda: MutualLoss()(heads, None),
        lambda: BridgeLoss(ce_s=0.0)(z_s, z_t, z_t, None),
    ):
        with pytest.raises(
            ValueError, match=r"target is None, but the cross-entropy has a weight, .*: give the labels"
        ):
            call()
    with pytest.raises(TypeError, match="DKD needs the label of every sample: target"):
        DKDLoss()(z_s, z_t, None)


CALLS = [
    {"reduction": "none"},
    {"reduction": "sum"},
    {"class_weights": WEIGHTS},
    {"ignore_index": UNLABELLED, "mask_kd": True, "class_weights": WEIGHTS, "reduction": "none"},
    {"ce_weight": 0.0},
]


def called(options, z_s, z_t, y):
    loss = KDLoss(**options)(z_s, z_t, y if options.get("ce_weight") != 0 else None)
    factors = torch.linspace(0, 1, N) if loss.dim() else 0.5
    return loss, torch.autograd.grad((loss * factors).sum(), z_s)[0]


@pytest.mark.parametrize("options", CALLS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compiled(way, options, dtype):
    z_s, z_t, y = batch(way, dtype)
    y[1] = UNLABELLED if "mask_kd" in options else 0
    loss = KDLoss(**options).to(way)
    given = (z_s, z_t, None if options.get("ce_weight") == 0 else y)
    factors = torch.linspace(0, 1, N, device=way) if options.get("reduction") == "none" else 0.5
    found = []
    torch.compiler.reset()  # each call is one of few recompilations otherwise
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        value = function(*given)
        found.append((value, *torch.autograd.grad((value * factors).sum(), z_s)))
    torch.testing.assert_close(*found, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("options", CALLS, ids=str)
def test_in_a_captured_graph(options):
    """Replayed on new inputs it gives what it gives eagerly, and it asks the device nothing."""
    z_s, z_t, y = batch()
    y[1] = UNLABELLED if "mask_kd" in options else 0
    with Capture() as graph:
        got = called(options, z_s, z_t, y)
    with torch.no_grad():
        z_s.copy_(z_s.flip(0))
    graph.replay()
    torch.testing.assert_close(got, called(options, z_s, z_t, y))


def test_the_weights_follow_the_module():
    loss = KDLoss(class_weights=[0.5] * C)
    assert loss.class_weights.dtype == torch.float32
    assert loss.to("meta").class_weights.device.type == "meta" and not loss.state_dict()


@pytest.mark.parametrize(
    "options, words",
    [
        ({"reduction": "batchmean"}, "reduction must be mean, sum or none, got 'batchmean'"),
        ({"class_weights": [1.0, -1.0]}, r"class_weights\[1\] must be zero or a positive number, got -1.0"),
        ({"class_weights": [[1.0, 1.0]]}, r"class_weights must be numbers \[C\], .* got the shape \[1, 2\]"),
        ({"class_weights": [1.0, float("nan")]}, r"class_weights\[1\] .* got nan"),
        (
            {"class_weights": [1.0, 2.0]},
            r"class_weights must be floating \[11\] on cpu, .* got torch.float32 \[2\] on cpu",
        ),
        ({"mask_kd": True}, "mask_kd=True needs ignore_index, the label of the rows to leave out; got None"),
        ({"mask_kd": 1}, "mask_kd must be True or False, got 1"),
    ],
)
def test_what_does_not_fit_is_named(options, words):
    z_s, z_t, y = batch()
    with pytest.raises(ValueError, match=words):
        KDLoss(**options)(z_s, z_t, y)


def test_masked_rows_need_a_target():
    z_s, z_t, _ = batch()
    with pytest.raises(ValueError, match="mask_kd=True needs a target"):
        KDLoss(ce_weight=0.0, ignore_index=-100, mask_kd=True)(z_s, z_t, None)


@pytest.mark.parametrize("reduction, options", [*itertools.product(REDUCTIONS, [{}, {"class_weights": WEIGHTS}])])
def test_an_empty_batch(way, reduction, options):
    z_s, z_t, y = batch(way)
    options = {name: value.to(way) for name, value in options.items()}
    loss = kd_loss(z_s[:0], z_t[:0], y[:0], reduction=reduction, **options).loss
    assert loss.shape == ((0,) if reduction == "none" else ()) and not loss.any()


def test_gradcheck():
    z_s, z_t, y = batch(dtype=torch.float64)
    y[1] = -100
    options = {"ignore_index": -100, "class_weights": WEIGHTS, "standardize": True}
    for more in ({"reduction": "none"}, {"reduction": "none", "mask_kd": True}, {"reduction": "sum"}, {}):
        assert torch.autograd.gradcheck(lambda z, more=more: kd_loss(z, z_t, y, **options, **more)[:3], (z_s,))
