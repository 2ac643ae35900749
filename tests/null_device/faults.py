"""Job: faults that the null device has found, one test each."""

from pathlib import Path

import pytest
import torch
from null_device import device
from null_device.checks import no_host_sync
from null_device.methods import CUDA, as_graph, new_pool, run_steps, step_of
from torch import nn

from fastkd import create_model, distributed
from fastkd.bench.steps.baselines import options
from fastkd.bench.steps.workload import Workload
from fastkd.engine import Step, TrainOptions, choose_form, graphed
from fastkd.engine.partial_graphs import PartialGraphStep
from fastkd.errors import UserError
from fastkd.methods import METHODS
from fastkd.run.checkpoint import Writer
from fastkd.run.diverged import Watch

MEGABYTE = 2**20


def images_of(size: int, count: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.randn(count, 3, size, size).to(CUDA, memory_format=torch.channels_last)
    return images, torch.zeros(count, dtype=torch.long, device=CUDA)


def kd(student: nn.Module, teacher: nn.Module) -> Step:
    method = METHODS["kd"](student, teacher).to(CUDA).to(memory_format=torch.channels_last).train()
    return Step(method, TrainOptions(lr=0.1, device="cuda"), CUDA)


@pytest.mark.parametrize(("name", "size"), [("timm/convnext_atto", 64), ("timm/vit_tiny_patch16_224", 224)])
def test_networks_without_buffers_train(name, size):
    torch.backends.cuda.enable_cudnn_sdp(False)  # the null device's cuDNN has no attention
    step = kd(create_model(name, 10), create_model(name, 10))
    runner = as_graph(step)
    batch = images_of(size)
    runner(*batch)
    with no_host_sync():
        for _ in range(3):
            runner(*batch)
    assert runner.graphs
    runner.close()


class Asks(nn.Module):
    """A network that asks the device something in forward."""

    def __init__(self):
        super().__init__()
        self.net = create_model("resnet8", 10)

    def forward(self, images):
        found = images[0, 0, 0].cpu()  # this line asks
        return self.net(images) * (len(found) > 0)


def after_six_steps(wanted: str, unnoticed: bool) -> tuple[list[str], torch.cuda.Stream]:
    """What was logged, and the stream that is current after steps of a network that asks the device.

    `unnoticed`: torch's check of the eager steps does not see it, so that a capture is tried and fails.
    """
    logged: list[str] = []
    step, batch = kd(Asks(), create_model("resnet14", 10)), images_of(16)
    before = torch.cuda.current_stream()
    runner = graphed(step, wanted, CUDA, logged.append)
    try:
        for number in range(6):
            if unnoticed and number == 0:
                runner.seen.update({(None, (batch[0].shape, batch[0].dtype, batch[1].shape, batch[1].dtype)): 1})
                runner.eager = 3
            runner(*batch)
    finally:
        found = torch.cuda.current_stream()
        torch.cuda.set_stream(before)  # whatever happened, for the tests after this one
    runner.close()
    return logged, found


LINE = next(n for n, line in enumerate(Path(__file__).read_text().splitlines(), 1) if line.endswith("# this line asks"))


@pytest.mark.parametrize("unnoticed", [False, True])
def test_a_step_that_asks_the_device_goes_on_eagerly(unnoticed):
    (begun, said), stream = after_six_steps("auto", unnoticed)
    assert begun == "steps run as CUDA graphs"
    what = "cannot be captured" if unnoticed else "waits for the device"
    assert said.startswith("steps run eagerly from here on: ") and f"faults.py:{LINE} {what}" in said
    assert stream == torch.cuda.default_stream()
    step = step_of("kd")  # the failed capture left nothing behind: another one succeeds
    runner = as_graph(step)
    run_steps(runner, step, range(3))
    assert runner.graphs
    runner.close()


def test_random_numbers_can_be_had_after_a_capture_that_failed():
    """torch 2.11 leaves its generator in the capture: "Offset increment outside graph capture"."""
    after_six_steps("auto", unnoticed=True)
    nn.functional.dropout(torch.ones(8, device=CUDA))
    state = torch.cuda.get_rng_state()
    torch.rand(8, device=CUDA)
    assert not torch.cuda.get_rng_state().equal(state)


@pytest.mark.parametrize("unnoticed", [False, True])
def test_a_step_that_asks_the_device_is_an_error_with_graph_on(unnoticed):
    with pytest.raises(UserError, match=f"--graph on: .*faults.py:{LINE} .*; use --graph auto or off"):
        after_six_steps("on", unnoticed)


def test_a_module_that_asks_the_device_runs_eagerly_among_graphs(monkeypatch):
    """IAKD by blocks: the other modules are replayed."""
    step, said = step_of("iakd"), []
    runner = PartialGraphStep(step, lambda: new_pool(), warm_up=1, stop=said.append)
    asking = runner.modules[0]
    forward = asking.forward
    asking.forward = lambda x: forward(x) if x.sum().item() < 1e9 else forward(x)
    run_steps(runner, step, range(8), may_wait=True)
    assert len(said) == 1 and "cannot be captured" in said[0]
    assert not asking.replays and any(module.replays for module in runner.modules)
    runner.close()


def test_a_compiler_failure_leaves_the_other_forms(monkeypatch):
    """torch.compile is lazy: its first call fails."""

    def fails(*inputs):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", lambda *function, **how: fails)
    step, logged = step_of("kd"), []
    chosen = choose_form(step.method, images_of(16)[0], "auto", step.precision, logged.append)
    assert chosen != "compiled" and any("no compiler here" in line for line in logged), logged


def test_an_odd_last_batch_needs_no_memory_of_its_own():
    """At most 5 % above that of the graph."""
    pair = Workload("kd", "resnet20", "resnet20", batch_size=512).filled(CUDA)
    step, (images, target) = Step(pair.build(CUDA), options(device="cuda"), CUDA), pair.batch(CUDA)
    torch.cuda.empty_cache()
    runner = as_graph(step)
    for _ in range(3):
        runner(images, target)
    held, peaks = torch.cuda.memory_reserved(), []
    for count in (500, 512, 500, 300):
        runner(images[:count], target[:count])
        peaks.append(torch.cuda.memory_reserved())
    assert runner.graphs
    runner.close()
    assert held > 50 * MEGABYTE and max(peaks) <= 1.05 * held, (held, peaks)


@pytest.mark.parametrize("name", ["dml", "dcm"])
def test_peers_can_run_beside_each_other(name):
    step = step_of(name)
    runner, first = as_graph(step), device.count_graphs()
    with device.labelled("peer", step.method.peers[0].modules()):
        run_steps(runner, step, range(4))
    (graph,) = device.graphs(first)
    runner.close()
    assert any(node.label == "peer" for node in graph)
    assert device.beside(graph, "peer") >= 20


class Keeps(nn.Module):
    """Makes a tensor for each shape of its input and keeps it."""

    def __init__(self):
        super().__init__()
        self.net, self.kept = create_model("resnet8", 10), {}

    def forward(self, images):
        if images.shape not in self.kept:
            self.kept[images.shape] = torch.zeros(1024, 1024, device=images.device)
        return self.net(images) + self.kept[images.shape][0, 0]


def test_what_a_network_keeps_is_not_in_memory_that_replays_overwrite():
    """An odd batch runs in the graphs' memory. What is made there and lives on needs graphs that leave it alone."""
    runner = as_graph(kd(Keeps(), create_model("resnet14", 10)))
    pools = [runner.memory.id]
    for count in (8, 8, 5, 8, 8, 8):
        runner(*images_of(16, count))
        pools.append(runner.memory.id)
    assert runner.graphs and pools[2] != pools[3]
    kept = [tensor.data_ptr() for tensor in runner.step.method.student.kept.values()]
    used = [(s["address"], s["total_size"]) for s in torch.cuda.memory_snapshot(runner.memory.id)]
    assert used and not any(start <= address < start + size for address in kept for start, size in used)
    runner.close()


class FailsInUpdate(torch.optim.SGD):
    """As if the memory ended in the update that is captured."""

    def step(self, closure=None):
        if torch.cuda.is_current_stream_capturing():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().step(closure)


@pytest.mark.parametrize("flat", [False, True])
def test_an_update_that_cannot_be_captured_goes_on_eagerly(flat, monkeypatch):
    """In fp16, whose scaler would take the gradients for unscaled. With several processes nothing is sent twice."""
    sent, said = [], []
    if flat:
        monkeypatch.setattr(distributed, "world_size", lambda: 2)
        monkeypatch.setattr(distributed, "gather", lambda thing: [thing, thing])
        monkeypatch.setattr(distributed, "broadcast", lambda net: None)
        monkeypatch.setattr(distributed, "all_reduce_", sent.append)
    step = step_of("kd", flat=flat, amp_dtype="float16")
    step.optimizer.__class__ = type("Fails", (FailsInUpdate, type(step.optimizer)), {})
    runner = as_graph(step)
    runner.stop = said.append
    run_steps(runner, step, range(5), may_wait=True)
    assert len(said) == 1 and "out of memory" in said[0] and runner.eager == 5
    assert not flat or len(sent) == 5
    runner.close()


def test_the_counters_of_bad_steps_are_read_without_a_wait(tmp_path):
    """The copy of step 16 is read after step 32, when the limit was reached in between: the run stops there."""
    step = step_of("ce", out=str(tmp_path), max_bad_steps=3)
    watch = Watch(step, Writer(tmp_path), print)
    counts = torch.tensor([16, 3, 3, 16, 32])
    with no_host_sync():
        for number in range(31):
            if number == 15:
                step.bad.counts.copy_(counts, non_blocking=True)
            watch(0, number, torch.tensor([number]))
    with pytest.raises(UserError, match="training diverged.*--max-bad-steps 3"):
        watch(0, 31, torch.tensor([31]))
    assert (tmp_path / "diverged.json").exists()
