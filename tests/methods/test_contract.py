"""What every method owes the engine, and what a person may rely on whichever is chosen. New methods are taken up here
by their line in METHODS."""

import copy
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from capture import Capture
from every_method import NAMES, NETWORKS, RELATIONAL, batch, build, freeze_statistics, kind_of, parts_of, prepare
from torch import nn
from torch._dynamo.utils import counters

from fastkd import Trainer, TrainOptions, create_model, weights_file
from fastkd.engine import Step
from fastkd.engine.meter import Meter
from fastkd.errors import UserError
from fastkd.methods import METHODS, Method
from fastkd.methods.combo import _explained

CPU = torch.device("cpu")
WORKER = Path(__file__).parents[1] / "methods_worker.py"
every_method = pytest.mark.parametrize("name", NAMES)


def made(name, tmp_path, **options):
    """A method on its way, and its step."""
    method = build(name, **options)
    step = Step(method, TrainOptions(lr=0.05), CPU)
    prepare(method, tmp_path)
    return method, step


def bytes_of(net):
    return {key: value.clone() for key, value in net.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def weights_of(method):
    return [p for group in method.param_groups(0.1) for p in group["params"]]


def gradients(method, images, target, plan):
    terms = method(images, target, plan)
    return terms, torch.autograd.grad(sum(terms.values()), weights_of(method), allow_unused=True)


@every_method
def test_loss_falls_on_digits_and_the_teacher_stays(name, tmp_path):
    method, step = made(name, tmp_path)
    teacher = bytes_of(method.teacher.net) if method.teacher else {}
    images, target = batch(0)
    plans = dict.fromkeys(plan for number in range(20) for plan in method.plans(number))

    def scores():
        """The student's cross-entropy, and the loss over all plans; BatchNorm's statistics of `method` stay."""
        net = copy.deepcopy(method)
        return F.cross_entropy(net.student(images), target), sum(sum(net(images, target, p).values()) for p in plans)

    (ce_before, before), _ = scores(), [step(*batch(n % 2), p) for n in range(20) for p in method.plans(n)]
    ce, loss = scores()
    assert ce < ce_before and loss < before - 0.05 * before.abs()
    assert not method.teacher or same(teacher, bytes_of(method.teacher.net))
    assert step.bad.skipped.item() == 0


@every_method
def test_a_step_follows_the_sum_of_the_terms(name, tmp_path):
    (method, _), other = made(name, tmp_path), build(name)
    step = Step(other, TrainOptions(lr=0.5, momentum=0.0, weight_decay=0.0), CPU)
    prepare(other, tmp_path)
    plan, (images, target) = method.plans(0)[0], batch(0)
    terms, wanted = gradients(method, images, target, plan)
    assert all(term.dim() == 0 for term in terms.values())
    step(images, target, plan)
    rates = [group["lr"].item() for group in step.optimizer.param_groups for _ in group["params"]]
    for start, gradient, rate, end in zip(weights_of(method), wanted, rates, step.parameters, strict=True):
        torch.testing.assert_close(end, start if gradient is None else start - rate * gradient)


@every_method
def test_every_trainable_weight_is_in_one_group_and_the_teacher_in_none(name):
    method = build(name, taught=False)
    weights = weights_of(method)
    assert len({id(p) for p in weights}) == len(weights)
    assert {id(p) for p in weights} == {id(p) for p in method.parameters() if p.requires_grad}
    if method.teacher:
        assert not {id(p) for p in method.parameters()} & {id(p) for p in method.teacher.net.parameters()}


@every_method
def test_what_is_saved_is_the_plain_network(name, tmp_path):
    method, step = made(name, tmp_path)
    for plan in method.plans(0):
        step(*batch(0), plan)
    images, _ = batch(3)
    networks = method.networks()
    assert next(iter(networks)) == "student"
    for label, net in networks.items():
        weights_file.save_network(tmp_path / "net.safetensors", net, {})
        loaded = create_model(NETWORKS[label], 10, str(tmp_path / "net.safetensors")).eval()
        assert net.state_dict().keys() == loaded.state_dict().keys()
        with torch.no_grad():
            assert torch.equal(net.eval()(images), loaded.to(memory_format=torch.channels_last)(images))


@every_method
def test_state_continues_bit_for_bit(name, tmp_path):
    whole, step = made(name, tmp_path)
    half = None
    for number in range(4):
        if number == 2:
            half = copy.deepcopy(step.state_dict())
        for plan in whole.plans(number):
            step(*batch(number), plan)
    resumed, step = made(name, tmp_path, seed=1)  # other weights, as they were before the checkpoint is read
    step.load_state_dict(half)
    for number in (2, 3):
        for plan in resumed.plans(number):
            step(*batch(number), plan)
    assert same(whole.state_dict(), resumed.state_dict())


@every_method
@pytest.mark.parametrize("options", [{}, {"amp_dtype": "bfloat16", "grad_accum": 2, "clip_grad": 1.0}])
def test_no_host_sync_in_a_step(name, options, tmp_path):
    method = build(name, taught=False)
    step = Step(method, TrainOptions(lr=0.05, **options), CPU)
    prepare(method, tmp_path)
    images, target = batch(0)
    soft = F.one_hot(target, 10).float().lerp(torch.full((10,), 0.1), 0.1)
    with Capture():
        for number in range(2):
            for plan in method.plans(number):
                step(images, soft if number else target, plan)


@every_method
def test_replayed_as_a_graph_it_is_the_eager_step(name, tmp_path):
    method, _ = made(name, tmp_path)
    method.to(memory_format=torch.contiguous_format)
    images, target = (part.clone() for part in batch(0))
    plan = method.plans(0)[0]
    with Capture() as graph:
        terms, found = gradients(method, images, target, plan)
    for static, new in zip((images, target), batch(1), strict=True):
        static.copy_(new)
    graph.replay()
    wanted_terms, wanted = gradients(method, *(part.clone() for part in (images, target)), plan)
    for term, value in terms.items():
        torch.testing.assert_close(value.data, wanted_terms[term].data)  # .data: a replay writes into views
    for one, other in zip(found, wanted, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)


@every_method
def test_a_compiled_step_is_one_graph(name, tmp_path):
    """No graph break: with one, the compiler would leave parts of the step to the host."""
    method, _ = made(name, tmp_path)
    torch._dynamo.reset()
    counters.clear()
    method.compile(backend="eager", dynamic=False)
    method(*batch(0), method.plans(0)[0])
    assert not counters["graph_break"], list(counters["graph_break"])
    assert counters["stats"]["unique_graphs"] == 1


@every_method
def test_under_autocast_the_terms_are_finite_fp32(name, tmp_path):
    method, _ = made(name, tmp_path)
    with torch.autocast("cpu", torch.bfloat16):
        terms = method(*batch(0), method.plans(0)[0])
    assert all(term.dtype == torch.float32 and term.isfinite() for term in terms.values()), terms
    found = torch.autograd.grad(sum(terms.values()), weights_of(method), allow_unused=True)
    assert all(gradient.isfinite().all() for gradient in found if gradient is not None)


@every_method
def test_parts_of_a_batch_add_up(name, tmp_path):
    """grad_accum gives the mean over the parts; without BatchNorm's coupling that is the whole batch."""
    method, _ = made(name, tmp_path)
    freeze_statistics(method)
    plan, (images, target) = method.plans(0)[0], batch(0)
    other = copy.deepcopy(method)
    step = Step(other, TrainOptions(lr=0.5, momentum=0.0, weight_decay=0.0, grad_accum=2), CPU)
    halves = [gradients(method, *half, plan)[1] for half in zip(images.chunk(2), target.chunk(2), strict=True)]
    means = [None if one is None else (one + two) / 2 for one, two in zip(*halves, strict=True)]
    if not set(parts_of(name)) & RELATIONAL:
        for mean, whole in zip(means, gradients(method, images, target, plan)[1], strict=True):
            assert (mean is None) == (whole is None)
            if mean is not None:
                torch.testing.assert_close(mean, whole, rtol=1e-3, atol=1e-5)
    step(images, target, plan)
    rates = [group["lr"].item() for group in step.optimizer.param_groups for _ in group["params"]]
    for start, mean, rate, end in zip(weights_of(method), means, rates, step.parameters, strict=True):
        torch.testing.assert_close(end, start if mean is None else start - rate * mean, rtol=1e-4, atol=1e-5)


@every_method
def test_only_partial_methods_leave_weights_out_and_those_are_not_touched(name, tmp_path):
    method, step = made(name, tmp_path)
    step(*batch(0), method.plans(0)[0])  # momentum exists
    left_out = 0
    for number in range(1, 4):
        for plan in method.plans(number):
            unused = [p for p, g in zip(weights_of(method), gradients(method, *batch(number), plan)[1], strict=True)
                      if g is None]  # fmt: skip
            left_out += len(unused)
            before = [(p.clone(), step.optimizer.state[p]["momentum_buffer"].clone()) for p in unused]
            step(*batch(number), plan)
            for p, (weight, momentum) in zip(unused, before, strict=True):
                assert torch.equal(p, weight) and torch.equal(step.optimizer.state[p]["momentum_buffer"], momentum)
    assert method.find_unused_parameters == bool(left_out)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*command, str(WORKER), str(folder)], capture_output=True, text=True, timeout=600)
    return folder, done


