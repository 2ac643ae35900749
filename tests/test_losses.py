"""The modules that other trainers import."""

import inspect

import pytest
import torch
from capture import Capture

import fastkd.losses
from fastkd.kernels import kd_loss
from fastkd.losses import (
    AttentionTransferLoss,
    BridgeLoss,
    DISTLoss,
    DKDLoss,
    ExplorationLoss,
    FactorTransferLoss,
    HintLoss,
    InheritanceExplorationLoss,
    InheritanceLoss,
    KDLoss,
    MutualLoss,
    OverhaulLoss,
    RKDLoss,
    SPLoss,
    TopKLoss,
    topk_of,
)

LOSSES = [name for name in fastkd.losses.__all__ if name.endswith("Loss")]


def test_kd_loss_is_the_sum_of_its_terms():
    z_s, z_t, y = torch.randn(5, 7), torch.randn(5, 7), torch.arange(5)
    loss = KDLoss(temperature=2.0, ce_weight=0.4, kd_weight=0.6, label_smoothing=0.1)
    want = kd_loss(z_s, z_t, y, temperature=2.0, ce_weight=0.4, kd_weight=0.6, label_smoothing=0.1)
    assert torch.equal(loss(z_s, z_t, y), want.loss)
    torch.testing.assert_close(want.loss, want.ce + want.kd)
    assert list(loss.terms(z_s, z_t, y)) == ["ce", "kd"]


def test_defaults_are_the_contract():
    loss = KDLoss()
    assert (loss.temperature, loss.ce_weight, loss.kd_weight) == (4.0, 0.1, 0.9)
    assert (loss.label_smoothing, loss.standardize) == (0.0, False)


def test_compiles_without_a_break():
    z_s, z_t, y = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7), torch.arange(5)
    eager = KDLoss()(z_s, z_t, y)
    compiled = torch.compile(KDLoss(), fullgraph=True, backend="aot_eager")(z_s, z_t, y)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(torch.autograd.grad(compiled, z_s), torch.autograd.grad(eager, z_s))


def test_under_autocast_it_still_computes_in_fp32():
    z_s, z_t, y = torch.randn(5, 70).bfloat16(), torch.randn(5, 70).bfloat16(), torch.arange(5)
    with torch.autocast("cpu", torch.bfloat16):
        inside = KDLoss()(z_s, z_t, y)
    assert inside.dtype == torch.float32 and torch.equal(inside, KDLoss()(z_s, z_t, y))


@pytest.mark.parametrize(
    "name, value",
    [("temperature", 0), ("temperature", -1), ("ce_weight", -0.1), ("kd_weight", float("nan")), ("label_smoothing", 1)],
)
def test_bad_settings_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        KDLoss(**{name: value})


@pytest.mark.parametrize("name, value", [("temperature", "4"), ("ce_weight", "1"), ("label_smoothing", "0.1")])
def test_a_number_as_text_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .* got '{value}'"):
        KDLoss(**{name: value})


def test_a_loss_shows_its_options():
    assert repr(KDLoss(temperature=2.0)).startswith("KDLoss(temperature=2.0, ce_weight=0.1, kd_weight=0.9, ")
    assert "pair_weights=[[1.0, 0.5], [0.5, 1.0]]" in repr(MutualLoss(pair_weights=[[1, 0.5], [0.5, 1]]))
    for name in LOSSES:
        kind = getattr(fastkd.losses, name)
        options = inspect.signature(kind).parameters.values()
        want = ", ".join(f"{option.name}={option.default!r}" for option in options)
        assert repr(kind()) == f"{name}({want})"


@pytest.mark.parametrize("loss", [getattr(fastkd.losses, name) for name in LOSSES])
def test_help_names_every_argument_of_a_loss(loss):
    _, *arguments = inspect.signature(loss.forward).parameters
    assert all(name in loss.__doc__ for name in arguments)


def logits(count, N=5, C=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(N, C, generator=generator).requires_grad_() for _ in range(count)], torch.arange(N) % C


