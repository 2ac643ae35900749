"""Both paths of the op, the closed form and the kernel, against the official formulation in float64."""

import importlib

import pytest
import torch
import torch.nn.functional as F

from fastkd.kernels.dkd_loss import Inputs, dkd_loss, dkd_loss_reference

kernel = importlib.import_module("fastkd.kernels.gpu.dkd_loss")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [] if DEVICE == "cpu" else pytest.mark.gpu
inf, nan = float("inf"), float("nan")


@pytest.fixture(params=["closed form", "kernel", "kernel in pieces"])
def path(request, monkeypatch):
    """Which implementation the op takes; in pieces: rows of more than 16 classes do not fit into the registers."""
    monkeypatch.setattr("fastkd.kernels.op.runs_on_gpu", lambda device, dtype: request.param != "closed form")
    if request.param == "kernel in pieces":
        monkeypatch.setattr(kernel, "row_shape", lambda *sizes: (16, 4))
    return request.param


def make(N, C, dtype=torch.float32, scale=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = ((torch.randn(N, C, generator=generator) * scale).to(DEVICE, dtype) for _ in range(2))
    return student.requires_grad_(), teacher, torch.randint(C, (N,), generator=generator).to(DEVICE)


def official(student, teacher, y, alpha=1.0, beta=8.0, T=4.0):
    """mdistiller's dkd_loss in float64, where exp(-1000) is 0; with the gradient by autograd."""
    student, teacher = student.detach().double().requires_grad_(), teacher.detach().double()
    label = F.one_hot(y, student.shape[1]).double()

    def binary(z):
        p = F.softmax(z / T, 1)
        return torch.stack([(p * label).sum(1), (p * (1 - label)).sum(1)], 1)

    tckd = F.kl_div(binary(student).log(), binary(teacher), reduction="batchmean")
    log_s, r_t = F.log_softmax(student / T - 1000 * label, 1), F.softmax(teacher / T - 1000 * label, 1)
    loss = T**2 * (alpha * tckd + beta * F.kl_div(log_s, r_t, reduction="batchmean"))
    loss.backward()
    return loss.detach(), student.grad


def by_rows(student, teacher, y, alpha=1.0, beta=8.0, T=4.0):
    """Row by row without the label's column and without any class of logit -inf in both; autograd in float64."""
    student, teacher = student.detach().double().requires_grad_(), teacher.detach().double()
    total = 0.0
    for s, t, label in zip(student / T, teacher / T, y.tolist(), strict=True):
        rest = [k for k in range(len(s)) if k != label and (s[k] != -inf or t[k] != -inf)]
        d_s, d_t = (z[label] - z[rest].logsumexp(0) for z in (s, t))
        b_t = torch.stack([d_t, -d_t]).sigmoid()
        total += alpha * (b_t * (F.logsigmoid(torch.stack([d_t, -d_t])) - F.logsigmoid(torch.stack([d_s, -d_s])))).sum()
        total += beta * F.kl_div(s[rest].log_softmax(0), t[rest].log_softmax(0), reduction="sum", log_target=True)
    loss = T**2 * total / len(y)
    loss.backward()
    return loss.detach(), student.grad


def check(student, teacher, y, want=official, upstream=1.0, **options):
    loss = dkd_loss(student, teacher, y, **options)
    (gradient,) = torch.autograd.grad(loss, student, loss.new_tensor(upstream))
    names = {"temperature": "T"}
    value, want_gradient = want(student, teacher, y, **{names.get(k, k): v for k, v in options.items()})
    accurate = 1e-10 if loss.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(loss.detach().double(), value, rtol=accurate, atol=accurate)
    assert gradient.dtype == student.dtype
    rounding = max(torch.finfo(student.dtype).eps, accurate)
    atol = max(accurate * float((want_gradient * upstream).abs().max()), torch.finfo(student.dtype).smallest_normal)
    torch.testing.assert_close(gradient.double(), want_gradient * upstream, rtol=2 * rounding, atol=2 * atol)
    return loss, gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 3), (5, 7), (4, 16), (3, 40), (7, 33)])
