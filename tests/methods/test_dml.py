"""DML against its formula, both ways of updating, and what a run with peers leaves."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from fastkd import Trainer, TrainOptions
from fastkd.engine import Step
from fastkd.errors import UserError
from fastkd.methods import DML
from fastkd.methods.dml import DMLOptions

CPU = torch.device("cpu")


def batch(number=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(number)
    return torch.randn(6, 3, 8, 8, generator=generator, dtype=dtype), torch.randint(4, (6,), generator=generator)


def divergence(mine, theirs):
    """KL(theirs || mine), theirs a constant, mean over the images."""
    p = F.softmax(theirs.detach(), dim=1)
    return (p * (p.log() - F.log_softmax(mine, dim=1))).sum(1).mean()


def loss_of(number, logits, target, kl_weight):
    others = [z for n, z in enumerate(logits) if n != number]
    mutual = sum(divergence(logits[number], z) for z in others) / len(others)
    return F.cross_entropy(logits[number], target), kl_weight * mutual


@pytest.mark.parametrize("count", [2, 3])
def test_terms_and_gradients_are_the_formula(tiny_net, count):
    nets = [tiny_net(seed).double() for seed in range(count)]
    images, target = batch()
    terms = DML(nets[0], None, DMLOptions(kl_weight=0.7), nets[1:])(images, target)
    assert list(terms)[:2] == ["ce", "kl"] and len(terms) == 2 * count
    weights = [p for net in nets for p in net.parameters()]
    got = torch.autograd.grad(sum(terms.values()), weights)
    wanted = [loss_of(n, [net(images) for net in nets], target, 0.7) for n in range(count)]
    for n, (ce, kl) in enumerate(wanted):
        torch.testing.assert_close(terms[f"ce_peer{n}" if n else "ce"], ce)
        torch.testing.assert_close(terms[f"kl_peer{n}" if n else "kl"], kl)
    for one, other in zip(got, torch.autograd.grad(sum(map(sum, wanted)), weights), strict=True):
        torch.testing.assert_close(one, other)


def test_equal_networks_teach_nothing(tiny_net):
    terms = DML(tiny_net(0), peers=[tiny_net(0)])(*batch(dtype=torch.float32))
    assert terms["kl"].abs() < 1e-6 and terms["kl_peer1"].abs() < 1e-6


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("alternate", [False, True])
def test_updates_are_those_of_a_plain_loop(tiny_net, count, alternate):
    """alternate: forward all, step one, forward all again, step the next. Else: forward all, step all."""
    nets = [tiny_net(seed) for seed in range(count)]
    method = DML(nets[0], None, DMLOptions(alternate=alternate), nets[1:]).train()
    step = Step(method, TrainOptions(lr=0.1, momentum=0.9, weight_decay=0.01), CPU)
    hand = [tiny_net(seed).train() for seed in range(count)]
    steps = [torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01) for net in hand]
    for number in range(4):
        images, target = batch(number, torch.float32)
        for plan in method.plans(number):
            step(images, target, plan)
        for learning in [[n] for n in range(count)] if alternate else [range(count)]:
            logits = [net(images) for net in hand]
            for n in learning:
                steps[n].zero_grad()
                sum(loss_of(n, logits, target, 1.0)).backward(inputs=list(hand[n].parameters()), retain_graph=True)
            for n in learning:
                steps[n].step()
    for mine, other in zip(nets, hand, strict=True):
        torch.testing.assert_close(dict(mine.state_dict()), dict(other.state_dict()))


def test_one_network_and_bad_weights(tiny_net):
    with pytest.raises(UserError, match="DML needs one or more peers"):
        DML(tiny_net())
    for value in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(UserError, match=f"--kl-weight must be a number above 0, got {value}"):
            DMLOptions(kl_weight=value)


def run_of(tiny_net, tiny_loaders, out, epochs, seed=0, **options):
    nets = [tiny_net(seed + n) for n in range(3)]
    settings = TrainOptions(epochs=epochs, lr=0.05, sched="constant", out=str(out), resume=True, **options)
    return Trainer(DML(nets[0], None, DMLOptions(alternate=True), nets[1:]), *tiny_loaders(), settings).fit()


@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.9}])
def test_peers_are_evaluated_saved_and_resumed_bit_for_bit(tiny_net, tiny_loaders, tmp_path, monkeypatch, options):
    whole = run_of(tiny_net, tiny_loaders, tmp_path / "whole", 3, **options)
    finish, stopped = Trainer._finish_epoch, tmp_path / "stopped"

    def stop_after_two(trainer):
        finish(trainer)
        if trainer.epoch == 2:
            raise InterruptedError

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(Trainer, "_finish_epoch", stop_after_two)
        run_of(tiny_net, tiny_loaders, stopped, 3, **options)
    run_of(tiny_net, tiny_loaders, stopped, 3, seed=50, **options)
    for name in ("student", "peer1", "peer2"):
        one, other = (load_file(folder / f"{name}.safetensors") for folder in (whole.out, stopped))
        assert one.keys() == tiny_net().state_dict().keys()
        assert all(torch.equal(value, other[key]) for key, value in one.items())
    for row in whole.history:
        for name in ("top1", "top5", "val_loss"):
            assert {name, f"peer1_{name}", f"peer2_{name}"} <= row.keys()
        assert {"ce", "kl", "ce_peer1", "kl_peer1", "ce_peer2", "kl_peer2"} <= row.keys()
    kept = [json.loads(line) for line in (stopped / "history.jsonl").read_text().splitlines()]
    for mine, other in zip(whole.history, kept, strict=True):
        times = ("img_per_s", "train_s", "data_wait_ms", "data_wait_percent")
        mine, other = ({k: v for k, v in row.items() if k not in times} for row in (mine, other))
        assert mine == other


def test_the_command_with_two_peers(fastkd, few_digits):
    options = ["--epochs", "1", "-b", "512", "--no-baseline", "--student", "resnet8", "--out", "run"]
    status, out, err = fastkd("train", "--method", "dml", "--peers", "resnet8", "wrn_10_1", *options)
    assert status == 0, err
    for words in ("student, dml", "peer1, dml", "peer2, dml", "wrn_10_1"):
        assert words in out
    about = fastkd("eval", "--weights", "run/peer2.safetensors", "--data", "digits")
    assert about[0] == 0 and "wrn_10_1" in about[1]
    assert not Path("run/teacher").exists()
    first, peer = (load_file(f"run/{name}.safetensors") for name in ("student", "peer1"))
    assert not torch.equal(first["conv1.weight"], peer["conv1.weight"])