def kd(a, b, T):
    """KD(a <- b), as METHODS' notation has it, in float64."""
    p_b = (b.detach().double() / T).softmax(1)
    return T * T * (p_b * (p_b.log() - (a.double() / T).log_softmax(1))).sum(1).mean()


def ce(z, y):
    return -z.double().log_softmax(1)[torch.arange(len(y)), y].mean()


def check(loss, terms, want, learners):
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sum(terms.values()), loss)
    expected = torch.autograd.grad(want, learners)
    for sum_of_terms in (loss, sum(terms.values())):
        got = torch.autograd.grad(sum_of_terms, learners, retain_graph=True)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("networks", [2, 3])
def test_mutual_loss_is_dml(networks):
    z, y = logits(networks)
    loss = MutualLoss()
    want = sum(ce(a, y) + sum(kd(a, b, 1) for b in z if b is not a) / (networks - 1) for a in z)
    check(loss([[a] for a in z], y), loss.terms([[a] for a in z], y), want, z)
    assert list(loss.terms([[a] for a in z], y))[:3] == ["ce1", "kl1", "ce2"]


@pytest.mark.parametrize("pair_weights", [None, [[1.0, 0.3, 0.2], [0.5, 1.0, 0.0], [0.1, 0.9, 2.0]]])
def test_mutual_loss_is_dcm(pair_weights):
    z, y = logits(6)
    first, second, loss = z[:3], z[3:], MutualLoss(pair_weights=pair_weights)
    W = pair_weights or [[1.0] * 3] * 3
    want = sum(ce(a, y) for a in z)
    for i in range(3):
        for j in range(3):
            want = want + W[i][j] * kd(first[i], second[j], 1) + W[i][j] * kd(second[i], first[j], 1)
    check(loss([first, second], y), loss.terms([first, second], y), want, z)
    terms = loss.fused([first, second], y).terms
    assert (terms[:, 0] != 0).sum() == 6 and (terms[:, 1:] != 0).sum() == (18 if pair_weights is None else 16)


@pytest.mark.parametrize(
    "heads, words", [(lambda z: z, r"write \[z\]; got \[\[5, 7\], \[5, 7\]\]"), (lambda z: [z], "two networks")]
)
def test_mutual_loss_says_how_heads_are_given(heads, words):
    z, y = logits(2)
    with pytest.raises(ValueError, match=words):
        MutualLoss()(heads(z), y)


@pytest.mark.parametrize(
    "table, words",
    [
        ([1, 1], r"must be numbers \[K, K\] .* got \[1, 1\]"),
        ([[1, "a"], [1, 1]], "must be numbers"),
        ([[1, 1], [1]], r"got 2 rows of \[2, 1\]"),
        ([[1, 1]], r"got 1 rows of \[2\]"),
        ([], "got 0 rows"),
        ([[1, 1], [-0.5, 1]], r"pair_weights\[1\]\[0\] .* got -0.5"),
    ],
)
def test_pair_weights_are_checked_in_the_constructor(table, words):
    with pytest.raises(ValueError, match=words):
        MutualLoss(pair_weights=table)


@pytest.mark.parametrize("K, counts", [(3, [2, 2]), (2, [3, 3]), (3, [2, 1]), (2, [1, 3])])
def test_pair_weights_fit_the_network_with_the_most_heads(K, counts):
    z, y = logits(sum(counts))
    heads, most = [z[: counts[0]], z[counts[0] :]], max(counts)
    with pytest.raises(ValueError, match=rf"is \[{K}, {K}\]; networks with .* heads need \[{most}, {most}\]"):
        MutualLoss(pair_weights=torch.ones(K, K))(heads, y)
    torch.testing.assert_close(MutualLoss(pair_weights=torch.ones(most, most))(heads, y), MutualLoss()(heads, y))


def test_heads_that_are_no_lists_of_tensors():
    (a, b), y = logits(2)
    for heads, words in [
        ([{"logits": a}, {"logits": b}], "got .'dict', 'dict'"),
        ([None, None], "got .'NoneType', 'NoneType'"),
        ([[a.detach().numpy()], [b]], "logits must be a tensor, got ndarray"),
    ]:
        with pytest.raises(TypeError, match=words):
            MutualLoss()(heads, y)