@pytest.mark.xdist_group("two_processes")
@every_method
def test_two_processes_train_as_one(name, two_processes):
    from methods_worker import exactly

    folder, done = two_processes
    files = [folder / name / f"rank{rank}.pt" for rank in (0, 1)]
    assert all(file.exists() for file in files), done.stderr[-6000:]
    first, second = (torch.load(file, weights_only=True) for file in files)
    assert same(first["exact"], second["exact"])
    assert same(first["life"], second["life"])
    if not set(parts_of(name)) & RELATIONAL:
        torch.testing.assert_close(dict(first["exact"]), dict(exactly(name)), rtol=1e-3, atol=1e-4)


@every_method
def test_networks_that_are_missing_or_too_many_are_named(name, tiny_net):
    kind = kind_of(name)
    teacher = tiny_net(1) if kind.needs_teacher else None
    peers = [tiny_net(2)] if kind.needs_peers else []
    wrong = "takes no teacher" if teacher is None else "needs a teacher"
    with pytest.raises(UserError, match=wrong):
        kind(tiny_net(), tiny_net(1) if teacher is None else None, None, peers)
    wrong = "needs one or more peers" if peers else "takes no peers, got 1"
    with pytest.raises(UserError, match=wrong):
        kind(tiny_net(), teacher, None, [] if peers else [tiny_net(2)])


