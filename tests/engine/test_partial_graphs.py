"""Steps of very many paths, replayed module by module, equal eager ones bit for bit."""

import pytest
import torch
from every_method import batch, build
from replays import CPU, Graph, same, trained
from torch.utils._pytree import tree_leaves

from fastkd import create_model
from fastkd.engine import Step, TrainOptions, choose_form
from fastkd.engine.launch import check_compile, graphed
from fastkd.engine.partial_graphs import PartialGraph, PartialGraphStep, count_paths
from fastkd.engine.precision import Precision
from fastkd.errors import UserError
from fastkd.methods import IAKD
from fastkd.methods.iakd import IAKDOptions


class Pool:
    """Graphs with memory in common: a replay leaves nothing of the others' intermediate results and results."""

    def __init__(self):
        self.graphs = []

    def __call__(self) -> Graph:
        self.graphs.append(PoolGraph(self))
        return self.graphs[-1]


class PoolGraph(Graph):
    def __init__(self, pool: Pool):
        super().__init__()
        self.pool = pool

    def replay(self) -> None:
        graphs = self.pool.graphs
        pair = graphs.index(self) // 2  # forward and backward
        for other in graphs[: 2 * pair] + graphs[2 * pair + 2 :]:
            for made in other.made():
                made.fill_(torch.nan)
        super().replay()

    def made(self) -> list[torch.Tensor]:
        """The tensors that the capture has made."""
        before, found = set(), {}
        for _, args, kwargs, result in self.calls:
            before |= {storage(x) for x in tensors((args, kwargs))} - found.keys()
            found |= {storage(x): x for x in tensors(result) if storage(x) not in before}
        return [x.data for x in found.values() if x.is_floating_point()]  # autograd does not see what is done to it


def tensors(tree) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def storage(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()


def pool():
    return Graph


PATHS = [(True, True, True), (True, False, True), (False, False, False)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"opt": "adamw", "ema_decay": 0.9, "clip_grad": 0.5},
        {"grad_accum": 2, "ema_decay": 0.5, "opt": "nesterov"},
        {"amp_dtype": "bfloat16"},
        {"amp_dtype": "float16"},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["iakd", "iakd --teacher-bn batch"])
def test_replayed_modules_equal_eager_ones(name, options):
    eager, _ = trained(name, **options)
    replayed, run = trained(name, PartialGraphStep, new=pool, **options)
    assert sum(bool(module.replays) for module in run.modules) >= 6, "too little was captured"
    assert same(eager, replayed)
    run.close()
    assert not any("forward" in vars(module) for module in run.step.method.modules())


def test_maps_between_the_modules_reach_the_loss():
    """Three gradients are summed there, in another order: equal within rounding.

    In float64: in float32 the rounding of three steps can flip a ReLU, which moves weights by 3e-3.
    """
    eager, _ = trained("iakd+at", dtype=torch.float64)
    replayed, run = trained("iakd+at", PartialGraphStep, new=pool, dtype=torch.float64)
    assert sum(bool(module.replays) for module in run.modules) >= 5
    torch.testing.assert_close(replayed["method"], eager["method"], rtol=1e-9, atol=1e-9)
    assert replayed["terms"] == pytest.approx(eager["terms"], rel=1e-9)


@pytest.mark.parametrize("form", ["plain", "fused"])
def test_the_teacher_s_own_forward_is_replayed(form):
    states = []
    for wrap in (lambda step: step, lambda step: PartialGraphStep(step, pool, warm_up=1)):
        method = build("iakd --teacher-bn batch")
        method.teacher.batch_statistics = False
        method.train()
        precision = Precision("float32", CPU)
        choose_form(method, batch(0, 8)[0], form, precision, lambda line: None)
        step = Step(method, TrainOptions(lr=0.05), CPU)
        run = wrap(step)
        for number in range(6):
            run(*batch(number % 3, 8), PATHS[number % 3])
        states.append(step.state_dict())
    *_, last = run.modules
    assert last.replays == 5 and same(*states)


def test_a_module_that_is_left_out_stays_untouched():
    method = build("iakd")
    run = PartialGraphStep(Step(method, TrainOptions(lr=0.1, weight_decay=0.1), CPU), pool, warm_up=1)
    for path in (*PATHS, *PATHS):
        run(*batch(0, 8), path)
    before = [{name: v.clone() for name, v in gate.student.state_dict().items()} for gate in method.gates]
    run(*batch(1, 8), (True, False, True))
    left = [same(old, dict(gate.student.state_dict())) for old, gate in zip(before, method.gates, strict=True)]
    assert left == [False, True, False]