WRONG = [
    (lambda z: z.detach().numpy(), r"must be a tensor, got ndarray; make one with torch.as_tensor\(\)"),
    (lambda z: z.tolist(), r"must be a tensor, got list of 5; .* make one with torch.as_tensor\(\)"),
    (lambda z: {"logits": z}, r"must be a tensor, got dict with the keys \['logits'\]; take the tensor out of it"),
    (lambda z: (z, z), r"must be a tensor, got tuple of 2; take the tensor out of it, as in output\[0\]"),
    (lambda z: None, "must be a tensor, got NoneType$"),
]


@pytest.mark.parametrize("change, words", WRONG)
@pytest.mark.parametrize(
    "loss, places",
    [(KDLoss(), 3), (BridgeLoss(), 4), (DKDLoss(), 3), (DISTLoss(), 2), (HintLoss(), 2), (InheritanceLoss(), 2),
     (RKDLoss(), 2), (SPLoss(), 2)],
)  # fmt: skip
def test_what_is_no_tensor_is_named(loss, places, change, words):
    for place in range(places):
        z, y = logits(3)
        given = [*z[: places - 1], y] if places > 2 else z[:2]
        given[place] = change(given[place])
        if given[-1] is None and isinstance(loss, KDLoss | BridgeLoss):
            continue  # a target may be missing where no term uses it: tests/kernels/test_logit_rows.py
        with pytest.raises(TypeError, match=words):
            loss(*given)


def test_dcm_is_symmetric_and_one_head_is_dml():
    z, y = logits(4)
    torch.testing.assert_close(MutualLoss()([z[:2], z[2:]], y), MutualLoss()([z[2:], z[:2]], y))
    equal = MutualLoss().terms([[z[0], z[0]], [z[0], z[0]]], y)
    assert abs(equal["kl1"]) < 1e-6 and abs(equal["kl2"]) < 1e-6


def test_dcm_is_one_target_for_all_heads_of_a_network():
    """L_1 = (1 + M) sum_i CE(p_i, t) - constants, t = (y + sum_j sg q_j) / (1 + M): the gradients are equal."""
    z, y = logits(6)
    got = torch.autograd.grad(MutualLoss()([z[:3], z[3:]], y), z[:3])
    t = (torch.nn.functional.one_hot(y, 7) + sum(q.detach().softmax(1) for q in z[3:])) / 4
    want = torch.autograd.grad(4 * sum(-(t * p.log_softmax(1)).sum(1).mean() for p in z[:3]), z[:3])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_bridge_loss_is_sokd():
    (s, a, t), y = logits(3)
    weights = {"ce_s": 0.7, "kd_sa": 0.5, "ce_a": 1.1, "kd_at": 0.9, "kd_as": 0.3}
    loss = BridgeLoss(temperature=3.0, **weights)
    parts = {"ce_s": ce(s, y), "kd_sa": kd(s, a, 3), "ce_a": ce(a, y), "kd_at": kd(a, t, 3), "kd_as": kd(a, s, 3)}
    want = sum(weights[name] * part for name, part in parts.items())
    check(loss(s, a, t, y), loss.terms(s, a, t, y), want, [s, a])
    for name, part in parts.items():
        torch.testing.assert_close(loss.terms(s, a, t, y)[name].double(), weights[name] * part, rtol=1e-5, atol=1e-6)
    loss(s, a, t, y).backward()
    assert t.grad is None


def test_sokd_merge():
    """With equal weights KD(A <- T) + KD(A <- S) has the gradient of 2 T^2 KL((p_T + p_S) / 2 || p_A)."""
    (s, a, t), y = logits(3)
    got = torch.autograd.grad(BridgeLoss(ce_s=0, kd_sa=0, ce_a=0)(s, a, t, y), a)[0]
    mean = ((s / 4).softmax(1) + (t / 4).softmax(1)).detach() / 2
    want = torch.autograd.grad(-2 * 16 * (mean * (a / 4).log_softmax(1)).sum(1).mean(), a)[0]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def maps(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).contiguous(memory_format=torch.channels_last).requires_grad_()
            for shape in shapes]  # fmt: skip


