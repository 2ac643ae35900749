"""One step: its arithmetic, what it refuses to do, and that it never asks the device anything."""

import ast
import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from capture import Capture

from fastkd.engine import Schedule, Step, TrainOptions
from fastkd.engine.mixup import Mixup
from fastkd.methods import CE, KD

CPU = torch.device("cpu")
IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0)).contiguous(
    memory_format=torch.channels_last
)
TARGET = torch.arange(8) % 4


def weights_after(method, steps=3, images=IMAGES, target=TARGET, **options):
    step = Step(method.train(), TrainOptions(**{"lr": 0.1, "amp_dtype": "float32"} | options), CPU)
    for _ in range(steps):
        step(images, target)
    return copy.deepcopy(method.state_dict()), step


def test_step_is_plain_sgd(tiny_net):
    got, _ = weights_after(CE(tiny_net()), momentum=0.9, weight_decay=0.01)
    net = tiny_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(net(IMAGES), TARGET).backward()
        optimizer.step()
    want = {f"student.{name}": value for name, value in net.state_dict().items()}
    torch.testing.assert_close(dict(got), want)


def test_micro_batches_add_up(tiny_net):
    """Without BatchNorm to couple the images the update is that of the whole batch, uneven parts included."""

    def run(parts):
        method = CE(tiny_net())
        method.student.bn.train = lambda mode=True: method.student.bn
        method.student.bn.training = False
        return weights_after(method, images=IMAGES[:7], target=TARGET[:7], grad_accum=parts)[0]

    torch.testing.assert_close(dict(run(3)), dict(run(1)))


def test_clipping_bounds_the_whole_gradient(tiny_net):
    clipped, _ = weights_after(CE(tiny_net()), steps=1, momentum=0.0, weight_decay=0.0, clip_grad=1e-3)
    start = CE(tiny_net()).state_dict()
    names = [name for name, _ in CE(tiny_net()).named_parameters()]
    moved = torch.cat([(clipped[name] - start[name]).flatten() for name in names]).norm()
    assert moved == pytest.approx(0.1 * 1e-3, rel=1e-3)


@pytest.mark.parametrize("amp_dtype", ["float32", "bfloat16", "float16"])
def test_a_step_that_is_not_finite_changes_nothing(tiny_net, amp_dtype):
    method = KD(tiny_net(0), tiny_net(1))
    _, step = weights_after(method, momentum=0.9, weight_decay=0.1, ema_decay=0.5, amp_dtype=amp_dtype)
    before = copy.deepcopy(method.state_dict())
    momentum = copy.deepcopy(step.optimizer.state_dict()["state"])
    step(torch.full_like(IMAGES, float("nan")), TARGET)
    assert step.bad.skipped.item() == 1
    for name, value in method.state_dict().items():
        assert torch.equal(before[name], value) or name.endswith("num_batches_tracked"), name
    assert all(value.isfinite().all() for value in step.ema.net.state_dict().values())
    torch.testing.assert_close(step.optimizer.state_dict()["state"], momentum, rtol=0, atol=0)
    assert torch.tensor(list(step.meter.read().values())).isfinite().all()


class Bent(CE):
    """Cross-entropy that is infinite or whose gradient is huge, whenever the first image says so."""

    def losses(self, out, target, plan):
        loss = F.cross_entropy(out(self.student), target)
        sign = out.images[0, 0, 0, 0]
        infinite = torch.where(sign > 50, torch.inf, 0.0)  # a constant: the gradient is finite
        return {"ce": loss * torch.where(sign < -50, 1e33, 1.0), "constant": infinite}


@pytest.mark.parametrize("amp_dtype", ["float32", "float16"])
@pytest.mark.parametrize("corner", [99.0, -99.0])
def test_an_infinite_loss_or_norm_skips_a_step_whose_gradient_is_finite(tiny_net, amp_dtype, corner):
    """Of two micro-batches one is bad. With float16 the scaler's verdict is the same one, so that the scale falls."""
    method = Bent(tiny_net()).train()
    step = Step(method, TrainOptions(lr=0.1, amp_dtype=amp_dtype, grad_accum=2), CPU)
    step(IMAGES, TARGET)
    before, scale = copy.deepcopy(method.state_dict()), step.precision.scaler.get_scale()
    images = IMAGES.clone()
    images[0, 0, 0, 0] = corner
    step(images, TARGET)
    assert step.bad.counts.tolist()[:3] == [2, 1, 1]
    for name, value in method.state_dict().items():
        assert torch.equal(before[name], value) or name.endswith("num_batches_tracked"), name
    assert step.precision.scaler.get_scale() == (scale / 2 if amp_dtype == "float16" else scale)
    step(IMAGES, TARGET)
    assert step.bad.counts.tolist()[:3] == [3, 1, 0]


@pytest.mark.parametrize("amp_dtype", ["bfloat16", "float16"])
def test_half_precision_trains_and_keeps_fp32_weights(tiny_net, amp_dtype):
    method = KD(tiny_net(0), tiny_net(1))
    step = Step(method.train(), TrainOptions(lr=0.1, amp_dtype=amp_dtype), CPU)
    losses = []
    for _ in range(12):
        step.meter.reset()
        step(IMAGES, TARGET)
        losses.append(sum(step.meter.read().values()))
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.dtype == torch.float32 for p in method.parameters())
    assert step.precision.scaler.is_enabled() == (amp_dtype == "float16")


