"""A tiny run that a test stops, damages and continues; and what it becomes if nobody does."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import TinyNet

from fastkd import Trainer, TrainOptions
from fastkd.data import DataOptions, create_loaders, digits
from fastkd.methods import CE
from fastkd.run import checkpoint

CPU = torch.device("cpu")


class StoppedRun:
    """2 epochs of 4 steps, saved after each step and before and after each evaluation; stopped after `saves` of them.

    result: the bytes of the student's file that it gives, stopped or not.
    """

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, saves: int, **options: object):
        self.folder, self.options = folder, {"epochs": 2, "checkpoint_every": "1", "keep_checkpoints": 2} | options
        everything = digits.read_digits()
        patch.setattr(digits, "read_digits", lambda: tuple(part[:150] for part in everything))
        patch.setattr("fastkd.report.plot", lambda history: b"")
        with pytest.raises(KeyboardInterrupt):
            self.fit(folder, {saves: interrupt})
        whole = Path(shutil.copytree(folder, folder.parent / "whole"))
        self.result = self.trainer(whole).fit().student.read_bytes()

    def trainer(self, folder: Path) -> Trainer:
        """Of the run in `folder`, if there is one, else of a new one."""
        loaders = create_loaders(DataOptions("digits", batch_size=32), CPU, log=lambda line: None)
        torch.manual_seed(0)
        options = TrainOptions(lr=0.02, out=str(folder), device="cpu", resume=(folder / "config.yaml").exists())
        return Trainer(CE(TinyNet(10)), *loaders, TrainOptions(**vars(options) | self.options))

    def fit(self, folder: Path, then: dict[int, Callable[[], object]] = {}) -> Path:  # noqa: B006, not changed
        """Train to the end; `then[n]()` is called in the writer's thread when n states are written."""
        save, done = checkpoint.save_run, []

        def saved(*given):
            save(*given)
            done.append(given)
            if act := then.get(len(done)):
                act()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoint, "save_run", saved)
            return self.trainer(folder).fit().student


def interrupt() -> None:
    raise KeyboardInterrupt


def kill_after(patch: pytest.MonkeyPatch, saves: int) -> list[dict]:
    """The run ends after so many states were written: the next one raises. Gives those that were written, later."""
    save, written = checkpoint.save_run, []

    def killed(folder, state, keep):
        if len(written) == saves:
            raise KeyboardInterrupt
        written.append(state)
        save(folder, state, keep)

    patch.setattr(checkpoint, "save_run", killed)
    return written
