"""--log: every tracker gets the options and a row per epoch, a resume goes on in its run, a failure ends nothing."""

import json
import sys
import time

import pytest

from fastkd import Trainer, TrainOptions, loggers
from fastkd.errors import UserError
from fastkd.methods import CE


def fit(tiny_net, tiny_loaders, out, epochs=3, **options):
    settings = TrainOptions(epochs=epochs, lr=0.05, out=str(out), device="cpu", **options)
    return Trainer(CE(tiny_net()), *tiny_loaders(), settings).fit()


def test_tensorboard_gets_every_epoch(tiny_net, tiny_loaders, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    result = fit(tiny_net, tiny_loaders, tmp_path / "run", log=("csv", "tensorboard"))
    events = accumulator.EventAccumulator(str(result.out / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("top1")] == [1, 2, 3]
    assert "lr: 0.05" in str(events.Tensors("options/text_summary")[0].tensor_proto)


@pytest.mark.parametrize("name", loggers.LIBRARIES)
def test_a_missing_library_is_said_before_anything_is_written(tiny_net, tiny_loaders, tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, loggers.LIBRARIES[name], None)
    with pytest.raises(UserError, match=rf"--log {name}: .*; pip install 'fastkd\[{name}\]'"):
        fit(tiny_net, tiny_loaders, tmp_path / "run", log=(name,))
    assert not (tmp_path / "run").exists()


def test_an_unknown_name_is_refused(fastkd):
    with pytest.raises(UserError, match="--log must be one of csv, tensorboard, wandb, mlflow, got 'wanb'"):
        TrainOptions(log=("wanb",))
    status, _, err = fastkd("train", "--log", "csv", "wanb")
    assert status == 2 and "--log must be some of csv, tensorboard, wandb, mlflow, got 'csv wanb'" in err
    assert "did you mean 'wandb'?" in err
    assert "'--log'" in fastkd("train", "--tensorboard")[2]


def test_a_tracker_that_fails_ends_no_run(tiny_net, tiny_loaders, tmp_path, monkeypatch, capsys):
    ended = []

    class Down(loggers.Logger):
        name = "wandb"

        def begin(self, options):
            assert options["lr"] == 0.05

        def write(self, row):
            raise ConnectionError("server is down")

        def end(self, status):
            ended.append(status)

    monkeypatch.setitem(loggers.KINDS, "wandb", Down)
    monkeypatch.setitem(loggers.LIBRARIES, "wandb", "json")
    result = fit(tiny_net, tiny_loaders, tmp_path / "run", log=("wandb",))
    out = capsys.readouterr().out
    assert out.count("WARNING: --log wandb gets no more rows: ConnectionError: server is down") == 1
    assert len(result.history) == 3 and ended == []


def stop_after(epochs):
    """A trainer's callback that ends a run as a fault of it would."""

    def on_epoch(self, epoch):
        if epoch.epoch == epochs:
            raise KeyboardInterrupt

    return type("Stop", (), {"on_epoch": on_epoch})()


def stopped_and_resumed(tiny_net, tiny_loaders, out, name):
    settings = TrainOptions(epochs=3, lr=0.05, out=str(out), device="cpu", log=(name,))
    with pytest.raises(KeyboardInterrupt):
        Trainer(CE(tiny_net()), *tiny_loaders(), settings, callbacks=[stop_after(2)]).fit()
    ids = json.loads((out / "loggers.json").read_text())
    result = fit(tiny_net, tiny_loaders, out, log=(name,), resume=True)
    assert json.loads((out / "loggers.json").read_text()) == ids
    return ids[name], result.history


@pytest.mark.libraries
def test_mlflow_keeps_one_run_in_a_local_store(tiny_net, tiny_loaders, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "students")
    monkeypatch.chdir(tmp_path)
    number, history = stopped_and_resumed(tiny_net, tiny_loaders, tmp_path / "run", "mlflow")
    client = mlflow.MlflowClient()
    run = client.get_run(number)
    assert run.info.status == "FINISHED" and run.info.run_name == str(tmp_path / "run")
    assert client.get_experiment(run.info.experiment_id).name == "students"
    assert run.data.params["lr"] == "0.05" and run.data.params["epochs"] == "3"
    rows = [(each.step, each.value) for each in client.get_metric_history(number, "top1")]
    assert rows == [(row["epoch"], row["top1"]) for row in history]
    assert len(client.search_runs([run.info.experiment_id])) == 1


@pytest.mark.libraries
def test_mlflow_goes_on_in_its_store_from_another_directory(tiny_net, tiny_loaders, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "first")
    fit(tiny_net, tiny_loaders, tmp_path / "run", epochs=1, log=("mlflow",))
    kept = json.loads((tmp_path / "run/loggers.json").read_text())
    assert str(tmp_path / "first") in kept["mlflow_tracking_uri"]
    monkeypatch.chdir(tmp_path / "second")
    fit(tiny_net, tiny_loaders, tmp_path / "run", epochs=2, log=("mlflow",), resume=True, extend=True)
    assert json.loads((tmp_path / "run/loggers.json").read_text()) == kept and not [*(tmp_path / "second").iterdir()]
    client = mlflow.MlflowClient(kept["mlflow_tracking_uri"])
    assert [each.step for each in client.get_metric_history(kept["mlflow"], "top1")] == [1, 2]


@pytest.mark.libraries
def test_wandb_works_offline_and_keeps_its_id(tiny_net, tiny_loaders, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_PROJECT", "students"), ("WANDB_SILENT", "true")):
        monkeypatch.setenv(name, value)
    init, given = wandb.init, []

    def noted(**options):
        time.sleep(1.1 * len(given))  # the folder's name has the second
        given.append(options)
        return init(**options)

    monkeypatch.setattr(wandb, "init", noted)
    number, _ = stopped_and_resumed(tiny_net, tiny_loaders, tmp_path / "run", "wandb")
    assert [each["id"] for each in given] == [None, number] and given[0]["project"] == "students"
    assert given[0]["name"] == str(tmp_path / "run") and given[0]["config"]["lr"] == 0.05
    kept = sorted((tmp_path / "run/wandb").glob(f"offline-run-*-{number}/run-{number}.wandb"))
    assert len(kept) == 2 and [b"val_loss" in path.read_bytes() for path in kept] == [True, True]