def test_teacher_bytes_do_not_change(tiny_net):
    teacher = tiny_net(1)
    before = copy.deepcopy(teacher.state_dict())
    weights_after(KD(tiny_net(0), teacher), weight_decay=0.1, ema_decay=0.9)
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())


def test_state_continues_bit_for_bit(tiny_net):
    options = {"ema_decay": 0.9, "amp_dtype": "float16", "opt": "adamw"}
    whole, reference = weights_after(KD(tiny_net(0), tiny_net(1)), steps=5, **options)
    _, first = weights_after(KD(tiny_net(0), tiny_net(1)), steps=3, **options)
    method = KD(tiny_net(7), tiny_net(1)).train()
    second = Step(method, TrainOptions(lr=0.1, **options), CPU)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for _ in range(2):
        second(IMAGES, TARGET)
    assert all(torch.equal(whole[name], value) for name, value in method.state_dict().items())
    average = reference.ema.net.state_dict()
    assert all(torch.equal(average[name], value) for name, value in second.ema.net.state_dict().items())


@pytest.mark.parametrize("opt", ["sgd", "nesterov", "adamw"])
def test_a_bad_first_step_is_as_if_it_had_not_been(tiny_net, opt):
    options = TrainOptions(lr=0.1, opt=opt, amp_dtype="float32")
    weights = []
    for first in ([], [torch.full_like(IMAGES, float("nan"))]):
        method = CE(tiny_net()).train()
        step = Step(method, options, CPU)
        for images in [*first, IMAGES, IMAGES]:
            step(images, TARGET)
        weights.append(dict(method.named_parameters()) | dict(method.student.bn.named_buffers()))
    del weights[0]["num_batches_tracked"], weights[1]["num_batches_tracked"]
    torch.testing.assert_close(*weights, rtol=0, atol=0)


def test_micro_batches_have_at_least_two_images(tiny_net):
    method, sizes = CE(tiny_net()).train(), []
    method.student.register_forward_hook(lambda module, args, out: sizes.append(len(out)))
    Step(method, TrainOptions(lr=0.1, grad_accum=4), CPU)(IMAGES[:5], TARGET[:5])
    assert sizes == [3, 2]


SETTINGS = [
    {},
    {"amp_dtype": "bfloat16", "ema_decay": 0.9},
    {"amp_dtype": "float16", "clip_grad": 1.0},
    {"opt": "adamw", "grad_accum": 2},
]


@pytest.mark.parametrize("options", SETTINGS)
@pytest.mark.parametrize("mixed", [False, True])
def test_no_host_sync_in_a_step(tiny_net, options, mixed):
    method = KD(tiny_net(0), tiny_net(1)).train()
    step = Step(method, TrainOptions(lr=0.1, **options), CPU)
    mixup = Mixup(0.8, 1.0, 0.1, 4) if mixed else Mixup(0, 0, 0, 4)
    with Capture():
        for number in range(3):
            step(*mixup(IMAGES, TARGET, number, torch.arange(len(IMAGES))), method.plan(number))


@pytest.mark.gpu
@pytest.mark.parametrize("options", SETTINGS)
def test_no_host_sync_on_a_gpu(tiny_net, options):
    """torch's own check, on the device, with the schedule and the mixup around the step."""
    device = torch.device("cuda")
    method = KD(tiny_net(0), tiny_net(1)).to(device, memory_format=torch.channels_last).train()
    settings = TrainOptions(lr=0.1, **options)
    step, mixup = Step(method, settings, device), Mixup(0.8, 1.0, 0.1, 4)
    schedule, images, target = Schedule(settings, step.optimizer), IMAGES.to(device), TARGET.to(device)
    step(*mixup(images, target, 0, torch.arange(len(images))))  # the first step makes the optimizer's state
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(1, 4):
            schedule.write(number / 4)
            step(*mixup(images, target, number, torch.arange(len(images))), method.plan(number))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sum(step.meter.read().values()) > 0


NOT_IN_A_STEP = ("read", "own_state", "first_nonfinite", "scale_in_place", "check_labels", "check_class_weights",
                 "_may_update")  # fmt: skip
# once an epoch; for a checkpoint; on a CPU alone; when an option is set; with an optimizer of timm


def test_no_line_of_a_step_moves_values_to_the_host():
    """What a CPU cannot show: .cpu(), .numpy(), .tolist() are no calls of their own there."""
    import fastkd

    root = Path(fastkd.__file__).parent
    files = [*(root / "methods").glob("*.py"), *(root / "engine").glob("*.py"), *(root / "losses").glob("*.py")]
    files += [*(root.parent / "kernels").glob("*.py"), *(root.parent / "kernels" / "gpu").glob("*.py")]
    assert len(files) > 8
    for file in files:
        if file.stem == "check":  # the checks of values are for the CPU, where asking costs nothing
            continue
        if file.name in ("teacher_forms.py", "folded_gates.py", "timing.py"):  # they measure before the first step
            continue
        tree = ast.parse(file.read_text())
        functions = [f for f in ast.walk(tree) if isinstance(f, ast.FunctionDef)]
        elsewhere = [f for f in functions if f.name.endswith("_reference") or f.name in NOT_IN_A_STEP]
        exempt = {id(node) for function in elsewhere for node in ast.walk(function)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and id(node) not in exempt:
                assert node.attr not in ("item", "cpu", "numpy", "tolist", "synchronize"), f"{file.name}:{node.lineno}"
