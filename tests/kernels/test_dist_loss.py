"""Both paths of the op, the closed form and the kernels, against the official formulation in float64."""

import importlib

import pytest
import torch
import torch.nn.functional as F

from fastkd.kernels.dist_loss import dist_loss, dist_loss_reference

kernel = importlib.import_module("fastkd.kernels.gpu.dist_loss")
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


def make(N, C, dtype=torch.float32, scale=2.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = ((torch.randn(N, C, generator=generator) * scale).to(DEVICE, dtype) for _ in range(2))
    return student.requires_grad_(), teacher


def official(student, teacher, beta=1.0, gamma=1.0, temperature=1.0):
    """The authors' DIST in float64, with the gradient by autograd."""
    student, teacher = student.detach().double().requires_grad_(), teacher.detach().double()

    def cosine(a, b, eps=1e-8):
        return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + eps)

    def relation(a, b):
        return 1 - cosine(a - a.mean(1).unsqueeze(1), b - b.mean(1).unsqueeze(1)).mean()

    y_s, y_t = ((z / temperature).softmax(1) for z in (student, teacher))
    inter, intra = (temperature**2 * relation(a, b) for a, b in ((y_s, y_t), (y_s.T, y_t.T)))
    loss = beta * inter + gamma * intra
    loss.backward()
    return loss.detach(), student.grad


def check(student, teacher, upstream=1.0, accurate=1e-5, **options):
    loss = dist_loss(student, teacher, **options)
    (gradient,) = torch.autograd.grad(loss, student, loss.new_tensor(upstream))
    want, want_gradient = official(student, teacher, **options)
    accurate = 1e-10 if loss.dtype == torch.float64 else accurate
    torch.testing.assert_close(loss.detach().double(), want, rtol=accurate, atol=accurate)
    assert gradient.dtype == student.dtype
    rounding = max(torch.finfo(student.dtype).eps, accurate)
    atol = max(2 * accurate * float((want_gradient * upstream).abs().max()), torch.finfo(student.dtype).smallest_normal)
    torch.testing.assert_close(gradient.double(), want_gradient * upstream, rtol=2 * rounding, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 3), (5, 7), (4, 16), (3, 40), (7, 33)])
