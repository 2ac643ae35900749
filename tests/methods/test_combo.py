"""Sums of methods: weights, one forward pass, one teacher, options by prefix, a part's own path through the student."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml

from fastkd import create_model
from fastkd.config import parse
from fastkd.engine import Step, TrainOptions
from fastkd.errors import UserError
from fastkd.methods import DML, KD, METHODS, Method, RunContext, find_method
from fastkd.methods.dml import DMLOptions
from fastkd.methods.kd import KDOptions
from fastkd.models import staged

CPU = torch.device("cpu")


def batch(dtype=torch.float64, side=8):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 3, side, side, generator=generator, dtype=dtype), torch.arange(6) % 4


class Probe(Method):
    """Last map of the student near that of the teacher; no cross-entropy of its own. For the tests."""

    ce_option = None

    def __init__(self, student, teacher, options=None, peers=()):
        super().__init__(student, teacher, options, peers)
        self.request_features(self.student)
        self.request_features(self.teacher)
        self.extra = torch.nn.Conv2d(64, 64, 1)

    def losses(self, out, target, plan):
        mine, theirs = self.extra(out.features(self.student)[-1]), out.features(self.teacher)[-1]
        return {"probe": F.mse_loss(mine, theirs)}

    def param_groups(self, lr):
        return [
            {"params": list(self.student.parameters()), "lr": lr},
            {"params": list(self.extra.parameters()), "lr": 0.5},
        ]


class Skip(Method):
    """A path of its own: without the second stage's last block when the plan says so. For the tests."""

    needs_teacher = False
    find_unused_parameters = True

    class View:
        def __init__(self, net, without):
            self.view, self.without = staged(net), without

        def features(self, images):
            x, maps = self.view.stem(images), []
            for number, stage in enumerate(self.view.stages):
                for block in list(stage)[: 1 if self.without and number == 1 else None]:
                    x = block(x)
                maps.append(x)
            return self.view.head(x), maps

    def plan(self, step):
        return step % 2 == 1

    def staged_views_for(self, plan):
        return self.staged_views | {self.student: self.View(self.student, plan)}

    def losses(self, out, target, plan):
        return {"ce": F.cross_entropy(out(self.student), target)}

    def selection_rates(self, steps):
        return {"skip_share": sum(step % 2 for step in steps) / len(steps)}


@pytest.fixture
def more_methods(monkeypatch):
    monkeypatch.setitem(METHODS, "probe", Probe)
    monkeypatch.setitem(METHODS, "skip", Skip)


def options_of(name, **values):
    return find_method(name).Options(**values)


def test_terms_are_the_weighted_parts_and_ce_is_counted_once(tiny_net):
    nets = [tiny_net(seed).double() for seed in range(3)]
    kind = find_method("kd+dml")
    options = kind.Options(kd_temperature=3.0, kd_weight=0.5, dml_kl_weight=0.7, dml_weight=2.0)
    terms = kind(nets[0], nets[1], options, [nets[2]])(*batch())
    kd = KD(nets[0], nets[1], KDOptions(temperature=3.0))(*batch())
    dml = DML(nets[0], None, DMLOptions(kl_weight=0.7), [nets[2]])(*batch())
    wanted = {name: 0.5 * value for name, value in kd.items()}
    wanted |= {name: 2.0 * value for name, value in dml.items() if name != "ce"}
    assert terms.keys() == wanted.keys()
    torch.testing.assert_close(terms, wanted)
    reverse = find_method("dml+kd")
    terms = reverse(nets[0], nets[1], reverse.Options(dml_weight=2.0), [nets[2]])(*batch())
    torch.testing.assert_close(terms["ce"], 2.0 * dml["ce"])


def test_a_first_part_without_labels_leaves_the_ce_to_the_next(more_methods):
    student, teacher = create_model("resnet8", 4), create_model("resnet14", 4)
    terms = find_method("probe+kd")(student, teacher)(*batch(torch.float32, 16))
    assert list(terms) == ["probe", "ce", "kd"]


