"""The companions against their formulas, in float64: AT, FitNet, OFD, DKD, DIST, RKD, SP."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from fastkd import create_model
from fastkd.errors import UserError
from fastkd.methods import CE, METHODS, RunContext, find_method
from fastkd.models.nets.shufflenet import shuffle

NAMES = ["at", "fitnet", "ofd", "dkd", "dist", "rkd", "sp"]
OPTIONS = [
    (name, option)
    for name in NAMES
    for option in vars(METHODS[name].Options())
    if option not in ("stage", "features", "standardize")
]


def network(name, seed, classes=4):
    """With BatchNorm that is not the identity."""
    torch.manual_seed(seed)
    net = create_model(name, classes).double()
    for norm in (module for module in net.modules() if isinstance(module, torch.nn.BatchNorm2d)):
        torch.nn.init.normal_(norm.weight, 1, 0.3)
        torch.nn.init.normal_(norm.bias, 0, 0.5)
        norm.running_mean.normal_(0, 0.2)
        norm.running_var.uniform_(0.5, 1.5)
    return net


@pytest.fixture
def nets():
    return network("resnet8", 0), network("resnet14", 1).eval()


@pytest.fixture
def batch():
    torch.manual_seed(2)
    return torch.randn(5, 3, 16, 16, dtype=torch.float64), torch.arange(5) % 4


def maps(net, images):
    """What a CIFAR ResNet gives after and before the last ReLU of each stage, written out."""
    x, after, before = net.bn1(net.conv1(images)).relu(), [], []
    for stage in (net.layer1, net.layer2, net.layer3):
        for block in stage:
            side = x if block.downsample is None else block.downsample(x)
            y = block.bn2(block.conv2(block.bn1(block.conv1(x)).relu())) + side
            x = y.relu()
        after.append(x)
        before.append(y)
    return after, before


def through(conv_and_norm, x):
    """1x1 convolution and BatchNorm with the batch's statistics, by hand."""
    conv, norm, *_ = conv_and_norm
    y = torch.einsum("nchw,dc->ndhw", x, conv.weight[:, :, 0, 0])
    mean, var = y.mean((0, 2, 3), keepdim=True), y.var((0, 2, 3), unbiased=False, keepdim=True)
    return (y - mean) / (var + norm.eps).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]


def made(name, nets, **options):
    method = METHODS[name](*nets, METHODS[name].Options(**options)).double().train()
    for module in method.children():
        if module is not method.student:
            for norm in (m for m in module.modules() if isinstance(m, torch.nn.BatchNorm2d)):
                torch.nn.init.normal_(norm.weight, 1, 0.3)
    return method


def check_terms(method, batch, name, want):
    terms = method(*batch)
    assert list(terms) == ["ce", name]
    ce = F.cross_entropy(method.student(batch[0]), batch[1])
    torch.testing.assert_close(terms["ce"], method.options.ce_weight * ce)
    torch.testing.assert_close(terms[name], want)
    assert want > 1e-6


def test_at(nets, batch):
    want = 0
    for s, t in zip(maps(nets[0], batch[0])[0], maps(nets[1], batch[0])[0], strict=True):
        (a_s, a_t) = (f.pow(2).mean(1).flatten(1) for f in (s, t))
        (a_s, a_t) = (a / a.pow(2).sum(1, keepdim=True).sqrt() for a in (a_s, a_t))
        want = want + (a_s - a_t).pow(2).sum() / a_s.numel()
    check_terms(made("at", nets), batch, "at", 1000 * want)
    check_terms(made("at", nets, ce_weight=0.5, attention_weight=3.0), batch, "at", 3 * want)


def test_at_pools_the_larger_map(nets, batch):
    teacher = network("shufflenet_v1", 1).eval()
    theirs, x = [], teacher.relu(teacher.bn1(teacher.conv1(batch[0])))
    for stage in (teacher.layer1, teacher.layer2, teacher.layer3):
        x = stage(x)
        theirs.append(x)
    want = 0
    for s, t in zip(maps(nets[0], batch[0])[0], theirs, strict=True):
        assert s.shape[2] == 2 * t.shape[2]
        s = s.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).mean((3, 5))
        (a_s, a_t) = (f.pow(2).mean(1).flatten(1) for f in (s, t))
        (a_s, a_t) = (a / a.pow(2).sum(1, keepdim=True).sqrt() for a in (a_s, a_t))
        want = want + (a_s - a_t).pow(2).sum() / a_s.numel()
    check_terms(made("at", (nets[0], teacher)), batch, "at", 1000 * want)
    smaller = METHODS["at"](
        network("shufflenet_v1", 2), network("resnet8", 0)
    ).double()  # here the teacher's maps are pooled
    assert smaller(*batch)["at"] > 0


