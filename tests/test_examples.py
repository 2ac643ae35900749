"""The examples run, and the student learns."""

import importlib.util
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy
import pytest
import torch


def example(name: str) -> ModuleType:
    path = Path(__file__).parent.parent / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_plain_loop(tiny_net, tiny_loaders):
    batches = list(tiny_loaders(samples=48)[0])
    history = example("plain_loop").train(tiny_net(0), tiny_net(1), batches, epochs=6)
    assert history[-1] < history[0]


def test_timm_loop():
    torch.manual_seed(0)
    numpy.random.seed(0)  # timm's mixup draws from it
    labels = torch.randint(3, (8,))
    batches = [(torch.randn(8, 3, 32, 32) + labels[:, None, None, None], labels)] * 4
    history = example("timm_loop").train(batches, classes=3, student="resnet10t", teacher="resnet10t", epochs=10)
    assert history[-1] < 0.8 * history[0]


def test_timm_task():
    """The value and the gradients are those of timm's own task."""
    timm = pytest.importorskip("timm", minversion="1.0.27")
    torch.manual_seed(0)
    fused, own = example("timm_task").FusedDistillationTask, import_module("timm.task").LogitDistillationTask
    nets = [timm.create_model("resnet10t", num_classes=3) for _ in range(2)]
    nets[1].pretrained_cfg = {**nets[1].pretrained_cfg, "mean": (0.5, 0.5, 0.5)}
    targets = torch.tensor([0, 2, 1, 1]), torch.rand(4, 3).softmax(1)
    images, found = torch.randn(4, 3, 32, 32), []
    losses = import_module("timm.loss")
    criteria = torch.nn.CrossEntropyLoss(), losses.SoftTargetCrossEntropy(), losses.LabelSmoothingCrossEntropy(0.2)
    for kind in (fused, own):
        for target, criterion in zip((*targets, targets[0]), criteria, strict=True):
            given = kind(*nets, criterion, temperature=2.0, task_loss_weight=0.3).train()
            loss = given(images, target)["loss"]
            found.append([loss, *torch.autograd.grad(loss, [*nets[0].parameters()])])
    torch.testing.assert_close(found[:3], found[3:], rtol=1e-3, atol=1e-5)
    with pytest.raises(TypeError, match="place of a cross-entropy"):
        fused(*nets, losses.BinaryCrossEntropy())
    history = example("timm_task").main()
    assert history[-1] < 0.9 * history[0]


def test_torchvision_loop():
    torch.manual_seed(0)
    history = example("torchvision_loop").main(samples=192)
    assert len(history) == 3 and history[-1] < 0.9 * history[0]


def test_own_loader(tmp_path):
    torch.manual_seed(0)
    result = example("own_loader").main(str(tmp_path), samples=128)
    assert [row["epoch"] for row in result.history] == [1, 2, 3]
    assert result.history[-1]["kd"] < result.history[0]["kd"]
    assert (tmp_path / "teacher/student.safetensors").exists() and result.student.exists()


@pytest.mark.libraries
def test_lightning_module(tmp_path):
    pytest.importorskip("lightning")
    torch.manual_seed(0)
    lightning_module = example("lightning_module")
    module = lightning_module.main(str(tmp_path), samples=128)
    assert module.teacher.net.training is False and module.student.training
    (file,) = tmp_path.rglob("*.ckpt")
    saved = torch.load(file, weights_only=True)["state_dict"]
    assert saved and all(name.startswith("student.") for name in saved)
    assert torch.equal(saved["student.fc.weight"], module.student.state_dict()["fc.weight"])


@pytest.mark.libraries
def test_hf_trainer(tmp_path):
    pytest.importorskip("accelerate")
    history = example("hf_trainer").main(str(tmp_path), samples=256)
    assert len(history) == 3 and history[-1] < history[0]


@pytest.mark.libraries
def test_accelerate_loop():
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    accelerate_loop = example("accelerate_loop")
    accelerate_loop.EPOCHS = 4
    history = accelerate_loop.main(samples=192)
    assert len(history) == 4 and history[-1] < history[0]


@pytest.mark.libraries
def test_wandb_loop(tmp_path):
    wandb = pytest.importorskip("wandb")
    torch.manual_seed(0)
    history = example("wandb_loop").main(str(tmp_path), samples=128)
    wandb.teardown()  # its service has then written everything
    assert history[0].keys() == {"train/ce", "train/kd"} and history[-1]["train/kd"] < history[0]["train/kd"]
    (log,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert b"train/kd" in log.read_bytes()