def test_other_batches_and_evaluation_run_eagerly():
    method = build("iakd")
    run = PartialGraphStep(Step(method, TrainOptions(lr=0.1), CPU), pool, warm_up=1)
    plain = build("iakd")
    step = Step(plain, TrainOptions(lr=0.1), CPU)
    for size in (8, 8, 5, 8):
        run(*batch(0, size), PATHS[0])
        step(*batch(0, size), PATHS[0])
    assert [module.replays for module in run.modules if module.seen] == [2] * 5
    assert same(run.step.state_dict(), step.state_dict())
    with torch.inference_mode():
        assert torch.equal(method.student.eval()(batch(1, 8)[0]), plain.student.eval()(batch(1, 8)[0]))


@pytest.mark.parametrize("count", [2, 3])
def test_micro_batches_of_two_sizes_are_captured(count):
    eager, _ = trained("iakd", grad_accum=count)
    replayed, run = trained("iakd", PartialGraphStep, new=pool, grad_accum=count)
    assert max(len(module.graphs) for module in run.modules) == (1 if count == 2 else 2)
    assert same(eager, replayed)


def test_alternatives_share_memory():
    eager, _ = trained("iakd")
    replayed, run = trained("iakd", PartialGraphStep, new=Pool)
    assert len({id(module.new_graph) for module in run.modules}) == 5
    assert same(eager, replayed)


def test_memory_shared_by_all_modules_would_be_caught():
    eager, _ = trained("iakd")
    common = Pool()
    replayed, _ = trained("iakd", PartialGraphStep, new=lambda: common)
    assert not same(eager, replayed)


def test_a_module_without_gradients():
    states = []
    for how in (None, PartialGraphStep):
        method = build("iakd")
        method.student.conv1.requires_grad_(False)
        method.student.bn1.requires_grad_(False)
        step = Step(method, TrainOptions(lr=0.1), CPU)
        run = how(step, pool, warm_up=1) if how else step
        for _ in range(4):
            run(*batch(0, 8), PATHS[0])
        states.append(step.state_dict())
    assert run.modules[0].replays == 3 and same(*states)


def test_gradients_of_layers_that_leave_autocast():
    """Autograd does not run under autocast, and so the captured backward may not."""

    class Exact(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            with torch.autocast("cpu", enabled=False):
                return self.layer(x.float())

    states = []
    for how in (None, PartialGraphStep):
        method = build("iakd")
        method.student.layer2[0].conv2 = Exact(method.student.layer2[0].conv2)
        step = Step(method, TrainOptions(lr=0.1, amp_dtype="bfloat16"), CPU)
        run = how(step, pool, warm_up=1) if how else step
        for _ in range(4):
            run(*batch(0, 8), PATHS[0])
        states.append(step.state_dict())
    assert same(*states)


@pytest.mark.parametrize("fault", ["stale input", "stale gradient", "frozen weights"])
def test_faults_are_caught(fault, monkeypatch):
    eager, _ = trained("iakd")
    if fault == "stale input":
        forward = PartialGraph.forward
        monkeypatch.setattr(PartialGraph, "forward", lambda self, x: forward(self, self.x.detach().clone()))
    elif fault == "stale gradient":
        backward = PartialGraph.backward
        monkeypatch.setattr(PartialGraph, "backward", lambda self, dy: backward(self, self.dy.clone()))
    else:
        monkeypatch.setattr(PartialGraph, "backward", lambda self, dy: (self.halves[1].replay(), self.dx)[1])
    replayed, _ = trained("iakd", PartialGraphStep, new=pool)
    assert not same(eager, replayed)


def by_stages() -> IAKD:
    return IAKD(create_model("resnet26", 10), create_model("resnet44", 10), IAKDOptions(gates="stage"))


def test_when_modules_are_captured(monkeypatch):
    cuda, made = torch.device("cuda"), []
    method = IAKD(create_model("resnet56", 10), create_model("resnet56", 10), IAKDOptions(gates="block"))
    assert count_paths(method) == 2**27 and count_paths(by_stages()) == 8
    monkeypatch.setattr("torch.cuda.graph_pool_handle", lambda: None)
    monkeypatch.setattr("torch.cuda.Stream", lambda device: None)
    step = graphed(Step(method, TrainOptions(lr=0.1), CPU), "on", cuda, made.append)
    assert type(step) is PartialGraphStep and len(step.modules) == 2 * 27 + 2
    assert step.close() == "CUDA graphs: 0 for 56 modules, 0 MB, replayed in 0 of 0 calls"
    assert not any("forward" in vars(module) for module in method.student.modules())
    adam = Step(method, TrainOptions(lr=0.1, opt="adamw"), CPU)
    graphed(adam, "on", cuda, made.append).close()
    assert all(group["capturable"] for group in adam.optimizer.param_groups)
    with pytest.raises(UserError, match="--compile on: a step takes one of 134,217,728 paths"):
        check_compile(method, TrainOptions(lr=0.1, compile="on"))