@pytest.mark.parametrize("stage, index", [(0, 1), (1, 0), (2, 1), (3, 2)])
def test_fitnet(nets, batch, stage, index):
    method = made("fitnet", nets, stage=stage, hint_weight=2.0)
    ours, theirs = (maps(net, batch[0])[0][index] for net in nets)
    check_terms(method, batch, "hint", 2 * (through(method.regressor, ours).relu() - theirs).pow(2).mean())
    assert METHODS["fitnet"].Options().hint_weight == 100


def test_ofd(nets, batch):
    method = made("ofd", nets, overhaul_weight=0.01)
    want = 0
    norms = [stage[-1].bn2 for stage in (nets[1].layer1, nets[1].layer2, nets[1].layer3)]
    for number, (s, t) in enumerate(zip(maps(nets[0], batch[0])[1], maps(nets[1], batch[0])[1], strict=True)):
        t = torch.maximum(
            t, torch.tensor([margin(*pair) for pair in parameters(norms[number])]).double()[:, None, None]
        )
        s = through(method.connectors[number], s)
        want = want + 0.5 ** (2 - number) * ((s > t) | (t > 0)).mul((s - t).pow(2)).sum() / len(s)
    check_terms(method, batch, "ofd", 0.01 * want)
    assert METHODS["ofd"].Options().overhaul_weight == 1e-3


def parameters(norm):
    return zip(norm.weight.abs().tolist(), norm.bias.tolist(), strict=True)


def margin(std, mean):
    """E[x | x < 0] of a normal x, by summing over its density."""
    if 0.5 * math.erfc(mean / std / math.sqrt(2)) <= 0.001:
        return -3 * std
    x = torch.linspace(-12 * std + min(mean, 0), 0, 200_001, dtype=torch.float64)
    density = (-((x - mean) / std).square() / 2).exp()
    return (torch.trapezoid(x * density, x) / torch.trapezoid(density, x)).item()


def test_dkd(nets, batch):
    alpha, beta, T = 0.5, 3.0, 2.0
    (z_s, z_t), tckd, nckd = (net(batch[0]) / T for net in nets), 0, 0
    for s, t, y in zip(z_s, z_t, batch[1].tolist(), strict=True):
        p_s, p_t = s.softmax(0), t.softmax(0)
        for ours, theirs in ((p_s[y], p_t[y]), (1 - p_s[y], 1 - p_t[y])):
            tckd = tckd + theirs * (theirs / ours).log()
        rest = [c for c in range(4) if c != y]
        q_s, q_t = s[rest].softmax(0), t[rest].softmax(0)
        nckd = nckd + (q_t * (q_t / q_s).log()).sum()
    want = T**2 * (alpha * tckd + beta * nckd) / 5
    check_terms(made("dkd", nets, alpha=alpha, beta=beta, temperature=T), batch, "dkd", want)
    defaults = METHODS["dkd"].Options()
    assert (defaults.alpha, defaults.beta, defaults.temperature, defaults.ce_weight) == (1, 8, 4, 1)


def test_dkd_with_logit_standardisation(nets, batch):
    """Z-scores as in the code of arXiv:2403.01427: the unbiased deviation, plus 1e-7."""
    z_s, z_t = (
        (z - z.mean(1, keepdim=True)) / (z.std(1, keepdim=True) + 1e-7) for z in (net(batch[0]) for net in nets)
    )
    p_s, p_t = ((z / 2).softmax(1) for z in (z_s, z_t))
    want = 0
    for s, t, y in zip(p_s, p_t, batch[1].tolist(), strict=True):
        rest = [c for c in range(4) if c != y]
        for ours, theirs in ((s[y], t[y]), (1 - s[y], 1 - t[y])):
            want = want + theirs * (theirs / ours).log()
        q_s, q_t = s[rest] / s[rest].sum(), t[rest] / t[rest].sum()
        want = want + 8 * (q_t * (q_t / q_s).log()).sum()
    check_terms(made("dkd", nets, temperature=2.0, standardize=True), batch, "dkd", 4 * want / 5)