def unit(x):
    return torch.nn.functional.normalize(x.double().flatten(1))


@pytest.mark.parametrize("p", [1, 2])
def test_inheritance_and_exploration(p):
    s, t = maps(*[(3, 4, 5, 5)] * 2)
    want = (unit(s) - unit(t.detach())).abs().pow(p).mean() ** (1 / p)
    torch.testing.assert_close(InheritanceLoss(p)(s, t).double(), want)
    torch.testing.assert_close(FactorTransferLoss(p)(s, t).double(), 500 * want)
    assert torch.equal(ExplorationLoss(p)(s, t), -InheritanceLoss(p)(s, t))
    one, other = (torch.autograd.grad(loss(p)(s, t), s)[0] for loss in (InheritanceLoss, ExplorationLoss))
    assert torch.equal(one, -other)
    assert 0 <= InheritanceLoss()(s, t) <= 2 / 100**0.5


@pytest.mark.parametrize("p", [1, 2])
def test_inheritance_and_exploration_at_once(p):
    i, e, t = maps(*[(3, 4, 5, 5)] * 3)
    loss = InheritanceExplorationLoss(p, 30.0, 20.0)
    apart = {"inheritance": 30 * InheritanceLoss(p)(i, t), "exploration": 20 * ExplorationLoss(p)(e, t)}
    torch.testing.assert_close(loss.terms(i, e, t), apart)
    got, wanted = (torch.autograd.grad(x, [i, e]) for x in (loss(i, e, t), sum(apart.values())))
    torch.testing.assert_close(got, wanted)
    only = InheritanceExplorationLoss(p, exploration_weight=0.0).terms(i, None, t)
    torch.testing.assert_close(only, {"inheritance": 50 * InheritanceLoss(p)(i, t)})
    assert InheritanceExplorationLoss(p, 0.0, 0.0)(None, None, t) == 0