@pytest.mark.parametrize("name", ["ce+sokd", "sokd+dkd", "kd+dcm", "dcm+at", "dml+iedml", "dml+dcm"])
def test_the_labels_teach_each_network_once(name):
    """Through its own logits; a bridge and hidden heads learn from them apart."""
    kind = find_method(name)
    student, peer = create_model("resnet8", 4), create_model("resnet8", 4)
    needed = [create_model("resnet14", 4) if kind.needs_teacher else None, None, [peer] if kind.needs_peers else []]
    method, (images, target) = kind(student, *needed).train(), batch(torch.float32, 32)
    terms = method(images, target, method.plan(0))
    own = [key for key in terms if "ce" in key.split("_") and not {"a", "heads"} & set(key.split("_"))]
    assert own == (["ce", "ce_peer1"] if kind.needs_peers else ["ce"])
    scale = 0.1 if name == "kd+dcm" else 1.0
    torch.testing.assert_close(terms["ce"], scale * F.cross_entropy(student(images), target))
    if kind.needs_peers:
        torch.testing.assert_close(terms["ce_peer1"], F.cross_entropy(peer(images), target))


def test_the_weight_of_a_cross_entropy_that_is_not_counted_is_refused():
    for name, option in (("kd+at", "at_ce_weight"), ("dkd+sokd", "sokd_ce_s"), ("dcm+kd", "kd_ce_weight")):
        with pytest.raises(UserError, match=f"--{option.replace('_', '-')} has no effect"):
            options_of(name, **{option: 0.7})
        options_of("+".join(reversed(name.split("+"))), **{option: 0.7})
    options_of("kd+dcm", dcm_ce_weight=0.7)  # weighs hidden heads and peers


def test_terms_of_equal_names_are_kept_apart(more_methods, monkeypatch):
    class Other(Probe):
        """The same again."""

    monkeypatch.setitem(METHODS, "other", Other)
    terms = find_method("probe+other")(create_model("resnet8", 4), create_model("resnet14", 4))(
        *batch(torch.float32, 16)
    )
    assert list(terms) == ["probe", "other_probe"]


def test_one_teacher_and_one_forward_of_each_network(more_methods):
    student, teacher, peer = (create_model(name, 4) for name in ("resnet8", "resnet14", "resnet8"))
    calls = []
    for name, net in (("student", student), ("teacher", teacher), ("peer", peer)):
        net.conv1.register_forward_hook(lambda *_, name=name: calls.append(name))
    method = find_method("kd+probe+dml")(student, teacher, None, [peer]).train()
    sum(method(*batch(torch.float32, 16)).values()).backward()
    assert sorted(calls) == ["peer", "student", "teacher"]
    assert method.parts["kd"].teacher is method.parts["probe"].teacher is method.teacher
    assert not teacher.training and all(p.grad is None for p in teacher.parameters())


def test_groups_hold_each_weight_once_at_its_own_rate(more_methods):
    method = find_method("kd+probe+dml")(
        create_model("resnet8", 4), create_model("resnet14", 4), None, [create_model("resnet8", 4)]
    )
    groups = method.param_groups(0.1)
    weights = [p for group in groups for p in group["params"]]
    assert len(weights) == len({id(p) for p in weights})
    assert {id(p) for p in weights} == {id(p) for p in method.parameters() if p.requires_grad}
    (extra,) = [group for group in groups if group["lr"] == 0.5]
    assert {id(p) for p in extra["params"]} == {id(p) for p in method.parts["probe"].extra.parameters()}
    Step(method, TrainOptions(), CPU)  # torch refuses a weight that is in two groups
    assert list(method.networks()) == ["student", "peer1"]