@pytest.mark.parametrize(
    ("ramp", "epochs", "factors"),
    [
        (20, 240, {0: 1 / 20, 0.9: 1 / 20, 1: 2 / 20, 18.5: 19 / 20, 19: 1, 100: 1}),
        (0, 240, {0: 1, 5: 1}),
        (20, 12, {0: 1 / 6, 4.5: 5 / 6, 5: 1}),  # half of a short run
    ],
)
def test_the_ramp_of_dkd(nets, batch, ramp, epochs, factors):
    """mdistiller: min(epoch / 20, 1) with epochs counted from 1."""
    logged: list[str] = []
    method = made("dkd", nets, ramp_epochs=float(ramp))
    whole = method(*batch)
    method.prepare(None, RunContext(epochs=epochs, log=logged.append))
    for epoch, factor in factors.items():
        method.at_epoch(epoch)
        terms = method(*batch)
        torch.testing.assert_close(terms["dkd"], whole["dkd"] * factor, rtol=1e-6, atol=0)
        torch.testing.assert_close(terms["ce"], whole["ce"], rtol=0, atol=0)
    assert ("--ramp-epochs 20 is more than half of --epochs 12" in " ".join(logged)) == (epochs == 12)


def test_the_ramp_reaches_dkd_in_a_sum(nets, batch):
    method = find_method("kd+dkd")(*nets).double()
    full = method(*batch)["dkd"]
    method.prepare(TinyPosition(), RunContext(epochs=100))
    method.at_epoch(4)
    torch.testing.assert_close(method(*batch)["dkd"], full / 4, rtol=1e-6, atol=0)


class TinyPosition:
    """The part of a loader that the preparation of a sum uses."""

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def test_dkd_takes_the_heaviest_class_of_soft_labels(nets, batch):
    soft = 0.6 * F.one_hot(batch[1], 4).double() + 0.1
    method = made("dkd", nets)
    torch.testing.assert_close(method(batch[0], soft)["dkd"], method(*batch)["dkd"])
    torch.testing.assert_close(method(batch[0], soft)["ce"], F.cross_entropy(method.student(batch[0]), soft))


def test_dist(nets, batch):
    beta, gamma, T = 0.5, 3.0, 2.0
    p_s, p_t = ((net(batch[0]) / T).softmax(1) for net in nets)
    rows = sum(1 - torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(p_s, p_t, strict=True)) / 5
    columns = sum(1 - torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(p_s.T, p_t.T, strict=True)) / 4
    method = made("dist", nets, beta=beta, gamma=gamma, temperature=T)
    terms = method(*batch)
    torch.testing.assert_close(terms["dist"], T**2 * (beta * rows + gamma * columns), rtol=1e-4, atol=1e-6)  # its eps
    defaults = METHODS["dist"].Options()
    assert (defaults.beta, defaults.gamma, defaults.temperature, defaults.ce_weight) == (2, 2, 4, 1)


def test_rkd(nets, batch):
    pooled = [maps(net, batch[0])[0][-1].mean((2, 3)) for net in nets]
    places = range(5)
    d_s, d_t = (torch.stack([torch.stack([(f[i] - f[j]).norm() for j in places]) for i in places]) for f in pooled)
    d_s, d_t = (d / (d.sum() / 20) for d in (d_s, d_t))
    distance = sum(huber(d_s[i, j] - d_t[i, j]) for i in places for j in places) / 25
    angle = sum(huber(cosine(pooled[0], *ijk) - cosine(pooled[1], *ijk)) for ijk in triples(places)) / 125
    check_terms(made("rkd", nets), batch, "rkd", 25 * distance + 50 * angle)
    check_terms(made("rkd", nets, distance_weight=2.0, angle_weight=0.0), batch, "rkd", 2 * distance)


def triples(places):
    return ((i, j, k) for i in places for j in places for k in places)


def huber(error):
    return 0.5 * error**2 if abs(error) < 1 else abs(error) - 0.5


def cosine(f, i, j, k):
    if j in (i, k):
        return f.new_zeros(())
    return (f[i] - f[j]) @ (f[k] - f[j]) / (f[i] - f[j]).norm() / (f[k] - f[j]).norm()