def test_value_and_gradient(path, shape, dtype):
    check(*make(*shape, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "path, C",
    [("closed form", 1001), ("closed form", 8192), ("closed form", 32768), ("kernel", 1000), ("kernel", 1001)],
    indirect=["path"],
)
def test_many_classes(path, C, dtype):
    check(*make(3, C, dtype))


def test_more_rows_than_a_tile(path):
    check(*make(130, 24))


@pytest.mark.parametrize("options", [{"beta": 0.0}, {"gamma": 0.0}, {"beta": 2.5, "gamma": 0.3, "temperature": 4.0},
                                     {"temperature": 0.7}])  # fmt: skip
def test_options(path, options):
    check(*make(4, 21), **options)


@pytest.mark.parametrize("shape", [(3, 4), (6, 100), (64, 1000)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_closed_form(monkeypatch, shape, dtype):
    monkeypatch.setattr("fastkd.kernels.op.runs_on_gpu", lambda device, dtype: False)
    check(*make(*shape, dtype))


def test_temperature_1_is_the_paper(path):
    """T^2 multiplies the loss, which is 2 where nothing correlates."""
    student, teacher = make(4, 18)
    at_1, at_2 = dist_loss(student, teacher), dist_loss(student * 2, teacher * 2, temperature=2.0)
    torch.testing.assert_close(at_2, 4 * at_1)


@pytest.mark.parametrize("upstream", [0.0, -0.3, 65536.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_upstream(path, upstream, dtype):
    check(*make(3, 18, dtype), upstream=upstream)


def test_backward_twice(path):
    student, teacher = make(4, 18)
    loss = dist_loss(student, teacher)
    first, second, third = (torch.autograd.grad(loss * w, student, retain_graph=True)[0] for w in (2.0, 1.0, 1.0))
    torch.testing.assert_close(first, 2 * second)
    assert torch.equal(second, third)


@pytest.mark.parametrize("C", [18, 24])
def test_strides(path, C):
    student, teacher = make(6, C)
    want, want_gradient = official(student, teacher)
    sliced = torch.full((6, C + 8), nan, device=DEVICE)
    sliced[:, 8:] = teacher
    columns = student.detach().t().contiguous().t().requires_grad_()
    loss = dist_loss(columns, sliced[:, 8:])
    loss.backward()
    torch.testing.assert_close(loss.detach().double(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(columns.grad.double(), want_gradient, rtol=1e-4, atol=1e-6)


def test_dtypes_may_differ(path):
    student, teacher = make(3, 24, torch.bfloat16)
    check(student, teacher.float())


@pytest.mark.parametrize("offset", [-1e4, 3e4])
def test_common_offset(path, offset):
    student, teacher = make(3, 18)
    with torch.no_grad():
        student += offset
    check(student, teacher - offset)


def test_a_first_row_unlike_the_others(path):
    """Columns are measured from the first row: that must not cost digits."""
    student, teacher = make(40, 18)
    with torch.no_grad():
        student[0, 3], teacher[0, 3] = 30.0, 20.0
        student[1:, 3] -= 5
    check(student, teacher)


def test_nearly_uniform(path):
    """Correlations of differences of 1e-3 in p = 1 / C."""
    check(*make(8, 18, scale=1e-2), accurate=3e-4)


def test_saturated(path):
    """One class has everything; the others are 0 in fp32."""
    student, teacher = make(6, 18)
    with torch.no_grad():
        student += 300 * F.one_hot(torch.arange(6, device=DEVICE), 18)
        teacher += 10 * F.one_hot(torch.arange(6, device=DEVICE) + 1, 18)
    check(student, teacher)


@pytest.mark.parametrize("both", [False, True])
def test_a_class_that_is_ruled_out(path, both):
    student, teacher = make(5, 20)
    with torch.no_grad():
        teacher[torch.arange(5), torch.arange(5)] = -inf
        if both:
            student[torch.arange(5), torch.arange(5)] = -inf
    check(student, teacher)


@pytest.mark.parametrize("C", [7, 16, 21, 40])
def test_constant_rows_have_no_gradient(path, C):
    student, teacher = make(4, C)
    with torch.no_grad():
        student[1] = 3.0
        teacher[2] = -1.0
    loss = dist_loss(student, teacher, gamma=0.0)
    loss.backward()
    keep = torch.tensor([0, 3], device=DEVICE)
    want, want_gradient = official(student[keep], teacher[keep], gamma=0.0)
    torch.testing.assert_close(loss.detach().double(), 0.5 + want / 2, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(student.grad[keep].double(), want_gradient / 2, rtol=1e-4, atol=1e-6)
    assert (student.grad[[1, 2]] == 0).all()


@pytest.mark.parametrize("side", ["student", "teacher", "both"])
@pytest.mark.parametrize("N", [1, 3, 70])
def test_constant_columns_have_no_gradient(path, N, side):
    student, teacher = make(N, 18)
    with torch.no_grad():
        if side != "teacher":
            student[:] = student[0].clone()
        if side != "student":
            teacher[:] = teacher[0].clone()
    loss = dist_loss(student, teacher, beta=0.0, gamma=0.7)
    loss.backward()
    torch.testing.assert_close(loss.item(), 0.7)
    assert (student.grad == 0).all()


@pytest.mark.parametrize("place", [0, 1])
def test_nan_propagates(path, place):
    student, teacher = make(3, 18)
    with torch.no_grad():
        (student, teacher)[place][1, 4] = nan
    loss = dist_loss(student, teacher)
    loss.backward()
    assert loss.isnan() and student.grad[1].isnan().all()


def test_equal_networks(path):
    student, _ = make(5, 18)
    loss = dist_loss(student, student.detach())
    loss.backward()
    assert loss.abs() < 1e-4 and student.grad.abs().max() < 1e-4  # not 0, for the eps


def test_deterministic(path):
    student, teacher = make(9, 40)
    losses = [dist_loss(student, teacher) for _ in range(3)]
    assert losses[0] == losses[1] == losses[2]


def test_empty_batch(path):
    student, teacher = make(0, 5)
    loss = dist_loss(student, teacher)
    loss.backward()
    assert loss == 0 and student.grad.shape == (0, 5)
    assert dist_loss_reference(student, teacher) == 0


def test_only_the_student_learns(path):
    student, teacher = make(3, 18)
    teacher.requires_grad_()
    dist_loss(student, teacher).backward()
    assert teacher.grad is None and student.grad is not None
    want, _ = official(student, teacher)
    with torch.no_grad():
        torch.testing.assert_close(dist_loss(student, teacher).double(), want, rtol=1e-5, atol=1e-6)


def test_gradcheck():
    student, teacher = make(3, 5, torch.float64, scale=1.0)
    torch.autograd.gradcheck(lambda z: dist_loss(z, teacher, beta=0.7, gamma=1.3, temperature=2.0), student)


@pytest.mark.parametrize("learns", [False, True])
def test_opcheck(path, learns):
    student, teacher = make(3, 18)
    student = student.detach().requires_grad_(learns)
    torch.library.opcheck(torch.ops.fastkd.dist_loss.default, (student, teacher, 1.0, 1.0, 2.0, learns))
    if learns:
        _, rows, columns, _ = torch.ops.fastkd.dist_loss(student.detach(), teacher, 1.0, 1.0, 2.0, True)
        arguments = (student.detach(), teacher, 1.0, 1.0, 2.0, rows, columns, torch.tensor(0.5, device=DEVICE))
        torch.library.opcheck(torch.ops.fastkd.dist_loss_backward.default, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    torch.use_deterministic_algorithms(False)
    compiled = torch.compile(lambda s, t: dist_loss(s * 2, t) * 0.5, fullgraph=True, dynamic=dynamic)
    for N in (3, 5) if dynamic else (3,):
        student, teacher = make(N, 18)
        loss = compiled(student, teacher)
        loss.backward()
        want, want_gradient = official(student * 2, teacher)
        torch.testing.assert_close(loss.detach().double(), want / 2, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(student.grad.double(), want_gradient, rtol=1e-4, atol=1e-6)


def test_reference():
    student, teacher = make(5, 11, torch.float64)
    loss = dist_loss_reference(student, teacher, beta=0.5, gamma=2.0, temperature=3.0)
    loss.backward()
    want, want_gradient = official(student, teacher, beta=0.5, gamma=2.0, temperature=3.0)
    torch.testing.assert_close(loss.detach(), want)
    torch.testing.assert_close(student.grad, want_gradient)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s, t: (s, t[:, :-1]), r"\[\[3, 5\], \[3, 4\]\]"),
        (lambda s, t: (s, t[:-1]), r"\[\[3, 5\], \[2, 5\]\]"),
        (lambda s, t: (s[:, 0], t[:, 0]), r"\[N, C\]"),
        (lambda s, t: (s.long(), t), "floating point"),
        (lambda s, t: (s[:, :1], t[:, :1]), "1 class"),
        (lambda s, t: (s, t.to("meta")), "one device"),
    ],
)
def test_bad_input(change, words):
    with pytest.raises(ValueError, match=words):
        dist_loss(*change(*make(3, 5)))


def test_bad_temperature():
    with pytest.raises(ValueError, match="temperature must be above 0, got -1"):
        dist_loss(*make(3, 5), temperature=-1)


def test_second_derivative_is_refused():
    student, teacher = make(3, 5)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(dist_loss(student, teacher), student, create_graph=True)
