"""DKD's ramp in a run: the trainer writes it before each step, and a compiled step reads it."""

import copy

import pytest
import torch

from fastkd import Trainer, TrainOptions
from fastkd.methods import DKD
from fastkd.methods.dkd import DKDOptions
from fastkd.run import checkpoint


class Watched(DKD):
    """Notes the ramp that each step uses."""

    def losses(self, out, target, plan):
        if self.training:
            self.used.append(self.ramp.item())
        return super().losses(out, target, plan)


def ramps(tiny_net, tiny_loaders, out, **options):
    """The ramp of each step of a run of four epochs, and its network."""
    method = Watched(tiny_net(0), tiny_net(9), options=DKDOptions(ramp_epochs=2.0))
    method.used = []
    train_loader, val_loader = tiny_loaders()
    settings = TrainOptions(epochs=4, lr=0.05, out=str(out), graph="off", compile="off", **options)
    trainer = Trainer(method, train_loader, val_loader, settings)
    method.used.clear()  # of what is tried before the run
    trainer.fit()
    return method.used[-len(train_loader) * 4 :], method.student, len(train_loader)


def test_the_trainer_writes_the_ramp_and_a_resumed_run_has_the_same(tiny_net, tiny_loaders, tmp_path, monkeypatch):
    used, student, steps = ramps(tiny_net, tiny_loaders, tmp_path / "whole")
    factors = [value for epoch in range(1, 5) for value in [min(epoch / 2, 1)] * steps]
    assert used == pytest.approx(factors)
    save = checkpoint.save_run

    def killed_after_the_first(folder, state, keep):
        save(folder, state, keep)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_run", killed_after_the_first)
    with pytest.raises(KeyboardInterrupt):
        ramps(tiny_net, tiny_loaders, tmp_path / "cut")
    monkeypatch.setattr(checkpoint, "save_run", save)
    again, resumed, _ = ramps(tiny_net, tiny_loaders, tmp_path / "cut", resume=True)
    assert again == pytest.approx(factors[steps:])
    for name, value in student.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_compiled_step_follows_the_ramp(tiny_net, tiny_loaders):
    images, target = next(iter(tiny_loaders()[0]))
    method = DKD(tiny_net(0), tiny_net(9), options=DKDOptions(ramp_epochs=4.0)).eval()
    plain = copy.deepcopy(method)
    compiled = torch.compile(method, backend="eager", fullgraph=True)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for epoch in (0, 1.5, 9):
            method.at_epoch(epoch)
            plain.at_epoch(epoch)
            terms = compiled(images, target)
            torch.testing.assert_close(terms, plain(images, target))
    assert terms["dkd"] > 0