def test_attention_and_hint_and_overhaul():
    s, t, u, v = maps((3, 4, 5, 5), (3, 6, 5, 5), (3, 8, 2, 2), (3, 8, 2, 2))
    attention = lambda f: unit(f.square().mean(1))  # noqa: E731
    want = 1000 * sum((attention(a) - attention(b)).square().mean() for a, b in ((s, t), (u, v)))
    torch.testing.assert_close(AttentionTransferLoss()([s, u], [t, v]).double(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(HintLoss()(u, v).double(), 100 * (u - v).double().square().mean())
    margin = torch.full((8,), -0.5)
    wanted = torch.maximum(v, margin[:, None, None])
    partial = ((u - wanted).square() * ((u > wanted) | (wanted > 0))).sum() / 3
    torch.testing.assert_close(OverhaulLoss()(u, v, margin), 1e-3 * partial)
    torch.testing.assert_close(OverhaulLoss()([u, u], [v, v], [margin] * 2), 1e-3 * 1.5 * partial)
    with pytest.raises(ValueError, match=r"\[2, 1\]"):
        AttentionTransferLoss()([s, u], [t])


def test_the_stage_that_does_not_fit_is_named():
    s, t, u, v = maps((3, 4, 5, 5), (3, 4, 5, 5), (3, 8, 2, 2), (3, 8, 3, 3))
    with pytest.raises(ValueError, match=r"stage 2 of 2: maps .*\[3, 8, 2, 2\] and teacher \[3, 8, 3, 3\]"):
        AttentionTransferLoss()([s, u], [t, v])
    margins = [torch.full((C,), -0.5) for C in (4, 8)]
    with pytest.raises(ValueError, match="stage 2 of 2: maps must be of one height and width"):
        OverhaulLoss()([s, u], [t, v], margins)
    with pytest.raises(TypeError, match="stage 1 of 2: student_map must be a tensor"):
        AttentionTransferLoss()([s.tolist(), u], [t, u])


def test_a_hint_of_another_width_needs_a_regressor():
    s, t = maps((3, 4, 5, 5), (3, 8, 5, 5))
    with pytest.raises(ValueError, match=r"put a regressor .* on the student: Conv2d\(4, 8, 1\)"):
        HintLoss()(s, t)


def test_factors_are_named_as_the_arguments_are():
    s, t = maps((3, 4, 5, 5), (3, 8, 5, 5))
    for given in ((s, t), (s.long(), s), (s.to("meta"), s)):
        with pytest.raises(ValueError, match="^student_factor and teacher_factor must be "):
            InheritanceLoss()(*given)


EVERY = {
    "KDLoss": lambda z, f, y: KDLoss()(z[0], z[1], y),
    "MutualLoss": lambda z, f, y: MutualLoss()([z[:2], z[2:]], y),
    "BridgeLoss": lambda z, f, y: BridgeLoss()(*z[:3], y),
    "DKDLoss": lambda z, f, y: DKDLoss()(z[0], z[1], y),
    "DISTLoss": lambda z, f, y: DISTLoss()(z[0], z[1]),
    "InheritanceLoss": lambda z, f, y: InheritanceLoss()(*f),
    "ExplorationLoss": lambda z, f, y: ExplorationLoss(2)(*f),
    "InheritanceExplorationLoss": lambda z, f, y: InheritanceExplorationLoss()(f[0], f[0].flip(0), f[1]),
    "FactorTransferLoss": lambda z, f, y: FactorTransferLoss()(*f),
    "AttentionTransferLoss": lambda z, f, y: AttentionTransferLoss()(*f),
    "HintLoss": lambda z, f, y: HintLoss()(*f),
    "OverhaulLoss": lambda z, f, y: OverhaulLoss()(*f, torch.linspace(-1, -0.1, 4)),
    "RKDLoss": lambda z, f, y: RKDLoss()(f[0].mean((2, 3)), f[1].mean((2, 3))),
    "SPLoss": lambda z, f, y: SPLoss()(*f),
    "TopKLoss": lambda z, f, y: TopKLoss()(z[0], *topk_of(z[1], 2, 4.0)),
}


def test_none_is_forgotten():
    assert sorted(EVERY) == sorted(LOSSES)


@pytest.mark.parametrize("name", EVERY)
def test_every_loss_in_a_captured_graph(name):
    """Replayed on new inputs it gives what it gives eagerly, and it asks the device nothing."""
    (z, y), f = logits(4), maps(*[(5, 4, 3, 3)] * 2)
    with Capture() as graph:
        loss = EVERY[name](z, f, y)
        gradients = torch.autograd.grad(loss * 0.5, [z[0], f[0]], allow_unused=True)
    (new_z, _), new_f = logits(4, seed=1), maps(*[(5, 4, 3, 3)] * 2, seed=1)
    with torch.no_grad():
        for old, new in zip([*z, *f], [*new_z, *new_f], strict=True):
            old.copy_(new)
    graph.replay()
    want = EVERY[name](new_z, new_f, y)
    wanted = torch.autograd.grad(want * 0.5, [new_z[0], new_f[0]], allow_unused=True)
    torch.testing.assert_close(loss, want)
    assert sum(gradient is not None for gradient in gradients) == 1
    for got, expected in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", EVERY)
def test_every_loss_compiles_without_a_break(name):
    (z, y), f = logits(4), maps(*[(5, 4, 3, 3)] * 2)
    compiled = torch.compile(EVERY[name], fullgraph=True, backend="aot_eager")(z, f, y)
    want = EVERY[name](z, f, y)
    torch.testing.assert_close(compiled, want)
    inputs = [z[0], f[0]]
    got, wanted = (torch.autograd.grad(loss, inputs, allow_unused=True) for loss in (compiled, want))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", EVERY)
def test_the_teacher_gets_no_gradient(name):
    (z, y), f = logits(4), maps(*[(5, 4, 3, 3)] * 2)
    teachers = {"MutualLoss": [], "BridgeLoss": [z[2]]}.get(name, [z[1], f[1]])
    EVERY[name](z, f, y).backward()
    assert all(teacher.grad is None for teacher in teachers)
    assert any(student.grad is not None for student in (z[0], f[0]))


@pytest.mark.parametrize("name", sorted(set(EVERY) - {"MutualLoss", "BridgeLoss"}))  # of which several learn
def test_no_graph_of_the_teacher_is_kept(name):
    """With a student that does not learn there is nothing to go back through."""
    (z, y), f = logits(4), maps(*[(5, 4, 3, 3)] * 2)
    loss = EVERY[name]([z[0].detach(), *(head * 2 for head in z[1:])], [f[0].detach(), *(x * 2 for x in f[1:])], y)
    assert not loss.requires_grad


@pytest.mark.parametrize("name", EVERY)
def test_a_teacher_from_inference_mode(name):
    (z, y), f = logits(4), maps(*[(5, 4, 3, 3)] * 2)
    learning = {"MutualLoss": 1, "BridgeLoss": 2}.get(name, 1)
    with torch.inference_mode():
        late_z, late_f = [x + 0 for x in z[learning:]], [x + 0 for x in f[1:]]
    loss = EVERY[name]([*z[:learning], *late_z], [f[0], *late_f], y)
    want = EVERY[name]([*z[:learning], *(x.detach() for x in z[learning:])], [f[0], *(x.detach() for x in f[1:])], y)
    assert torch.equal(loss, want)
    inputs = [z[0], f[0]]
    got, wanted = (torch.autograd.grad(2 * x, inputs, allow_unused=True) for x in (loss, want))
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("name", EVERY)
def test_options_may_change_between_calls(name):
    """As in a schedule: what is printed is what counts, and what could not be given at first cannot be given later."""
    kind = getattr(fastkd.losses, name)
    changed = {"p": 2, "pair_weights": [[2.0]], "ignore_index": 1, "standardize": True, "label_smoothing": 0.1,
               "reduction": "sum", "class_weights": torch.linspace(0, 2, 7), "mask_kd": True}  # fmt: skip
    (z, y), f = logits(4), maps(*[(5, 4, 3, 3)] * 2)
    for option, default in ((o.name, o.default) for o in inspect.signature(kind).parameters.values()):
        value = changed[option] if option in changed else 1.5 * default
        others = {"ignore_index": 1} if option == "mask_kd" else {}  # it needs that one
        loss, reinit = kind(**others), kind(**others, **{option: value})
        setattr(loss, option, value)
        assert repr(loss) == repr(reinit)
        assert torch.equal(called(loss, z, f, y), called(reinit, z, f, y))
        assert not torch.equal(called(loss, z, f, y), called(kind(**others), z, f, y)), option
        if option != "standardize":
            with pytest.raises(ValueError, match=option):
                setattr(loss, option, "much")


def called(loss, z, f, y):
    if isinstance(loss, MutualLoss):
        return loss([[z[0]], [z[1]]], y)
    if isinstance(loss, BridgeLoss):
        return loss(*z[:3], y)
    if isinstance(loss, InheritanceExplorationLoss):
        return loss(f[0], 2 - f[0], f[1])
    if isinstance(loss, OverhaulLoss):
        return loss(*f, -torch.ones(4))
    if isinstance(loss, RKDLoss):
        return loss(f[0].mean((2, 3)), f[1].mean((2, 3)))
    if isinstance(loss, KDLoss | DKDLoss):
        return loss(*z[:2], y)
    if isinstance(loss, TopKLoss):
        return loss(z[0], *topk_of(z[1], 2, 4.0))
    return loss(*z[:2]) if isinstance(loss, DISTLoss) else loss(*f)


@pytest.mark.parametrize("value", ["a", 255.0, True])
def test_an_ignored_label_is_a_whole_number(value):
    with pytest.raises(ValueError, match=f"ignore_index must be the label .* got {value!r}"):
        KDLoss(ignore_index=value)