@every_method
def test_networks_that_learn_are_neither_frozen_nor_there_twice(name):
    kind, made = kind_of(name), lambda: [create_model("resnet8", 10) for _ in range(3)]
    for role, number in [("student", 0)] + ([("peer 1", 1)] if kind.needs_peers else []):
        nets = made()
        nets[number].requires_grad_(False)
        with pytest.raises(UserError, match=f"trains the {role}, whose weights are frozen"):
            kind(nets[0], nets[2] if kind.needs_teacher else None, None, nets[1:2] if kind.needs_peers else [])
    if kind.needs_teacher or kind.needs_peers:
        student, peer, _ = made()
        with pytest.raises(UserError, match="twice"):
            if kind.needs_peers:
                kind(student, peer if kind.needs_teacher else None, None, [student])
            else:
                kind(student, student)


@pytest.mark.parametrize("name", METHODS)
def test_options_are_explained_and_survive_a_file(name, fastkd):
    kind = METHODS[name].Options
    names = {option.name for option in fields(kind)}
    assert kind.__doc__ and METHODS[name].__doc__ and "weight" not in names  # --NAME-weight is a part's in a sum
    assert names <= {option for option, text in _explained(kind).items() if text}
    status, out, err = fastkd("train", "--method", name, "--print-config")
    assert status == 0 and names <= yaml.safe_load(out).keys(), err
    Path("again.yaml").write_text(out)
    assert yaml.safe_load(fastkd("train", "--config", "again.yaml", "--print-config")[1]) == yaml.safe_load(out)


OPTIONS = [(name, o.name) for name in METHODS for o in fields(kind_of(name).Options) if o.type is float]


@pytest.mark.parametrize("name, option", OPTIONS)
@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_numbers_below_zero_are_refused_by_name(name, option, value):
    with pytest.raises(ValueError, match=f"{option.replace('_', '[-_]')} .*{value}"):
        kind_of(name).Options(**{option: value})


