"""TensorBoard, Weights & Biases and MLflow, through their own libraries, as callbacks of the trainer.

Each gets the options of the run and a row per epoch. Names and places come from the libraries' own environment
variables: WANDB_PROJECT, WANDB_NAME, WANDB_MODE=offline; MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME. Else the project
is "fastkd", and a run has the name of its folder. A resumed run goes on in the same run of W&B and MLflow; the ids
and MLflow's store are in loggers.json of the run folder. A tracker that fails costs its rows alone: the training goes
on.
"""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from .callbacks import EpochEnd, RunEnd
from .errors import UserError
from .files import write_atomic

LIBRARIES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
IDS = "loggers.json"


def check_loggers(names: Sequence[str]) -> None:
    """Raise UserError if the library of one of `names` is not installed. "csv" needs none."""
    for name in names:
        if name in LIBRARIES:
            try:
                import_module(LIBRARIES[name])
            except ImportError as error:
                raise UserError(f"--log {name}: {error}; pip install 'fastkd[{name}]'") from None


def open_loggers(names: Sequence[str], out: Path, options: Mapping[str, Any]) -> list["Logger"]:
    """The loggers of a run in `out`, which begins, or goes on."""
    return [KINDS[name](out, options) for name in dict.fromkeys(names) if name in KINDS]


class Logger:
    """A callback that never ends a run: after an error of its library it logs a warning and writes no more."""

    name: str

    def __init__(self, out: Path, options: Mapping[str, Any]):
        self.out, self.is_broken = out, False
        self._guarded(self.begin, options)

    def on_epoch(self, epoch: EpochEnd) -> None:
        self._guarded(self.write, epoch.row)

    def on_end(self, end: RunEnd) -> None:
        self._guarded(self.end, end.status)

    def begin(self, options: Mapping[str, Any]) -> None:
        """Start the run in the tracker, or go on with it."""
        raise NotImplementedError

    def write(self, row: Mapping[str, float]) -> None:
        """An epoch's row."""
        raise NotImplementedError

    def end(self, status: str) -> None:
        """The status of `RunEnd`."""
        raise NotImplementedError

    def _guarded(self, act: Any, value: Any) -> None:
        if self.is_broken:
            return
        try:
            act(value)
        except Exception as error:  # of a library, or of its server
            self.is_broken = True
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            logging.getLogger("fastkd").warning(f"WARNING: --log {self.name} gets no more rows: {reason}")

    def kept_id(self, name: str = "") -> str:
        """The id that the run has in the tracker, or what is kept by another name; "" if it is new."""
        try:
            return str(json.loads((self.out / IDS).read_text()).get(name or self.name, ""))
        except (OSError, ValueError, AttributeError):
            return ""

    def keep_id(self, number: str, name: str = "") -> None:
        try:
            ids = json.loads((self.out / IDS).read_text())
        except (OSError, ValueError):
            ids = {}
        write_atomic(self.out / IDS, json.dumps(ids | {name or self.name: number}) + "\n")


class TensorBoard(Logger):
    """Events in the folder tensorboard/ of the run."""

    name = "tensorboard"

    def begin(self, options: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.board = SummaryWriter(str(self.out / "tensorboard"))
        self.board.add_text("options", "\n".join(f"    {name}: {value}" for name, value in options.items()))

    def write(self, row: Mapping[str, float]) -> None:
        for name, value in row.items():
            self.board.add_scalar(name, value, row["epoch"])

    def end(self, status: str) -> None:
        self.board.close()


class WandB(Logger):
    """A run of Weights & Biases."""

    name = "wandb"

    def begin(self, options: Mapping[str, Any]) -> None:
        import wandb

        project, title = os.environ.get("WANDB_PROJECT", "fastkd"), os.environ.get("WANDB_NAME", str(self.out))
        self.run = wandb.init(
            project=project,
            name=title,
            id=self.kept_id() or None,
            resume="allow",
            dir=str(self.out),
            config=dict(options),
        )
        self.keep_id(self.run.id)

    def write(self, row: Mapping[str, float]) -> None:
        self.run.log(dict(row), step=int(row["epoch"]))

    def end(self, status: str) -> None:
        self.run.finish(exit_code=0 if status == "finished" else 1)


def _absolute(store: str) -> str:
    """The tracking URI of a store in the current directory, for a start in another one."""
    head, is_sqlite, path = store.rpartition("sqlite:///")
    if is_sqlite or "://" not in store:
        return head + is_sqlite + os.path.abspath(path)
    return store


class MLflow(Logger):
    """A run of MLflow. By a client of its own: the caller's active run stays as it is."""

    name = "mlflow"

    def begin(self, options: Mapping[str, Any]) -> None:
        import mlflow
        from mlflow import MlflowClient
        from mlflow.entities import Param

        chosen = os.environ.get("MLFLOW_TRACKING_URI") or mlflow.is_tracking_uri_set()
        store = "" if chosen else self.kept_id("mlflow_tracking_uri")
        self.client = MlflowClient(store or None)
        self.keep_id(_absolute(self.client.tracking_uri), "mlflow_tracking_uri")
        self.id = self.kept_id()
        if self.id:
            self.client.update_run(self.id, status="RUNNING")
        else:
            title = os.environ.get("MLFLOW_EXPERIMENT_NAME", "fastkd")
            known = self.client.get_experiment_by_name(title)
            experiment = known.experiment_id if known else self.client.create_experiment(title)
            self.id = self.client.create_run(experiment, run_name=str(self.out)).info.run_id
            self.keep_id(self.id)
            pairs = [Param(name, str(value)[:500]) for name, value in options.items()]
            for first in range(0, len(pairs), 100):  # the server takes no more at once
                self.client.log_batch(self.id, params=pairs[first : first + 100])

    def write(self, row: Mapping[str, float]) -> None:
        for name, value in row.items():
            self.client.log_metric(self.id, name, float(value), step=int(row["epoch"]))

    def end(self, status: str) -> None:
        self.client.set_terminated(self.id, {"finished": "FINISHED", "stopped": "KILLED"}.get(status, "FAILED"))


KINDS: dict[str, type[Logger]] = {kind.name: kind for kind in (TensorBoard, WandB, MLflow)}
