"""RKD and SP against loops over pairs and triples in float64."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastkd.kernels.relational import rkd_loss, sp_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [] if DEVICE == "cpu" else pytest.mark.gpu
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
nan = float("nan")


def make(N, *shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(N, *shape, generator=generator).to(DEVICE, dtype) for shape in shapes)
    return student.requires_grad_(), teacher


def huber(x):
    return 0.5 * x * x if abs(x) < 1 else abs(x) - 0.5


def rkd(student, teacher, distance_weight=25.0, angle_weight=50.0):
    student, teacher = student.detach().cpu().double().requires_grad_(), teacher.detach().cpu().double()
    N = len(student)

    def distance(x, i, j):
        return (x[i] - x[j]).norm() if not torch.equal(x[i], x[j]) else x.new_zeros(())

    def distances(x):
        d = {(i, j): distance(x, i, j) for i in range(N) for j in range(N)}
        positive = [value for value in d.values() if value > 0]
        mean = sum(positive) / len(positive) if positive else 1
        return {pair: value / mean for pair, value in d.items()}

    def angle(x, i, j, k):
        d = distance(x, i, j), distance(x, k, j)
        return (x[i] - x[j]) @ (x[k] - x[j]) / (d[0] * d[1]) if d[0] * d[1] > 0 else x.new_zeros(())

    d_s, d_t = distances(student), distances(teacher)
    loss = distance_weight * sum(huber(d_s[pair] - d_t[pair]) for pair in d_s) / N**2
    triples = [(i, j, k) for i in range(N) for j in range(N) for k in range(N)]
    loss = loss + angle_weight * sum(huber(angle(student, *ijk) - angle(teacher, *ijk)) for ijk in triples) / N**3
    if loss.requires_grad:
        loss.backward()
    return loss.detach().to(DEVICE), (0 * student if student.grad is None else student.grad).detach().to(DEVICE)


def sp(student, teacher):
    student, teacher = student.detach().cpu().double().requires_grad_(), teacher.detach().cpu().double()
    N, rows = len(student), []
    for x in (student, teacher):
        gram = [torch.stack([(a * b).sum() for b in x]) for a in x]
        rows.append(
            [g / g.square().sum().sqrt() if g.detach().abs().sum() > 0 else torch.zeros(N).double() for g in gram]
        )
    loss = sum((s - t).square().sum() for s, t in zip(*rows, strict=True)) / N**2
    loss.backward()
    return loss.detach().to(DEVICE), student.grad.to(DEVICE)


def check(loss_of, want_of, student, teacher, factor=1.0, **options):
    loss = loss_of(student, teacher, **options)
    (gradient,) = torch.autograd.grad(loss * factor, student)
    want, want_gradient = want_of(student, teacher, **options)
    accurate = 1e-9 if student.dtype == torch.float64 else 3e-5
    assert loss.dtype == (torch.float64 if student.dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(loss.detach().double(), want, rtol=accurate, atol=accurate)
    rounding = max(2 * torch.finfo(student.dtype).eps, accurate)
    atol = rounding * max(1e-3, float(want_gradient.abs().max() * factor))
    torch.testing.assert_close(gradient.double(), want_gradient * factor, rtol=rounding, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "D", "D2"), [(2, 3, 5), (5, 7, 4), (4, 64, 64)])
def test_rkd(dtype, N, D, D2):
    check(rkd_loss, rkd, *make(N, (D,), (D2,), dtype=dtype))


@pytest.mark.parametrize("options", [{"distance_weight": 0.0}, {"angle_weight": 0.0}, {"distance_weight": 3.0}])
def test_rkd_options(options):
    check(rkd_loss, rkd, *make(4, (5,), (6,)), factor=2.5, **options)


@pytest.mark.parametrize("offset", [10.0, 1000.0])
def test_rkd_far_from_the_origin(offset):
    student, teacher = make(4, (5,), (6,), dtype=torch.float64)
    student = (student.detach() + offset).float().requires_grad_()
    check(rkd_loss, rkd, student, (teacher + offset).float())


def test_rkd_with_equal_samples():
    """The distance is 0 and sqrt has no derivative: no part in mean or gradient."""
    student, teacher = make(5, (7,), (4,))
    with torch.no_grad():
        student[3] = student[1]
        teacher[4] = teacher[0]
    check(rkd_loss, rkd, student, teacher)


@pytest.mark.parametrize("N", [0, 1, 3])
def test_rkd_without_relations(N):
    student = torch.ones(N, 4, device=DEVICE, requires_grad=True)
    loss = rkd_loss(student, torch.ones(N, 2, device=DEVICE))
    loss.backward()
    assert loss == 0 and (student.grad == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shapes", [((3,), (5,)), ((2, 3, 3), (4, 2, 2))])
def test_sp(dtype, shapes):
    check(sp_loss, sp, *make(4, *shapes, dtype=dtype))


def test_sp_channels_last_and_sliced():
    student, teacher = make(4, (2, 3, 3), (8, 2, 2))
    want, want_gradient = sp(student, teacher[:, ::2])
    student = student.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    loss = sp_loss(student, teacher[:, ::2])
    loss.backward()
    torch.testing.assert_close(loss.detach().double(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(student.grad.double(), want_gradient, rtol=1e-4, atol=1e-6)
    assert student.grad.is_contiguous(memory_format=torch.channels_last)


def test_sp_of_a_sample_that_is_zero():
    student, teacher = make(4, (5,), (6,))
    with torch.no_grad():
        student[2], teacher[1] = 0, 0
    loss = sp_loss(student, teacher)
    loss.backward()
    want, _ = sp(student, teacher)
    torch.testing.assert_close(loss.detach().double(), want, rtol=1e-5, atol=1e-6)
    assert student.grad.isfinite().all() and student.grad.abs().max() < 10


def test_sp_of_an_empty_batch():
    student, teacher = make(0, (5,), (6,))
    loss = sp_loss(student, teacher)
    loss.backward()
    assert loss == 0 and student.grad.shape == (0, 5)


@pytest.mark.parametrize("scale", [1e-3, 300.0])
def test_scale_of_fp16_maps(scale):
    student, teacher = make(3, (64,), (32,), dtype=torch.float16)
    for loss in (sp_loss, rkd_loss):
        want = loss(student.double(), teacher.double())
        got = loss((student.detach().float() * scale).half(), teacher)
        torch.testing.assert_close(got.double(), want.detach(), rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("loss", [rkd_loss, sp_loss])
def test_nan_propagates(loss):
    student, teacher = make(4, (5,), (6,))
    with torch.no_grad():
        student[2, 1] = nan
    assert loss(student, teacher).isnan() and loss(teacher, student).isnan()


@pytest.mark.parametrize("loss", [rkd_loss, sp_loss])
def test_only_the_student_learns(loss):
    student, teacher = make(4, (5,), (6,))
    teacher.requires_grad_()
    loss(student, teacher).backward()
    assert teacher.grad is None and student.grad is not None


@pytest.mark.parametrize("loss", [rkd_loss, sp_loss])
def test_gradcheck(loss):
    student, teacher = make(4, (3,), (5,), dtype=torch.float64)
    torch.autograd.gradcheck(lambda x: loss(x, teacher), student)


@pytest.mark.parametrize("loss", [rkd_loss, sp_loss])
def test_fp32_inside_autocast(loss):
    student, teacher = make(4, (16,), (16,))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        got = loss(student, teacher)
    assert got.dtype == torch.float32 and torch.equal(got, loss(student, teacher))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("loss", [rkd_loss, sp_loss])
def test_compile(loss, dynamic):
    torch.use_deterministic_algorithms(False)
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for N in (3, 5) if dynamic else (3,):
        student, teacher = make(N, (4,), (6,))
        got, want = (torch.autograd.grad(f(student, teacher), student)[0] for f in (compiled, loss))
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("loss", [rkd_loss, sp_loss])
def test_no_host_sync(loss):
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert not any(word in str(function) for word in ("_local_scalar_dense", "nonzero", "masked_select"))
            return function(*args, **kwargs or {})

    student, teacher = make(4, (5,), (6,))
    with Watch():
        loss(student, teacher).backward()


@pytest.mark.parametrize("loss", [rkd_loss, sp_loss])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s, t: (s, t[:-1]), r"\[4, 5\] and \[3, 6\]"),
        (lambda s, t: (s[0], t), r"same N, got \[5\]"),
        (lambda s, t: (s.long(), t), "floating point, got torch.int64"),
        (lambda s, t: (s, t.to("meta")), "one device"),
    ],
)
def test_bad_input(loss, change, words):
    with pytest.raises(ValueError, match=words):
        loss(*change(*make(4, (5,), (6,))))


def test_rkd_wants_pooled_features():
    with pytest.raises(ValueError, match=r"pool the features to \[N, D\], got \[4, 5, 2, 2\]"):
        rkd_loss(*make(4, (5, 2, 2), (6,)))