@pytest.mark.parametrize("name", ["probe+skip+kd", "kd+skip+probe"])
def test_a_part_may_lead_all_others_along_its_path(more_methods, name):
    student, teacher = create_model("resnet14", 4), create_model("resnet14", 4)
    first = {"kd_ce_weight": 1.0} if name.startswith("kd") else {}
    method = find_method(name)(student, teacher, find_method(name).Options(**first)).train()
    assert (
        method.find_unused_parameters
        and method.plan(1) == (None, True, None)
        and method.selection_rates(range(4)) == {"skip_share": 0.5}
    )
    images, target = batch(torch.float32, 16)
    for plan, path in ((method.plan(0), False), (method.plan(1), True)):
        logits, maps = Skip.View(student, path).features(images)
        terms = method(images, target, plan)
        torch.testing.assert_close(terms["ce"], F.cross_entropy(logits, target))
        want = F.mse_loss(method.parts["probe"].extra(maps[-1]), staged(teacher).features(images)[1][-1])
        torch.testing.assert_close(terms["probe"], want)
    step = Step(method, TrainOptions(lr=0.1, weight_decay=0.1), CPU)
    left_out = [p.clone() for p in staged(student).stages[1][1].parameters()]
    step(images, target, method.plan(1))
    for before, after in zip(left_out, staged(student).stages[1][1].parameters(), strict=True):
        assert torch.equal(before, after)


def test_every_part_prepares_on_the_same_batches(monkeypatch, tiny_net, tiny_loaders):
    seen = {}

    def prepares(name):
        class Part(Method):
            """Notes what it is given."""

            needs_teacher = False

            def prepare(self, loader, run):
                seen[name] = (next(iter(loader))[0], run.seed, torch.rand(3))

        return Part

    for name in ("one", "two"):
        monkeypatch.setitem(METHODS, name, prepares(name))
    loader, _ = tiny_loaders()
    find_method("one+two")(tiny_net()).prepare(loader, RunContext(seed=4))
    assert torch.equal(seen["one"][0], seen["two"][0]) and seen["one"][1] == seen["two"][1] == 4
    assert torch.equal(seen["one"][2], seen["two"][2])  # so that a file found in the folder changes nothing for others
    assert loader.state_dict() == {"epoch": 0}


def test_bad_sums(tiny_net):
    for name, words in {
        "kd+kd": "kd.kd: give each method once",
        "kd+kdd": "unknown method 'kdd'",
        "kd+": "both sides of each",
    }.items():
        with pytest.raises(UserError, match=words):
            find_method(name)
    for value in (0.0, -1.0, float("nan")):
        with pytest.raises(UserError, match=f"--dml-weight must be a number above 0, got {value}"):
            options_of("kd+dml", dml_weight=value)
    with pytest.raises(UserError, match=r"kd .*--kd-.*temperature.*-1"):
        options_of("kd+dml", kd_temperature=-1.0)
    with pytest.raises(UserError, match="--dml-alternate"):
        find_method("kd+dml")(tiny_net(), tiny_net(), options_of("kd+dml", dml_alternate=True), [tiny_net()])
    with pytest.raises(UserError, match="kd.dml needs a teacher"):
        find_method("kd+dml")(tiny_net(), None, None, [tiny_net()])


def test_options_by_prefix_from_the_command_line_and_from_a_file(fastkd):
    Path("mine.yaml").write_text("method: kd+dml\nkd-temperature: 2\ndml_weight: 0.5\nkd_standardize: true\n")
    status, out, err = fastkd("train", "--config", "mine.yaml", "--dml-weight", "0.25", "--print-config")
    shown = yaml.safe_load(out)
    assert status == 0, err
    assert (shown["kd_temperature"], shown["dml_weight"], shown["kd_standardize"]) == (2.0, 0.25, True)
    config = parse(["--config", "mine.yaml"])
    assert (config.method.kd_temperature, config.method.kd_ce_weight, config.method.kd_weight) == (2.0, 0.1, 1.0)
    help_text = " ".join(fastkd("train", "--method", "kd+dml", "--help")[1].replace("│", " ").split())
    for words in ("--kd-temperature FLOAT Softens both", "--dml-weight FLOAT Factor on all terms of dml"):
        assert words in help_text


def test_the_command_with_a_sum(fastkd, few_digits):
    options = ["--epochs", "1", "-b", "512", "--no-baseline", "--student", "resnet8", "--teacher", "resnet8"]
    status, out, err = fastkd("train", "--method", "kd+dml", "--teacher-epochs", "1", *options, "--out", "run")
    assert status == 0, err
    for words in ("teacher", "student, kd+dml", "peer1, kd+dml", "kl_peer1"):
        assert words in out
    assert "resuming run after epoch 1 of 1" in fastkd("train", "--out", "run", "--resume")[1]