def test_value_and_gradient(path, shape, dtype):
    check(*make(*shape, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", ["closed form", "kernel"], indirect=True)
@pytest.mark.parametrize("C", [2, 1000, 1001, 8192, 21841, 32768])
def test_many_classes(path, C, dtype):
    """Above 8,192 the kernel reads a row in pieces."""
    check(*make(3, C, dtype))


@pytest.mark.parametrize("options", [{"alpha": 0.0}, {"beta": 0.0}, {"alpha": 2.5, "beta": 1.0, "temperature": 1.0},
                                     {"temperature": 0.7}, {"temperature": 20.0}])  # fmt: skip
def test_options(path, options):
    check(*make(4, 21), **options)


@pytest.mark.parametrize("shape", [(3, 2), (6, 100), (64, 1000)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_closed_form(monkeypatch, shape, dtype):
    monkeypatch.setattr("fastkd.kernels.op.runs_on_gpu", lambda device, dtype: False)
    check(*make(*shape, dtype))


def test_two_classes_have_no_nckd(path):
    student, teacher, y = make(6, 2)
    assert dkd_loss(student, teacher, y, alpha=0.0) == 0
    check(student, teacher, y)


@pytest.mark.parametrize("upstream", [0.0, -0.3, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_upstream(path, upstream, dtype):
    check(*make(3, 18, dtype), upstream=upstream)


def test_upstream_saves_what_16_bits_would_lose(path):
    student, teacher, y = make(3, 18, torch.float16, scale=0.01)
    check(student, teacher, y, upstream=65536.0, temperature=0.01, alpha=1e-5, beta=1e-5)


def test_backward_twice(path):
    student, teacher, y = make(4, 18)
    loss = dkd_loss(student, teacher, y)
    first, second, third = (torch.autograd.grad(loss * w, student, retain_graph=True)[0] for w in (2.0, 1.0, 1.0))
    torch.testing.assert_close(first, 2 * second)
    torch.testing.assert_close(second, third, rtol=0, atol=0)
    torch.testing.assert_close(second.double(), official(student, teacher, y)[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("C", [18, 24])
def test_strides(path, C):
    student, teacher, y = make(6, C)
    want, want_gradient = official(student, teacher, y)
    sliced = torch.full((6, C + 8), nan, device=DEVICE)
    sliced[:, 8:] = teacher
    columns = student.detach().t().contiguous().t().requires_grad_()
    labels = torch.stack([y, y], 1)[:, 0]
    loss = dkd_loss(columns, sliced[:, 8:], labels)
    loss.backward()
    torch.testing.assert_close(loss.detach().double(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(columns.grad.double(), want_gradient, rtol=1e-5, atol=1e-6)


def test_dtypes_may_differ(path):
    student, teacher, y = make(3, 24, torch.bfloat16)
    check(student, teacher.float(), y)


@pytest.mark.parametrize("offset", [-1e4, 3e4])
def test_common_offset(path, offset):
    student, teacher, y = make(3, 18)
    with torch.no_grad():
        student += offset
    check(student, teacher - offset, y)


@pytest.mark.parametrize("margin", [-300.0, -30.0, 30.0, 300.0, 20000.0])
def test_label_far_from_the_others(path, margin):
    student, teacher, y = make(3, 18)
    shift = margin * F.one_hot(y, 18)
    with torch.no_grad():
        student += shift
    check(student, teacher, y, want=by_rows)
    check(student, teacher + 1.01 * shift, y, want=by_rows)


def test_small_differences_near_certainty_are_exact(path):
    """p_y = 1 - 1e-6: its own terms are 1e-6 and must not drown in the rounding of 1."""
    student, teacher, y = make(3, 18, scale=1.0)
    with torch.no_grad():
        student += 14.0 * F.one_hot(y, 18)
    loss = dkd_loss(student, teacher + 15.0 * F.one_hot(y, 18), y, beta=0.0, temperature=1.0)
    want, want_gradient = by_rows(student, teacher + 15.0 * F.one_hot(y, 18), y, beta=0.0, T=1.0)
    loss.backward()
    torch.testing.assert_close(loss.detach().double(), want, rtol=1e-3, atol=0)
    torch.testing.assert_close(student.grad.double(), want_gradient, rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize("both", [False, True])
def test_a_class_that_the_teacher_rules_out(path, both):
    student, teacher, y = make(4, 20)
    out = (y + 3) % 20
    with torch.no_grad():
        teacher[torch.arange(4), out] = -inf
        if both:
            student[torch.arange(4), out] = -inf
    loss, gradient = check(student, teacher, y, want=by_rows if both else _finite_minus_inf)
    assert gradient.isfinite().all() and loss.isfinite()
    if both:
        assert (gradient[torch.arange(4), out] == 0).all()


def _finite_minus_inf(student, teacher, y):
    return by_rows(student, teacher.where(teacher != -inf, -1e5), y)


def test_a_class_that_only_the_student_rules_out(path):
    student, teacher, y = make(4, 20)
    with torch.no_grad():
        student[torch.arange(4), (y + 3) % 20] = -inf
    loss = dkd_loss(student, teacher, y)
    loss.backward()
    assert loss == inf and student.grad.isfinite().all()
    assert (student.grad[torch.arange(4), (y + 3) % 20] < 0).all()


def test_only_the_label_is_left(path):
    """r is 0 / 0 in rows without another class: defined as 0, nothing is learned from them about the rest."""
    student, teacher, y = make(3, 18)
    rest = ~F.one_hot(y, 18).bool()
    with torch.no_grad():
        teacher[rest] = -inf
    loss = dkd_loss(student, teacher, y, alpha=0.0)
    assert loss == 0
    loss = dkd_loss(student, teacher, y, beta=0.0)
    torch.testing.assert_close(loss, 16 * F.cross_entropy(student / 4, y), rtol=1e-5, atol=1e-6)
    loss.backward()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("place", ["student", "teacher", "label"])
def test_nan_propagates(path, place):
    student, teacher, y = make(3, 18)
    column = int(y[1]) - (place != "label")
    with torch.no_grad():
        {"student": student, "teacher": teacher, "label": student}[place][1, column] = nan
    loss = dkd_loss(student, teacher, y)
    loss.backward()
    assert loss.isnan() and student.grad[1].isnan().any() and student.grad[[0, 2]].isfinite().all()


def test_equal_networks(path):
    student, _, y = make(5, 18)
    loss = dkd_loss(student, student.detach(), y)
    loss.backward()
    assert loss.abs() < 1e-5 and student.grad.abs().max() < 1e-6


def test_gradients_sum_to_zero_over_classes(path):
    student, teacher, y = make(5, 40)
    dkd_loss(student, teacher, y).backward()
    assert student.grad.sum(1).abs().max() < 1e-5


def test_deterministic(path):
    student, teacher, y = make(9, 40)
    losses = [dkd_loss(student, teacher, y) for _ in range(3)]
    assert losses[0] == losses[1] == losses[2]


def test_empty_batch(path):
    student, teacher, y = make(0, 5)
    loss = dkd_loss(student, teacher, y)
    loss.backward()
    assert loss == 0 and student.grad.shape == (0, 5)
    assert dkd_loss_reference(student, teacher, y) == 0


def test_only_the_student_learns(path):
    student, teacher, y = make(3, 18)
    teacher.requires_grad_()
    dkd_loss(student, teacher, y).backward()
    assert teacher.grad is None and student.grad is not None
    assert not dkd_loss(student.detach(), teacher, y).requires_grad
    want, _ = official(student, teacher, y)
    with torch.no_grad():
        torch.testing.assert_close(dkd_loss(student, teacher, y).double(), want, rtol=1e-5, atol=1e-6)


def test_autocast(path):
    """Its products of 16 bits would show in the value."""
    student, teacher, y = make(3, 60)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        inside = dkd_loss(student, teacher, y)
    assert torch.equal(inside, dkd_loss(student, teacher, y))


def test_gradcheck():
    student, teacher, y = make(3, 5, torch.float64, scale=1.0)
    torch.autograd.gradcheck(lambda z: dkd_loss(z, teacher, y, alpha=0.7, beta=1.3), student)


@pytest.mark.parametrize("learns", [False, True])
def test_opcheck(path, learns):
    student, teacher, y = make(3, 18)
    student = student.detach().requires_grad_(learns)
    arguments = (student, teacher, y, 1.0, 8.0, 4.0, learns)
    torch.library.opcheck(torch.ops.fastkd.dkd_loss.default, arguments)
    if learns:
        arguments = (student.detach(), teacher, y, 1.0, 8.0, 4.0)
        upstream = torch.tensor(0.5, device=DEVICE)
        torch.library.opcheck(torch.ops.fastkd.dkd_loss_backward.default, (*arguments, upstream))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    compiled = torch.compile(lambda s, t, y: dkd_loss(s * 2, t, y) * 0.5, fullgraph=True, dynamic=dynamic)
    for N in (3, 5) if dynamic else (3,):
        student, teacher, y = make(N, 18)
        loss = compiled(student, teacher, y)
        loss.backward()
        doubled = (student.detach() * 2).requires_grad_()
        want, want_gradient = official(doubled, teacher, y)
        torch.testing.assert_close(loss.detach().double(), want / 2, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(student.grad.double(), want_gradient, rtol=1e-5, atol=1e-6)


def check_anything(N, C, T, alpha, beta, scale, seed, on_gpu):
    student, teacher, y = make(N, C, scale=scale, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastkd.kernels.op.runs_on_gpu", lambda device, dtype: on_gpu)
        loss = dkd_loss(student, teacher, y, alpha=alpha, beta=beta, temperature=T)
        (gradient,) = torch.autograd.grad(loss * -0.5, student)
    value, wanted = by_rows(student, teacher, y, alpha, beta, T)
    rounding = 1e-6 * (alpha + beta) * T  # of probabilities, whose differences may be small
    torch.testing.assert_close(loss.detach().double(), value, rtol=5e-5, atol=rounding * T + 1e-30)
    torch.testing.assert_close(gradient.double(), -0.5 * wanted, rtol=5e-5, atol=rounding / N + 1e-30)


def test_anything():
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    given = hypothesis.given(
        N=st.integers(1, 5),
        C=st.integers(3, 40),
        T=st.floats(0.5, 20),
        alpha=st.floats(0, 3),
        beta=st.floats(0, 10),
        scale=st.sampled_from([0.01, 1.0, 30.0]),
        seed=st.integers(0, 99),
        on_gpu=st.booleans(),
    )
    hypothesis.settings(max_examples=15, deadline=None, derandomize=True)(given(check_anything))()


def test_reference():
    student, teacher, y = make(5, 11, torch.float64)
    loss = dkd_loss_reference(student, teacher, y, alpha=0.5, beta=2.0, temperature=3.0)
    loss.backward()
    want, want_gradient = official(student, teacher, y, alpha=0.5, beta=2.0, T=3.0)
    torch.testing.assert_close(loss.detach(), want)
    torch.testing.assert_close(student.grad, want_gradient)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s, t, y: (s, t[:, :-1], y), r"\[\[3, 5\], \[3, 4\]\]"),
        (lambda s, t, y: (s, t, y[:-1]), r"int64 \[2\]"),
        (lambda s, t, y: (s, t, y.int()), "int32"),
        (lambda s, t, y: (s, t, F.one_hot(y, 5).float()), "labels int64"),
        (lambda s, t, y: (s.long(), t, y), "floating point"),
        (lambda s, t, y: (s[:, :1], t[:, :1], y), "1 class"),
        (lambda s, t, y: (s, t.to("meta"), y), "one device"),
    ],
)
def test_bad_input(change, words):
    with pytest.raises(ValueError, match=words):
        dkd_loss(*change(*make(3, 5)))


def test_bad_temperature():
    with pytest.raises(ValueError, match="temperature must be above 0, got 0"):
        dkd_loss(*make(3, 5), temperature=0)


def test_bad_label(monkeypatch):
    student, teacher, y = make(3, 5)
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="from 0 to 4, first in row 2: 5"):
            dkd_loss(student, teacher, torch.tensor([0, 1, 5]))
    y[1] = -1
    loss = torch.zeros((), device=DEVICE)
    kernel.launch(Inputs(student.detach(), teacher, y, 1.0, 8.0, 4.0), (loss,), None)
    assert loss.isnan()


def test_second_derivative_is_refused():
    student, teacher, y = make(3, 5)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(dkd_loss(student, teacher, y), student, create_graph=True)