@pytest.mark.parametrize("features", ["embedding", "maps"])
def test_sp(nets, batch, features):
    whole = [maps(net, batch[0])[0][-1] for net in nets]
    rows = [f.flatten(1) if features == "maps" else f.mean((2, 3)) for f in whole]
    grams = [f @ f.T for f in rows]
    g_s, g_t = (g / g.pow(2).sum(1, keepdim=True).sqrt() for g in grams)
    check_terms(made("sp", nets, features=features), batch, "sp", 3000 * (g_s - g_t).pow(2).sum() / 25)


def test_sp_says_what_its_features_can_be():
    with pytest.raises(UserError, match="--features must be embedding or maps, got 'map'"):
        METHODS["sp"].Options(features="map")
    assert METHODS["sp"].Options().features == "embedding"


@pytest.mark.parametrize("name", NAMES)
def test_gradients_go_to_the_student_and_to_own_modules(name, nets, batch):
    plain = set(nets[0].state_dict())
    method = made(name, nets)
    before = copy.deepcopy(nets[1].state_dict())
    sum(method(*batch).values()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in method.parameters())
    assert all(p.grad is None for p in nets[1].parameters()) and not nets[1].training
    assert all(torch.equal(before[key], value) for key, value in nets[1].state_dict().items())
    assert set(method.networks()) == {"student"} and set(method.networks()["student"].state_dict()) == plain
    own = {key.split(".")[0] for key in method.state_dict()}
    assert own == {"student"} | {"fitnet": {"regressor"}, "ofd": {"connectors"}}.get(name, set())


@pytest.mark.parametrize("name", NAMES)
def test_the_companions_term_reaches_the_student(name, nets, batch):
    method = made(name, nets, ce_weight=0.0)
    sum(method(*batch).values()).backward()
    assert nets[0].conv1.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", NAMES)