@every_method
def test_temperature_zero_is_refused(name):
    for option in fields(kind_of(name).Options):
        if option.name.endswith("temperature"):
            with pytest.raises(ValueError, match="temperature .*0.0"):
                kind_of(name).Options(**{option.name: 0.0})


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--method", "kd", "--peers", "resnet8"], ["--peers resnet8", "method kd"]),
        (
            ["--method", "dml", "--teacher-weights", "t.pth"],
            ["--teacher-weights t.pth", "dml has no teacher", "--peers"],
        ),
        (
            ["--method", "dcm", "--teacher-weights", "t.pth"],
            ["--teacher-weights t.pth", "dcm has no teacher", "--peers"],
        ),
        (["--method", "kd", "--teacher-epochs", "0"], ["no weights", "--teacher-weights"]),
        (["--method", "kd+dmll"], ["'dmll'", "'dml'"]),
        (["--method", "kd+kd"], ["kd+kd", "once"]),
        (["--method", "kd+dml", "--kd-weight", "0"], ["--kd-weight", "above 0", "got 0"]),
        (["--method", "kd+dml", "--kd-temperature", "0"], ["--kd-", "temperature", "got 0"]),
        (["--method", "kd+dml", "--temperature", "2"], ["kd+dml has no option temperature", "--kd-temperature"]),
        (["--method", "kd+dml", "--dml-alternate"], ["--dml-alternate", "cannot be summed"]),
        (["--method", "iakd", "--student", "resnet8", "--teacher", "wrn_16_2"], ["stage 1", "--adapters"]),
        (["--method", "iakd", "--schedule", "review"], ["--schedule review", "--sched"]),
        (["--method", "iakd+at", "--iakd-schedule", "review"], ["--iakd-", "--schedule review", "--sched"]),
        (["--method", "iakd", "--schedule", "uniform", "--finish-epochs", "12"], ["--finish-epochs 12", "--epochs 12"]),
        (["--method", "kd+at", "--at-ce-weight", "0.5"], ["--at-ce-weight", "no effect", "at first"]),
        (["--method", "iakd+sokd", "--sokd-teacher-bn", "batch"], ["--sokd-teacher-bn batch", "one teacher"]),
        (["--method", "sokd", "--ce-s", "0", "--kd-sa", "0"], ["--ce-s and --kd-sa", "nothing"]),
    ],
)
def test_bad_input_is_one_line_before_anything_is_written(fastkd, tmp_path, arguments, words):
    if not set(arguments[1].split("+")) & set(METHODS):
        pytest.skip(f"no method {arguments[1]}")
    status, _, err = fastkd("train", *arguments)
    assert status == 2 and err.startswith("fastkd: ") and err.count("\n") == 1, err
    for word in words:
        assert word in err, err
    assert not any(tmp_path.iterdir())


@dataclass(frozen=True)
class ToyOptions:
    """A toy."""

    toy_size: float = 0.5
    """Weight of the toy's term."""


class Late(Method):
    """A term that is there from the second epoch on, in every other step."""

    needs_teacher = False

    def plan(self, step):
        return step > 3 and step % 2 == 0

    def losses(self, out, target, plan):
        terms = {"ce": F.cross_entropy(out(self.student), target)}
        return terms | {"late": 0.5 * terms["ce"]} if plan else terms


def test_a_term_may_come_later(tiny_net, tiny_loaders, tmp_path):
    result = Trainer(Late(tiny_net()), *tiny_loaders(), TrainOptions(epochs=2, out=str(tmp_path / "run"))).fit()
    first, second = result.history
    assert "late" not in first and 0 < second["late"]
    header, *rows = (tmp_path / "run/history.csv").read_text().splitlines()
    assert header.split(",")[-1] == "late" and [row.count(",") for row in rows] == [header.count(",")] * 2


def test_the_mean_of_a_term_is_over_all_steps_that_have_it():
    meter = Meter()
    for values, weight in (({"ce": 1.0}, 2), ({"ce": 4.0, "late": 3.0}, 1)):
        meter.add({name: torch.tensor(value) for name, value in values.items()}, weight)
    assert meter.read() == {"ce": 2.0, "late": 3.0}


class Toy(Method):
    """Logits near those of a second classifier."""

    Options = ToyOptions
    needs_teacher = False

    def __init__(self, student, teacher=None, options=None, peers=()):
        super().__init__(student, teacher, options, peers)
        self.second = nn.Linear(3, 10)

    def losses(self, out, target, plan):
        logits = out(self.student)
        second = self.second(out.images.mean((2, 3)))
        return {"ce": F.cross_entropy(logits, target), "toy": self.options.toy_size * F.mse_loss(second, logits)}


def test_a_toy_method_is_a_class_and_a_line(fastkd, few_digits, monkeypatch):
    monkeypatch.setitem(METHODS, "toy", Toy)
    quick = ["--epochs", "1", "-b", "512", "--no-baseline"]
    status, out, err = fastkd("train", "--method", "toy", *quick, "--toy-size", "0.25", "--out", "run")
    assert status == 0, err
    assert "toy 0." in out and "student, toy" in out and (Path("run") / "student.safetensors").exists()
    assert "resuming run after epoch 1 of 1" in fastkd("train", "--out", "run", "--resume")[1]
    assert "toy_size" in fastkd("train", "--method", "kd", "--toy-size", "1")[2]
    assert "│ toy " in fastkd("methods")[1]
    assert "toy_toy_size: 0.75" in fastkd("train", "--method", "kd+toy", "--toy-toy-size", "0.75", "--print-config")[1]