def test_without_its_term_it_is_plain_training(name, nets, batch):
    others = {option: 0.0 for kind, option in OPTIONS if kind == name and option not in ("ce_weight", "temperature")}
    alone = copy.deepcopy(nets[0])
    sum(made(name, nets, **others)(*batch).values()).backward()
    sum(CE(alone)(*batch).values()).backward()
    for mine, plain in zip(nets[0].parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, plain.grad, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_beside_kd_each_network_runs_once(name, nets, batch):
    method = find_method(f"kd+{name}")(*nets).double().train()
    calls = []
    for net in nets:
        net.conv1.register_forward_hook(lambda *_: calls.append(1))
    terms = method(*batch)
    assert len(calls) == 2 and len(terms) == 3 and list(terms)[:2] == ["ce", "kd"]


@pytest.mark.parametrize("name", NAMES)
def test_under_autocast(name, batch):
    method = METHODS[name](network("wrn_10_1", 0).float(), network("wrn_10_2", 1).float()).train()
    with torch.autocast("cpu", torch.bfloat16):
        terms = method(batch[0].float(), batch[1])
    assert all(term.dtype == torch.float32 and term.isfinite() for term in terms.values())


@pytest.mark.parametrize("name, option", OPTIONS)
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_bad_values_are_named(name, option, value):
    with pytest.raises(UserError, match=f"--{option.replace('_', '-')} must be .*, got {value}"):
        METHODS[name].Options(**{option: value})


@pytest.mark.parametrize("name", NAMES)
def test_something_must_be_learnt(name):
    with pytest.raises(UserError, match="--ce-weight, --.* are all 0: nothing is learnt"):
        METHODS[name].Options(**{option: 0.0 for kind, option in OPTIONS if kind == name and option != "temperature"})


@pytest.mark.parametrize("name", ["dkd", "dist"])
def test_temperature_is_above_0(name):
    with pytest.raises(UserError, match="--temperature must be a number above 0, got 0"):
        METHODS[name].Options(temperature=0.0)


@pytest.mark.parametrize("teacher", ["mobilenetv2", "vgg8"])
def test_stages_that_do_not_match_are_shown(teacher):
    name = type(create_model(teacher, 4)).__name__
    with pytest.raises(UserError, match=f"student CifarResNet are 16x64x64, 32x32x32, 64x16x16.*{name}.*use networks"):
        METHODS["at"](create_model("resnet8", 4), create_model(teacher, 4))
    with pytest.raises(UserError, match=f"the student CifarResNet has 3 and the teacher {name} 4"):
        METHODS["ofd"](create_model("resnet8", 4), create_model(teacher, 4))


@pytest.mark.parametrize("student, teacher", [("resnet8", "shufflenet_v1"), ("shufflenet_v1", "resnet8")])
def test_ofd_and_fitnet_bring_maps_of_unequal_size_together(student, teacher, batch):
    nets = network(student, 0), network(teacher, 1).eval()
    assert METHODS["ofd"](*nets).double()(*batch)["ofd"] > 0
    method = METHODS["fitnet"](*nets).double()
    wanted = 2 if student == "resnet8" else 4  # the kernel of RepDistiller's: stride 2, or transposed
    assert method.regressor[0].stride == (2, 2) and method.regressor[0].kernel_size == (wanted + wanted % 4 // 2,) * 2
    assert method(*batch)["hint"] > 0


def test_ofd_pools_as_by_hand(batch):
    """The teacher's maps are twice as high and wide."""
    nets = network("shufflenet_v1", 0), network("resnet8", 1).eval()
    method = made("ofd", nets, overhaul_weight=0.01)
    norms = [stage[-1].bn2 for stage in (nets[1].layer1, nets[1].layer2, nets[1].layer3)]
    mine, want = [], 0
    x = nets[0].relu(nets[0].bn1(nets[0].conv1(batch[0])))
    for stage in (nets[0].layer1, nets[0].layer2, nets[0].layer3):
        *first, last = stage
        for block in first:
            x = block(x)
        middle = shuffle(last.bn1(last.conv1(x)).relu(), 3)
        before = last.bn3(last.conv3(last.bn2(last.conv2(middle)).relu())) + x
        mine.append(before)
        x = before.relu()
    for number, (s, t) in enumerate(zip(mine, maps(nets[1], batch[0])[1], strict=True)):
        t = t.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).mean((3, 5))
        limits = torch.tensor([margin(*pair) for pair in parameters(norms[number])]).double()
        t, s = torch.maximum(t, limits[:, None, None]), through(method.connectors[number], s)
        want = want + 0.5 ** (2 - number) * ((s > t) | (t > 0)).mul((s - t).pow(2)).sum() / len(s)
    check_terms(method, batch, "ofd", 0.01 * want)


def test_a_map_that_no_regressor_reaches():
    with pytest.raises(UserError, match="student's map of 16 x 16 to the teacher's 64 x 64: .* another --stage"):
        METHODS["fitnet"](
            create_model("timm/resnet10t", 4), create_model("resnet8", 4), METHODS["fitnet"].Options(stage=1)
        )


def test_relations_need_no_matching_stages(batch):
    for name in ("rkd", "sp"):
        method = METHODS[name](network("resnet8", 0), network("mobilenetv2", 1)).double()
        assert method(*batch)[name] > 0


def test_fitnets_stage_must_be_there(nets):
    with pytest.raises(UserError, match="--stage counts from 1 .*, got -1"):
        METHODS["fitnet"].Options(stage=-1)
    with pytest.raises(UserError, match="--stage 4: the student has 3 stages, the teacher 3"):
        made("fitnet", nets, stage=4)


def test_ofd_needs_maps_before_the_activation():
    with pytest.raises(UserError, match="ResNetV2 has no maps before the activation"):
        METHODS["ofd"](create_model("timm/resnetv2_18", 4), create_model("timm/resnetv2_18", 4))
    with pytest.raises(UserError, match="CifarShuffleNetV2 has none: it can be the student alone"):
        METHODS["ofd"](create_model("shufflenet_v2", 4), create_model("shufflenet_v2", 4))


@pytest.mark.parametrize("name", NAMES)
def test_a_teacher_is_needed(name, nets):
    with pytest.raises(UserError, match="needs a teacher"):
        METHODS[name](nets[0], None)


def test_maps_before_and_after_the_activation_are_not_summed(nets):
    for other in ("at", "iakd"):
        for name in (f"ofd+{other}", f"{other}+ofd"):
            with pytest.raises(UserError, match=f"ofd looks at maps of CifarResNet before .*, {other} at those after"):
                find_method(name)(*nets)
    find_method("at+fitnet+iakd")(*nets)
